"""What a response-averaged vector does: its rows' scores, the choice among layers, answers with a row added."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..files import read_json, sha256_file, write_json
from ..generation import generate
from ..interventions import Ablate, Add, Positions
from ..judges.substring import Judge, SubstringJudge, is_degenerate
from ..measures import discover_refusal_tokens, kl_nats, next_token_logits, published_refusal_tokens, refusal_score
from ..model.points import HookedModel, model_type
from ..model.provenance import describe_model, versions
from ..run.stages import RunFolder
from ..stats import Rate
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet
from .responses import KEPT, RESPONSES, TOKENS, VECTOR, load_vectors, query_pools, row_direction

SCORES = "layer_selection_scores.json"


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate_vector`, with the published defaults."""

    dataset: str = "alpaca"
    """One prompt set, or TRAIN,VAL,TEST of which VAL and TEST are used here."""
    column: str | None = None
    n_validation_samples: int = 32
    n_test_samples: int = 20
    coefficients: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 5.0)
    max_new_tokens: int = 64
    batch_size: int = 8
    validation_seed: int = 200
    test_seed: int = 100
    layer: int | None = None
    """Test this row in place of the one with the highest steering score."""
    sound_layer: bool = False
    """Test the best layer that is neither late nor degenerate, in place of the documented argmax."""
    layers: tuple[int, ...] | None = None
    """Rows to choose from; None is all that are not zero."""
    kl_max: float | None = None
    """Largest mean KL (nats) of ablating the row on the validation queries; None is no limit."""
    refusal_tokens: tuple[int, ...] | None = None
    """None: found from the saved responses."""
    positions: Positions = "all"
    n_random: int = 1
    """Random vectors of the same norm, as controls."""
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_validation_samples", "n_test_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.coefficients:
            raise UserError("at least one coefficient is needed")
        if len(set(self.coefficients)) < len(self.coefficients):
            raise UserError(f"a coefficient was given twice: {self.coefficients}")
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.kl_max is not None and not 0 <= self.kl_max < math.inf:
            raise UserError(f"kl_max must be a number from 0 on, not {self.kl_max}")


@dataclass(frozen=True)
class LayerScore:
    """What adding one row does to the first token of answers to harmless queries."""

    layer: int
    steering: float
    """Mean refusal score (nats) with the row added once."""
    kl_nats: float
    """Mean KL(plain ‖ row ablated)."""

    def describe(self, baseline: float) -> dict[str, float | int]:
        return {
            "layer": self.layer,
            "steering_score": self.steering,
            "improvement_over_baseline": self.steering - baseline,
            "kl_nats_ablation": self.kl_nats,
        }


