"""What a response-averaged vector does: its rows' scores, the choice among layers, answers with a row added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, layer_rows
from ..errors import UserError
from ..files import parsed, read_record, sha256_file, write_json
from ..generation import generate
from ..interventions import Ablate, Add
from ..judges.named import refused
from ..judges.substring import MAX_DEGENERATE, Judge, SubstringJudge, blind_spot, is_degenerate
from ..labels import Label, find_refusal_tokens, published_refusal_tokens
from ..measures import (
    Prefix,
    RefusalPrefixes,
    RefusalTokens,
    kl_nats,
    next_token_logits,
    refusal_scores,
)
from ..model.points import HookedModel, model_type
from ..model.provenance import describe_model, versions
from ..run.answers import Completion
from ..run.stages import RunFolder
from ..stats import Rate
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet
from .options import EvalOptions
from .responses import KEPT, RESPONSES, TOKENS, VECTOR, Response, SavedTokens, query_pools, row_direction

Result = TypeVar("Result")

SCORES = "layer_selection_scores.json"
SUMMARY = "eval_summary.json"


@dataclass(frozen=True)
class LayerScore:
    """What one row does to the first token of answers to harmless queries."""

    layer: int
    steering_score: float
    """Mean refusal score (nats) with the row added once."""
    improvement_over_baseline: float
    """By how much that is above the plain model's."""
    kl_nats_ablation: float
    """Mean KL(plain ‖ row ablated)."""


@dataclass(frozen=True)
class LayerScores:
    """What `layer_selection_scores.json` holds."""

    baseline_refusal_score: float
    """Of the plain model, in nats."""
    per_layer_scores: tuple[LayerScore, ...]
    """The highest steering score first."""
    refusal_tokens: Annotated[tuple[Prefix, ...], parsed(lambda tokens: RefusalPrefixes.of(tokens).prefixes)]


@dataclass(frozen=True)
class RefusalRates:
    """Refusals in the published keys, and degenerate text."""

    refusal_count: int
    total_count: int
    refusal_rate: float
    interval: tuple[float, float]
    """95% Wilson score interval of the refusal rate."""
    degenerate_rate: Rate


@dataclass(frozen=True)
class Conclusion:
    """What adding more and more of a vector does."""

    first_degenerate_coefficient: float | None
    """From which on the answers are no text."""
    refusal_does_not_fall_before: bool
    """Whether more of the vector never makes fewer answers refuse, up to there."""
    best_sound_coefficient: float | None
    best_sound_refusal_rate: float | None


@dataclass(frozen=True)
class EvalSetting:
    """What was evaluated, and on what."""

    model_path: str
    vector_dir: str
    validation_seed: int
    test_seed: int
    n_validation_samples: int
    n_test_samples: int
    layer_selection_method: Literal["steering_based", "given"]
    baseline_refusal_score: float
    """Of the plain model, in nats."""
    refusal_tokens: tuple[str, ...]
    """As text."""
    training_queries_known: bool
    """Whether the test queries are surely not among those that the vector was made from."""
    judge: str
    options: EvalOptions


@dataclass(frozen=True, kw_only=True)
class NoLayer(EvalSetting):
    """What `eval_summary.json` holds where every layer's KL is too large."""

    status: Literal["no layer survives"] = "no layer survives"
    explanation: str


@dataclass(frozen=True, kw_only=True)
class EvalSummary(Conclusion, EvalSetting):
    """What `eval_summary.json` holds."""

    status: Literal["done"] = "done"
    selected_layer: int
    selected_layer_steering_score: float
    hook_name: str
    """Where the selected row is added."""
    highest_scoring_layer: int
    highest_scoring_layer_flags: tuple[str, ...]
    """What is wrong with it."""
    best_sound_layer: int | None
    results_by_coefficient: dict[str, RefusalRates]
    random_controls: dict[str, dict[str, RefusalRates]]
    """By the seed of the random vector, then by coefficient."""
    judge_caution: str | None = None
    """What its phrases cannot read in the queries and plain answers; None where all is well."""


