"""Several directions ablated together: their span, what ablating it does, and which together do more than one."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, cosine
from ..errors import UserError
from ..files import read_json, write_json, write_tensors
from ..generation import Generated, generate
from ..interventions import Ablate, Intervention
from ..judges.substring import SubstringJudge
from ..measures import LossResult, ScoredText, ce_loss, kl_nats, next_token_logits, refusal_score
from ..model.points import HookedModel
from ..run.record import MEAN_DIFFS, SURVIVORS, ranked
from ..run.stages import RunFolder
from ..stats import mean_interval
from ..text.prompts import PromptSet
from .context import RunContext
from .effects import BASELINE, Labelled, evaluate, loss_sets, loss_texts, losses, rates, texts_sha256
from .options import RunOptions
from .search import choose_direction, find_directions, record_run, score_directions

Multi = Literal["span", "sequential"]
"""How several directions are ablated. "span" leaves nothing of any of them. "sequential", the published way, projects
them out one after the other at every write: the order matters, and of two directions with cosine c the first keeps
c·√(1 − c²) of its scale (0.48 at c = 0.79)."""


@dataclass(frozen=True)
class Combination:
    """Surviving candidates, by rank, that are ablated together."""

    ranks: tuple[int, ...]
    """Rows of the survivors, best first, counted from 0."""
    directions: tuple[Direction, ...]
    span: Ablate
    """The ablation of the directions' span."""
    multi: Multi = "span"
    warning: str | None = None
    """What the span's basis warned of."""

    @property
    def label(self) -> str:
        """The folder name: "0-2", or "0-2-sequential"."""
        ranks = "-".join(map(str, self.ranks))
        return ranks if self.multi == "span" else f"{ranks}-{self.multi}"

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What is done to the model."""
        return (self.span,) if self.multi == "span" else tuple(map(Ablate, self.directions))

    @property
    def effective_rank(self) -> int:
        """Dimensions that ablating the span removes."""
        return len(self.span.basis)

    @property
    def places(self) -> list[dict[str, int | None]]:
        """Position and layer of every direction, under the published keys."""
        return [{"pos": direction.position, "layer": direction.layer} for direction in self.directions]

    def random_like(self, seed: int) -> Ablate:
        """The ablation of a random span of the same rank: the control for every effect of this one."""
        seeds = range(seed * self.effective_rank, (seed + 1) * self.effective_rank)
        return Ablate([self.directions[0].random_like(each) for each in seeds])

    def describe(self) -> dict[str, Any]:
        """Ranks, hook points, effective rank, relative singular values and cosines as JSON values."""
        singular = torch.linalg.svdvals(self.span.units)
        return {
            "label": self.label,
            "ranks": list(self.ranks),
            "multi": self.multi,
            "hook_names": [direction.hook_name for direction in self.directions],
            "norms": [direction.norm for direction in self.directions],
            "effective_rank": self.effective_rank,
            "relative_singular_values": (singular / singular[0]).tolist(),
            "cosines": [[cosine(a, b) for b in self.directions] for a in self.directions],
            "warning": self.warning,
        }


def combine(ranks: Sequence[int], directions: Sequence[Direction], multi: Multi = "span") -> Combination:
    """The combination of `directions`, which hold these ranks.

    Raises:
        UserError: two of the directions are all but the same; the message names them by rank.
    """
    check_multi(multi)
    names = ", ".join(f"direction {index} = rank {rank}" for index, rank in enumerate(ranks))
    span = Ablate(list(directions))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _ = span.basis
        except UserError as error:
            raise UserError(f"{error} ({names})") from None
    warning = f"{caught[0].message} ({names})" if caught else None
    return Combination(tuple(ranks), tuple(directions), span, multi, warning)


def check_multi(multi: str) -> None:
    """Refuse an unknown way to ablate several directions."""
    if multi not in get_args(Multi):
        raise UserError(f"--multi takes span or sequential, not {multi!r}")


def save_combination(run: RunContext, combination: Combination) -> str:
    """Write `{label}/directions.pt`, `directions_metadata.json` and `directions_span.json`; return the folder."""
    where = f"{combination.label}/"
    files = [f"{where}directions{end}" for end in (".pt", "_metadata.json", "_span.json")]

    def compute() -> None:
        write_tensors(run.path / files[0], [direction.vector for direction in combination.directions])
        write_json(run.path / files[1], combination.places)
        write_json(run.path / files[2], combination.describe() | run.mark)

    record = {"ranks": list(combination.ranks), "places": combination.places, "multi": combination.multi}
    run.stage(f"{combination.label}_directions", run.inputs(MEAN_DIFFS, SURVIVORS, **record), files, compute, "")
    if combination.warning:
        run.folder.report(f"warning: {combination.warning}")
    return where


def labelled(combination: Combination, seed: int | None = None) -> Labelled:
    """The ablation of a combination, or of a random span of its rank, under the published label."""
    file, record = f"{combination.label}/directions.pt", {"multi": combination.multi}
    if seed is None:
        return Labelled("ablation", combination.interventions, record, file)
    rank = {"seed": seed, "rank": combination.effective_rank}
    return Labelled(f"random_ablation_{seed}", (combination.random_like(seed),), rank, file)


def evaluate_combination(
    run: RunContext,
    combination: Combination,
    summary: Mapping[str, Any],
    texts: tuple[PromptSet, PromptSet] | None,
) -> dict[str, Any]:
    """Completions and CE loss under the ablation of a combination, beside the run's baselines: `{label}/`.

    The baselines lie in the run folder and are shared by all combinations.

    Args:
        summary: the head of the summary, which is completed and written to `{label}/summary.json`.
        texts: from `loss_sets`; None leaves CE loss out.
    """
    where = save_combination(run, combination)
    controls = [labelled(combination, seed) for seed in range(run.options.n_random)]
    found: dict[str, Any] = {**summary, "combination": combination.describe() | {"directions": combination.places}}
    if "completions" in run.options.steps:
        ablation = labelled(combination)
        found["completions"] = {
            "harmful": rates(run, "harmful", [ablation, *controls], where),
            "harmless": rates(run, "harmless", [ablation], where),
        }
    if texts is not None:
        scored = loss_texts(run, texts)
        found["ce_loss"] = {"baseline": losses(run, BASELINE, scored)} | {
            each.label: losses(run, each, scored, where) for each in (labelled(combination), *controls)
        }
    found |= {"status": "done", "seconds": run.folder.seconds()}
    write_json(run.path / where / "summary.json", found)
    return found


N_BEST = 5
NONE_SURVIVE = "no candidate survives"
TIE_NATS = 0.01
"""Bypass scores closer than this are a tie, which CE loss decides."""


@dataclass(frozen=True)
class CombosOptions:
    """What is combined, and how it is judged."""

    ranks: tuple[int, ...] | None = None
    """None: the five best, or as many as survive."""
    max_size: int = 2
    kl_max: float | None = 0.1
    """Largest mean KL on harmless validation prompts (nats) of a winner; equality passes; None is no limit."""
    n_random: int = 3
    """Random spans of the winner's rank."""
    n_ce: int = 256
    """At most this many texts of each CE set."""
    val_new_tokens: int = 32
    """Length of the validation answers."""

    def __post_init__(self) -> None:
        for name in ("max_size", "n_ce", "val_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.kl_max is not None and not 0 <= self.kl_max < math.inf:
            raise UserError(f"kl_max must be a number from 0 on, not {self.kl_max}")
        if self.ranks is not None and len(set(self.ranks)) < len(self.ranks):
            raise UserError("a rank was given twice")


def run_combos(
    model: HookedModel, source: str, options: RunOptions, folder: RunFolder, combos: CombosOptions
) -> dict[str, Any]:
    """Ablate every single direction and every combination on validation prompts; test the winner on held-out ones.

    The winner has the lowest bypass score among those with KL ≤ `kl_max`; of those within 0.01 nats of it, the one
    with the lowest CE loss on plain text. Choosing the best of many on the prompts that it is reported on would
    overstate it. Returns what `combos.json` holds; the search is the run's own.
    """
    run = RunContext(model, source, options, folder)
    texts = loss_sets(options)
    head = record_run(run)
    grid = find_directions(run)
    chosen = choose_direction(run, grid, score_directions(run, grid))
    if not chosen.survivors and combos.ranks is None:
        reason = {"explanation": chosen.explain(), "options": asdict(combos)}
        return _finish(run, {"model": head["model"], "quick": options.quick, **reason}, NONE_SURVIVE)
    ranks = combos.ranks or tuple(range(min(N_BEST, len(chosen.survivors))))
    by_rank = dict(zip(ranks, ranked(grid, chosen, ranks), strict=True))
    validation = _Validation(run, combos, loss_texts(run, texts, own_answers=False))
    found: dict[str, Any] = {
        "model": head["model"],
        "quick": options.quick,
        "options": asdict(combos),
        "text_set": validation.text_set,
        "n_validation": {"harmful": len(validation.harmful), "harmless": len(validation.harmless)},
        "baseline": validation.row("baseline", ()),
        "combinations": [],
        "skipped": [],
    }
    there: dict[str, Combination] = {}
    for members in _members(ranks, combos.max_size):
        try:
            each = combine(members, [by_rank[rank] for rank in members])
        except UserError as error:
            found["skipped"].append({"ranks": list(members), "reason": str(error)})
            continue
        there[each.label] = each
        row = validation.row(each.label, each.interventions)
        found["combinations"].append(each.describe() | {"directions": each.places} | row)
        if each.warning:
            folder.report(f"warning: {each.warning}")
    winner = choose(found["combinations"], combos.kl_max, validation.text_set)
    single = choose(
        [row for row in found["combinations"] if len(row["ranks"]) == 1], combos.kl_max, validation.text_set
    )
    if winner is None:
        return _finish(run, found, f"no combination has a KL of at most {combos.kl_max} nats")
    best = there[winner["label"]]
    randoms = [(f"{best.label}_random_{seed}", best.random_like(seed)) for seed in range(combos.n_random)]
    found["random"] = [validation.row(label, (control,)) for label, control in randoms]
    found |= {"winner": winner["label"], "single_best": single["label"] if single else None}
    found["test"] = _test(run, best, there[single["label"]] if single else None, combos.n_random)
    return _finish(run, found, "done")


def choose(rows: Sequence[Mapping[str, Any]], kl_max: float | None, text_set: str) -> Mapping[str, Any] | None:
    """The row with the lowest bypass score among those with KL ≤ `kl_max`; ties by CE loss on `text_set`."""
    passing = [row for row in rows if kl_max is None or row["kl_nats"] <= kl_max]
    if not passing:
        return None
    lowest = min(row["bypass"] for row in passing)
    tied = [row for row in passing if row["bypass"] <= lowest + TIE_NATS]
    return min(tied, key=lambda row: row["ce_loss"][text_set]["ce_loss"])


class _Validation:
    """Scores, short answers and CE loss under an intervention, one stage each: `combos/{label}.json`."""

    def __init__(self, run: RunContext, options: CombosOptions, texts: Mapping[str, Sequence[ScoredText]]) -> None:
        self.run, self.options = run, options
        self.harmful, self.harmless = run.kept("harmful", "val"), run.kept("harmless", "val")
        self.tokens = [token["id"] for token in run.prompts["refusal_tokens"]]
        self.texts = {name: scored[: options.n_ce] for name, scored in texts.items()}
        self.text_set = next(iter(self.texts))

    @cached_property
    def plain(self) -> Float[Tensor, "prompt d_vocab"]:
        return self._logits(())

    def row(self, label: str, interventions: Sequence[Intervention]) -> dict[str, Any]:
        """What `combos/{label}.json` holds."""
        path = f"combos/{label}.json"
        files = ["prompts.json", *([MEAN_DIFFS, SURVIVORS] if interventions else [])]
        inputs = self.run.inputs(
            *files, label=label, texts=texts_sha256(self.texts), val_new_tokens=self.options.val_new_tokens
        )
        n_prompts = len(self.harmful) + len(self.harmless)
        about = f"{n_prompts} prompts, {len(self.harmful)} short answers, {sum(map(len, self.texts.values()))} texts"
        write = lambda: write_json(self.run.path / path, self._measure(label, interventions) | self.run.mark)  # noqa: E731
        self.run.stage(f"combos_{label}", inputs, [path], write, about)
        return read_json(self.run.path / path)

    def _measure(self, label: str, interventions: Sequence[Intervention]) -> dict[str, Any]:
        n, logits = len(self.harmful), self._logits(interventions)
        mean, low, high = mean_interval(refusal_score(logits[:n], self.tokens).tolist())
        verdicts = evaluate(self._answers(label, interventions), SubstringJudge())
        return {
            "label": label,
            "bypass": mean,
            "bypass_interval": [low, high],
            "kl_nats": kl_nats(self.plain[n:], logits[n:]).mean().item(),
            "refusal": verdicts["refusal_rate"],
            "degenerate": verdicts["degenerate_rate"],
            "ce_loss": {name: self._loss(texts, interventions).describe() for name, texts in self.texts.items()},
        }

    def _logits(self, interventions: Sequence[Intervention]) -> Float[Tensor, "prompt d_vocab"]:
        prompts, run = [*self.harmful, *self.harmless], self.run
        return run.batched(
            lambda size: next_token_logits(run.model, run.chat, prompts, interventions=interventions, batch_size=size)
        )

    def _answers(self, label: str, interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
        run = self.run

        def answer(batch_size: int) -> list[Generated]:
            return generate(
                run.model,
                run.chat,
                self.harmful,
                interventions=interventions,
                max_new_tokens=self.options.val_new_tokens,
                batch_size=batch_size,
                description=f"validation, {label}",
            )

        pairs = zip(self.harmful, run.batched(answer), strict=True)
        return [{"category": None, "prompt": prompt, "response": found.text} for prompt, found in pairs]

    def _loss(self, texts: Sequence[ScoredText], interventions: Sequence[Intervention]) -> LossResult:
        run = self.run
        return run.batched(
            lambda size: ce_loss(
                run.model, run.chat, texts, interventions=interventions, batch_size=run.loss_batch(size)
            )
        )


def _test(run: RunContext, winner: Combination, single: Combination | None, n_random: int) -> dict[str, Any]:
    """Refusal on held-out prompts: plain, winner, best single direction, random spans, and winner minus single."""
    controls = [labelled(winner, seed) for seed in range(n_random)]
    found = rates(run, "harmful", [labelled(winner), *controls], save_combination(run, winner))
    test = {
        "set": found["set"],
        "n": found["n"],
        "baseline": found["baseline"],
        "winner": found["ablation"],
        "random": [found[control.label] for control in controls],
    }
    if single is None:
        return test
    where = save_combination(run, single)
    test["single_best"] = rates(run, "harmful", [labelled(single)], where)["ablation"]
    return test | {"winner_minus_single": _difference(_refused(run, winner), _refused(run, single))}


def _refused(run: RunContext, combination: Combination) -> list[bool]:
    name = f"{combination.label}/completions/{run.test('harmful').name}_ablation_evaluations.json"
    key = f"is_jailbreak_{SubstringJudge.name}"
    return [not row[key] for row in read_json(run.path / name)["completions"]]


def _difference(of: Sequence[bool], against: Sequence[bool]) -> dict[str, float]:
    """Difference of two rates on the same prompts, with the 95% interval of Agresti and Min (2005).

    Its half prompt more in each discordant cell keeps a width where the two never differ.
    """
    n = len(of)
    more = sum(a and not b for a, b in zip(of, against, strict=True))
    less = sum(b and not a for a, b in zip(of, against, strict=True))
    center = (more - less) / (n + 2)
    half = 1.96 * math.sqrt((more + less + 1) - (more - less) ** 2 / (n + 2)) / (n + 2)
    return {"refusal_rate": (more - less) / n, "low": max(-1.0, center - half), "high": min(1.0, center + half)}


def _members(ranks: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """Singles first, then pairs, and so on, each with its ranks in order."""
    for size in range(1, min(max_size, len(ranks)) + 1):
        yield from combinations(sorted(ranks), size)


def _finish(run: RunContext, found: Mapping[str, Any], status: str) -> dict[str, Any]:
    finished = {**found, "status": status, "seconds": run.folder.seconds()}
    write_json(run.path / "combos.json", finished)
    return finished