class Evaluation:
    """One vector folder with its model, queries and judge."""

    def __init__(
        self, model: HookedModel, source: str, vector_dir: Path, options: EvalOptions, folder: RunFolder, judge: Judge
    ) -> None:
        self.model, self.options, self.folder, self.judge = model, options, folder, judge
        self.record = describe_model(model, source)
        RunFolder(vector_dir).check_weights(self.record)
        folder.claim(self.record)
        prefix = read_json(vector_dir / TOKENS)["response_prefix"] if (vector_dir / TOKENS).exists() else ""
        self.chat = ChatFormat(model.tokenizer, options.system, options.template_kwargs, prefix)
        self.vectors = load_vectors(vector_dir / VECTOR, model.cfg.n_layers)
        self.n_layers = model.cfg.n_layers
        seen = vector_dir / RESPONSES[0]
        self.training_is_known = seen.exists()
        used = {row["instruction"] for row in read_json(seen)} if self.training_is_known else set()
        if not used:
            folder.report(f"warning: {seen} is missing, so test queries may be among those the vector was made from")
        training = PromptSet("training", tuple(Prompt(text) for text in used))
        _, val_pool, test_pool = query_pools(options.dataset, options.column)
        self.val = val_pool.without(training).sample(options.n_validation_samples, options.validation_seed)
        self.test = test_pool.without(training, self.val).sample(options.n_test_samples, options.test_seed)
        self.vector_dir = vector_dir
        self.base = {
            "model": self.record,
            "chat": self.chat.record(),
            "versions": versions(),
            "vector": sha256_file(vector_dir / VECTOR),
            "positions": options.positions,
        }

    def rows(self) -> list[int]:
        """The layers to choose from."""
        available = [layer for layer in range(self.n_layers + 1) if self.vectors[layer].any()]
        wanted = available if self.options.layers is None else sorted(set(self.options.layers))
        absent = [layer for layer in wanted if layer not in available]
        if absent or not wanted:
            raise UserError(f"the vector has no row for layer {absent[0] if absent else 'any'}; it has {available}")
        return wanted

    def score_layers(self) -> dict[str, Any]:
        """What `layer_selection_scores.json` holds: the plain refusal score, and every row's, best first."""
        kept = [self.vector_dir / file for file in KEPT]
        inputs = self.base | {
            "queries": self.val.sha256,
            "layers": self.rows(),
            "tokens": self.options.refusal_tokens,
            "responses": [sha256_file(file) for file in kept if file.exists()],
        }
        about = f"scoring {len(self.rows())} layers on {len(self.val)} validation queries"
        self.folder.stage("eval_layers", inputs, [SCORES], self._write_scores, about=about)
        return read_json(self.folder.path / SCORES)

    def _write_scores(self) -> None:
        tokens = self.options.refusal_tokens or self._find_refusal_tokens(self.vector_dir)
        plain = self._logits(())
        found = []
        for layer in self.rows():
            direction = row_direction(self.vectors, layer)
            added = refusal_score(self._logits((Add(direction, positions=self.options.positions),)), tokens)
            kl = kl_nats(plain, self._logits((Ablate(direction),)))
            found.append(LayerScore(layer, added.mean().item(), kl.mean().item()))
        ranked = sorted(found, key=lambda row: -row.steering)
        baseline = refusal_score(plain, tokens).mean().item()
        scores = {"baseline_refusal_score": baseline, "per_layer_scores": [row.describe(baseline) for row in ranked]}
        write_json(self.folder.path / SCORES, scores | {"refusal_tokens": list(tokens)})

    def answers(
        self, name: str, file: str, queries: PromptSet, direction: Direction, coefficient: float
    ) -> list[dict[str, Any]]:
        """Greedy answers with the vector added, as the published records: the stage `name`, which writes `file`."""
        inputs = self.base | {
            "queries": queries.sha256,
            "layer": direction.layer,
            "coefficient": coefficient,
            "direction": dict(direction.provenance),
            "max_new_tokens": self.options.max_new_tokens,
        }
        write = lambda: write_json(self.folder.path / file, self._generate(queries, direction, coefficient))  # noqa: E731
        self.folder.stage(name, inputs, [file], write, about=f"{len(queries)} answers")
        return read_json(self.folder.path / file)

    def _generate(self, queries: PromptSet, direction: Direction, coefficient: float) -> list[dict[str, Any]]:
        answers = generate(
            self.model,
            self.chat,
            queries.instructions,
            interventions=(Add(direction, coefficient, positions=self.options.positions),),
            max_new_tokens=self.options.max_new_tokens,
            batch_size=self.options.batch_size,
            description=f"coefficient {coefficient:g}",
        )
        return [
            {"category": prompt.category, "prompt": prompt.instruction, "response": answer.text}
            for prompt, answer in zip(queries.prompts, answers, strict=True)
        ]

    def rates(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Refusals in the published keys, with an interval, and degenerate text."""
        complied = self.judge.complied([row["prompt"] for row in rows], [row["response"] for row in rows])
        refused = Rate.of([not flag for flag in complied])
        return {
            "refusal_count": refused.count,
            "total_count": refused.n,
            "refusal_rate": refused.value,
            "interval": list(refused.interval),
            "degenerate_rate": Rate.of([is_degenerate(row["response"]) for row in rows]).describe(),
        }

    def degenerate_rate(self, layer: int) -> float:
        """Of answers to the validation queries with row `layer` added once."""
        file = f"layer_check_completions_{layer}.json"
        rows = self.answers(f"eval_check_{layer}", file, self.val, row_direction(self.vectors, layer), 1.0)
        return Rate.of([is_degenerate(row["response"]) for row in rows]).value

    def _logits(self, interventions: Sequence[Ablate | Add]) -> Float[Tensor, "prompt d_vocab"]:
        return next_token_logits(
            self.model,
            self.chat,
            self.val.instructions,
            interventions=interventions,
            batch_size=self.options.batch_size,
        )

    def _find_refusal_tokens(self, vector_dir: Path) -> tuple[int, ...]:
        files = [vector_dir / file for file in KEPT]
        if not all(file.exists() for file in files):
            published = published_refusal_tokens(model_type(self.model), self.chat)
            if published is None:
                raise UserError(f"{files[0].name} is not in {vector_dir}: name the tokens with --refusal-tokens")
            return published
        answered, refused = (list(dict.fromkeys(row["prompt"] for row in read_json(file))) for file in files)
        read = lambda prompts: next_token_logits(  # noqa: E731
            self.model, self.chat, prompts, batch_size=self.options.batch_size
        )
        return discover_refusal_tokens(read(refused), read(answered))


MAX_DEGENERATE = 0.05
"""A layer or coefficient is sound while at most this fraction of the answers is degenerate text."""
LATE = 0.8
"""Layers from int(0.8 · n_layers) on write the output more than they steer it."""


def evaluate_vector(
    model: HookedModel,
    source: str,
    vector_dir: Path,
    options: EvalOptions,
    folder: RunFolder,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Choose a layer on validation queries, report refusals per coefficient on test queries: `eval_summary.json`.

    Every row is added at the hook point it was read from. Validation, test and training queries are disjoint.

    Args:
        vector_dir: what `vector` wrote.
    """
    run = Evaluation(model, source, vector_dir, options, folder, judge or SubstringJudge())
    scores = run.score_layers()
    ranked = [
        LayerScore(row["layer"], row["steering_score"], row["kl_nats_ablation"]) for row in scores["per_layer_scores"]
    ]
    allowed = [row for row in ranked if options.kl_max is None or row.kl_nats <= options.kl_max]
    summary = _first_part(run, scores)
    if not allowed:
        lowest = min(row.kl_nats for row in ranked)
        summary |= {"status": "no layer survives", "explanation": f"the lowest KL is {lowest:.4f} > {options.kl_max}"}
        write_json(folder.path / "eval_summary.json", summary)
        return read_json(folder.path / "eval_summary.json")
    flags, sound = _check_layers(run.n_layers, allowed, run.degenerate_rate)
    chosen = _pick(allowed, sound, options)
    summary |= {
        "status": "done",
        "selected_layer": chosen.layer,
        "selected_layer_steering_score": chosen.steering,
        "hook_name": row_direction(run.vectors, chosen.layer).hook_name,
        "highest_scoring_layer": allowed[0].layer,
        "highest_scoring_layer_flags": flags,
        "best_sound_layer": sound,
    }
    if flags:
        folder.report(
            f"warning: the highest-scoring layer {allowed[0].layer}: {'; '.join(flags)}; best that is neither: {sound}"
        )
    summary |= _results(run, row_direction(run.vectors, chosen.layer))
    write_json(folder.path / "eval_summary.json", summary)
    return read_json(folder.path / "eval_summary.json")


def _first_part(run: Evaluation, scores: Mapping[str, Any]) -> dict[str, Any]:
    o = run.options
    return {
        "model_path": run.record.source,
        "vector_dir": str(run.vector_dir),
        "validation_seed": o.validation_seed,
        "test_seed": o.test_seed,
        "n_validation_samples": o.n_validation_samples,
        "n_test_samples": o.n_test_samples,
        "layer_selection_method": "steering_based" if o.layer is None else "given",
        "baseline_refusal_score": scores["baseline_refusal_score"],
        "refusal_tokens": [run.model.tokenizer.decode([token]) for token in scores["refusal_tokens"]],
        "training_queries_known": run.training_is_known,
        "judge": run.judge.name,
        "options": asdict(o),
    }


def _check_layers(
    n_layers: int, ranked: Sequence[LayerScore], degenerate_rate: Callable[[int], float]
) -> tuple[list[str], int | None]:
    """What is wrong with the highest-scoring layer, and the best layer with which nothing is wrong."""
    first_late = int(LATE * n_layers)
    flags: list[str] = []
    for place, row in enumerate(ranked):
        is_late = row.layer >= first_late
        if place == 0 and is_late:
            flags.append(f"late (from {first_late} on)")
        if place > 0 and is_late:
            continue
        broken = degenerate_rate(row.layer)
        if place == 0 and broken > MAX_DEGENERATE:
            flags.append(f"{broken:.2f} of its answers are degenerate text")
        if not is_late and broken <= MAX_DEGENERATE:
            return flags, row.layer
    return flags, None


def _pick(allowed: Sequence[LayerScore], sound: int | None, options: EvalOptions) -> LayerScore:
    wanted = options.layer if options.layer is not None else sound if options.sound_layer else allowed[0].layer
    found = next((row for row in allowed if row.layer == wanted), None)
    if found is None:
        raise UserError(f"layer {wanted} is not among those to choose from: {sorted(row.layer for row in allowed)}")
    return found


def _results(run: Evaluation, direction: Direction) -> dict[str, Any]:
    results: dict[str, Any] = {}
    controls: dict[str, dict[str, Any]] = {}
    for coefficient in run.options.coefficients:
        stem = f"coeff_{coefficient}"
        rows = run.answers(f"eval_{stem}", f"eval_completions_{stem}.json", run.test, direction, coefficient)
        results[str(coefficient)] = run.rates(rows)
        for seed in range(run.options.n_random if coefficient else 0):
            part, control = f"random_{seed}_{stem}", direction.random_like(seed)
            random_rows = run.answers(f"eval_{part}", f"eval_completions_{part}.json", run.test, control, coefficient)
            controls.setdefault(str(seed), {})[str(coefficient)] = run.rates(random_rows)
    return {"results_by_coefficient": results, "random_controls": controls, **_conclude(results)}


def _conclude(results: dict[str, Any]) -> dict[str, Any]:
    """Up to which coefficient text is sound, whether refusals only rise until there, and how far they rise."""
    rising = sorted((float(key), found) for key, found in results.items() if float(key) >= 0)
    broken = [c for c, found in rising if found["degenerate_rate"]["rate"] > MAX_DEGENERATE]
    sound = [(c, found) for c, found in rising if not broken or c < broken[0]]
    highest, does_not_fall = 0.0, True
    for _, found in sound:
        does_not_fall = does_not_fall and found["interval"][1] >= highest
        highest = max(highest, found["refusal_rate"])
    best = max(sound, key=lambda pair: pair[1]["refusal_rate"], default=None)
    return {
        "first_degenerate_coefficient": broken[0] if broken else None,
        "refusal_does_not_fall_before": does_not_fall,
        "best_sound_coefficient": best[0] if best else None,
        "best_sound_refusal_rate": best[1]["refusal_rate"] if best else None,
    }