class Evaluation:
    """One vector folder with its model, queries and judge."""

    def __init__(
        self, model: HookedModel, source: str, vector_dir: Path, options: EvalOptions, folder: RunFolder, judge: Judge
    ) -> None:
        self.model, self.options, self.folder, self.judge = model, options, folder, judge
        self.record = describe_model(model, source)
        RunFolder(vector_dir).check_weights(self.record)
        folder.claim(self.record)
        tokens = vector_dir / TOKENS
        prefix = read_record(tokens, SavedTokens).response_prefix if tokens.exists() else ""
        self.chat = ChatFormat(
            model.tokenizer, options.system, options.template_kwargs, prefix, options.allow_special_tokens
        )
        self.vectors = layer_rows(vector_dir / VECTOR, model.cfg.n_layers)
        self.n_layers = model.cfg.n_layers
        seen = vector_dir / RESPONSES[0]
        self.training_is_known = seen.exists()
        used = {row.instruction for row in read_record(seen, list[Response])} if self.training_is_known else set()
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

    def score_layers(self) -> LayerScores:
        """The plain refusal score, and every row's, best first: `layer_selection_scores.json`."""
        kept = [self.vector_dir / file for file in KEPT]
        inputs = self.base | {
            "queries": self.val.sha256,
            "layers": self.rows(),
            "tokens": self.options.refusal_tokens,
            "kl": "exact",
            "responses": [sha256_file(file) for file in kept if file.exists()],
        }
        about = f"scoring {len(self.rows())} layers on {len(self.val)} validation queries"
        self.folder.stage("eval_layers", inputs, [SCORES], self._write_scores, about=about)
        return read_record(self.folder.path / SCORES, LayerScores)

    def _write_scores(self) -> None:
        tokens = self.options.refusal_tokens or self._find_refusal_tokens()
        prompts = self.val.instructions
        plain, baseline = self._logits(prompts), self._scores(prompts, tokens)
        rows = []
        for layer in self.rows():
            direction = row_direction(self.vectors, layer)
            added = self._scores(prompts, tokens, (Add(direction, positions=self.options.positions),))
            kl = kl_nats(plain, self._logits(prompts, (Ablate(direction),))).mean().item()
            rows.append(LayerScore(layer, added, added - baseline, kl))
        ranked = sorted(rows, key=lambda row: -row.steering_score)
        write_json(self.folder.path / SCORES, LayerScores(baseline, tuple(ranked), RefusalPrefixes.of(tokens).prefixes))

    def answers(
        self, name: str, file: str, queries: PromptSet, direction: Direction, coefficient: float
    ) -> list[Completion]:
        """Greedy answers with the vector added: the stage `name`, which writes `file`."""
        path, options = self.folder.path / file, self.options
        inputs = self.base | {
            "queries": queries.sha256,
            "layer": direction.layer,
            "coefficient": coefficient,
            "direction": dict(direction.provenance),
            "max_new_tokens": options.max_new_tokens,
        }

        def write() -> None:
            answers = self._batched(
                lambda size: generate(
                    self.model,
                    self.chat,
                    queries.instructions,
                    interventions=(Add(direction, coefficient, positions=options.positions),),
                    max_new_tokens=options.max_new_tokens,
                    batch_size=size,
                    description=f"coefficient {coefficient:g}",
                )
            )
            pairs = zip(queries.prompts, answers, strict=True)
            write_json(path, [Completion(prompt.category, prompt.instruction, answer.text) for prompt, answer in pairs])

        self.folder.stage(name, inputs, [file], write, about=f"{len(queries)} answers")
        return read_record(path, list[Completion])

    def rates(self, rows: Sequence[Completion]) -> RefusalRates:
        """How many answers refuse, and how many are no text."""
        flags = refused(self.judge, [row.prompt for row in rows], [row.response for row in rows])
        rate = Rate.of(flags)
        degenerate = Rate.of([is_degenerate(row.response) for row in rows])
        return RefusalRates(rate.count, rate.n, rate.value, rate.interval, degenerate)

    def degenerate_rate(self, layer: int) -> float:
        """Of answers to the validation queries with row `layer` added once."""
        file = f"layer_check_completions_{layer}.json"
        rows = self.answers(f"eval_check_{layer}", file, self.val, row_direction(self.vectors, layer), 1.0)
        return Rate.of([is_degenerate(row.response) for row in rows]).value

    def _logits(
        self, prompts: Sequence[str], interventions: Sequence[Ablate | Add] = ()
    ) -> Float[Tensor, "prompt d_vocab"]:
        given = self.model, self.chat, prompts
        return self._batched(lambda size: next_token_logits(*given, interventions=interventions, batch_size=size))

    def _scores(self, prompts: Sequence[str], tokens: RefusalTokens, interventions: Sequence[Add] = ()) -> float:
        """Mean refusal score, nats."""
        given = self.model, self.chat, prompts, tokens
        scores = self._batched(lambda size: refusal_scores(*given, interventions=interventions, batch_size=size))
        return scores.mean().item()

    def _batched(self, work: Callable[[int], Result]) -> Result:
        """`work(batch_size)`, at the size asked for, or at the largest that fits."""
        return with_smaller_batches(work, self.options.batch_size)

    def _find_refusal_tokens(self) -> tuple[Prefix, ...]:
        """How the kept refusals begin and the kept answers do not; the published tokens where no responses lie here."""
        if all((self.vector_dir / file).exists() for file in KEPT):
            tokens = find_refusal_tokens([label for is_refused in (False, True) for label in self._labels(is_refused)])
        else:
            published = published_refusal_tokens(model_type(self.model), self.chat) or ()
            tokens = tuple((token,) for token in published)
        if not tokens:
            raise UserError(
                f"the responses in {self.vector_dir} do not tell how refusals begin: name the tokens with "
                "--refusal-tokens"
            )
        return tokens

    def _labels(self, is_refused: bool) -> list[Label]:
        """The kept responses of one side, in the tokens that were sampled; encoded again where these are not there."""
        kept = read_record(self.vector_dir / KEPT[is_refused], list[Response])
        if not (self.vector_dir / TOKENS).exists():
            encoded = [self.chat.encode_answered(row.prompt, row.response) for row in kept]
            return [Label("", tuple(ids[first:]), is_refused) for ids, first in encoded]
        saved = read_record(self.vector_dir / TOKENS, SavedTokens)
        rows = read_record(self.vector_dir / RESPONSES[is_refused], list[Response])
        written = zip(rows, saved.refusing if is_refused else saved.compliant, strict=True)
        return [Label("", tokens.token_ids, is_refused) for row, tokens in written if row in kept]


LATE = 0.8
"""Layers from int(0.8 · n_layers) on write the output more than they steer it."""


def evaluate_vector(
    model: HookedModel,
    source: str,
    vector_dir: Path,
    options: EvalOptions,
    folder: RunFolder,
    judge: Judge | None = None,
) -> EvalSummary | NoLayer:
    """Choose a layer on validation queries, report refusals per coefficient on test queries: `eval_summary.json`.

    Every row is added at the hook point it was read from. Validation, test and training queries are disjoint.

    Args:
        vector_dir: what `responses extract` wrote.
    """
    run = Evaluation(model, source, vector_dir, options, folder, judge or SubstringJudge())
    scores = run.score_layers()
    setting = vars(_setting(run, scores))
    ranked = scores.per_layer_scores
    allowed = [row for row in ranked if options.kl_max is None or row.kl_nats_ablation <= options.kl_max]
    summary: EvalSummary | NoLayer
    if allowed:
        flags, sound = check_layers(run.n_layers, allowed, run.degenerate_rate)
        chosen = _pick(allowed, sound, options)
        if flags:
            folder.report(
                f"warning: the highest-scoring layer {allowed[0].layer}: {'; '.join(flags)}; best that is neither: "
                f"{sound}"
            )
        direction = row_direction(run.vectors, chosen.layer)
        results, controls = _results(run, direction)
        summary = EvalSummary(
            **setting,
            **vars(conclude(results)),
            selected_layer=chosen.layer,
            selected_layer_steering_score=chosen.steering_score,
            hook_name=direction.hook_name,
            highest_scoring_layer=allowed[0].layer,
            highest_scoring_layer_flags=tuple(flags),
            best_sound_layer=sound,
            results_by_coefficient=results,
            random_controls=controls,
            judge_caution=_blind_spot(run, direction),
        )
    else:
        lowest = min(row.kl_nats_ablation for row in ranked)
        summary = NoLayer(**setting, explanation=f"the lowest KL is {lowest:.4f} > {options.kl_max}")
    write_json(folder.path / SUMMARY, summary)
    return summary


def _setting(run: Evaluation, scores: LayerScores) -> EvalSetting:
    options = run.options
    return EvalSetting(
        model_path=run.record.source,
        vector_dir=str(run.vector_dir),
        validation_seed=options.validation_seed,
        test_seed=options.test_seed,
        n_validation_samples=options.n_validation_samples,
        n_test_samples=options.n_test_samples,
        layer_selection_method="given" if isinstance(options.layer, int) else "steering_based",
        baseline_refusal_score=scores.baseline_refusal_score,
        refusal_tokens=tuple(run.model.tokenizer.decode(list(prefix)) for prefix in scores.refusal_tokens),
        training_queries_known=run.training_is_known,
        judge=run.judge.name,
        options=options,
    )


def check_layers(
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
    wanted = (
        options.layer if isinstance(options.layer, int) else sound if options.layer == "sound" else allowed[0].layer
    )
    picked = next((row for row in allowed if row.layer == wanted), None)
    if picked is None:
        raise UserError(f"layer {wanted} is not among those to choose from: {sorted(row.layer for row in allowed)}")
    return picked


def _results(
    run: Evaluation, direction: Direction
) -> tuple[dict[str, RefusalRates], dict[str, dict[str, RefusalRates]]]:
    """Refusals on the test queries by coefficient, and those under random vectors by seed and coefficient."""

    def rates(part: str, added: Direction, coefficient: float) -> RefusalRates:
        return run.rates(_answers(run, part, added, coefficient))

    results: dict[str, RefusalRates] = {}
    controls: dict[str, dict[str, RefusalRates]] = {}
    for coefficient in run.options.coefficients:
        key, stem = str(coefficient), f"coeff_{coefficient}"
        results[key] = rates(stem, direction, coefficient)
        for seed in range(run.options.n_random if coefficient else 0):
            random = rates(f"random_{seed}_{stem}", direction.random_like(seed), coefficient)
            controls.setdefault(str(seed), {})[key] = random
    return results, controls


def _answers(run: Evaluation, part: str, added: Direction, coefficient: float) -> list[Completion]:
    return run.answers(f"eval_{part}", f"eval_completions_{part}.json", run.test, added, coefficient)


def _blind_spot(run: Evaluation, direction: Direction) -> str | None:
    """Of the answers that were changed least."""
    least = min(run.options.coefficients, key=abs)
    rows = _answers(run, f"coeff_{least}", direction, least)
    return blind_spot(run.judge, [row.prompt for row in rows], [row.response for row in rows])


def conclude(results: dict[str, RefusalRates]) -> Conclusion:
    """Up to which coefficient text is sound, whether refusals only rise until there, and how far they rise."""
    by_coefficient = {float(key): rates for key, rates in results.items() if float(key) >= 0}
    rising = sorted(by_coefficient.items(), key=lambda each: each[0])
    broken = [coefficient for coefficient, rates in rising if rates.degenerate_rate.value > MAX_DEGENERATE]
    sound = [(coefficient, rates) for coefficient, rates in rising if not broken or coefficient < broken[0]]
    highest, does_not_fall = 0.0, True
    for _, rates in sound:
        does_not_fall = does_not_fall and rates.interval[1] >= highest
        highest = max(highest, rates.refusal_rate)
    best = max(sound, key=lambda each: each[1].refusal_rate, default=None)
    return Conclusion(
        broken[0] if broken else None,
        does_not_fall,
        None if best is None else best[0],
        None if best is None else best[1].refusal_rate,
    )
