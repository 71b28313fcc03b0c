"""Several directions ablated together: their span, what ablating it does, and which together do more than one."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import torch

from ..directions import Direction, cosine
from ..engine.jobs import Engine
from ..errors import UserError
from ..files import as_json, read_record, write_json, write_record, write_tensors
from ..interventions import Ablate, AblateInTurn, Intervention
from ..measures import ScoredText
from ..model.points import HookedModel
from ..options import check_choice
from ..run.answers import Evaluation, Side, SideEffects
from ..run.combos import CombinationRow, CombosResult, CombosTest, Difference, Skipped, ValidationRow
from ..run.folder import ranked
from ..run.options import CombosOptions, RunOptions
from ..run.record import (
    DOES_NOT_REFUSE,
    MEAN_DIFFS,
    PLACES,
    PROMPTS,
    SPAN,
    SUMMARY,
    SURVIVORS,
    CombinationRecord,
    Place,
    RunSummary,
)
from ..run.stages import RunFolder
from ..stats import Paired
from ..text.prompts import PromptSet
from .arms import Arm, Validating
from .context import Prepared, RunContext
from .effects import BASELINE, Labelled, loss_sets, loss_texts, losses, rates, texts_sha256
from .pieces import Piece, Pieces
from .prompts import prepare
from .search import choose_direction, find_directions, record_run, score_directions

Multi = Literal["span", "sequential"]
"""How several directions are ablated. "span" leaves nothing of any of them. "sequential", the published way, projects
them out one after the other at every block's input and at every write (`AblateInTurn`): the order matters, some of the
first one stays (of ranks 0 and 2 of the embedded model 3–8% of its size on harmful prompts, at the blocks from its own
layer on), and no edited weights do the same."""


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
        return (self.span if self.multi == "span" else AblateInTurn(self.directions),)

    @property
    def effective_rank(self) -> int:
        """Dimensions that ablating the span removes."""
        return len(self.span.basis)

    @property
    def places(self) -> tuple[Place, ...]:
        """Position and layer of every direction."""
        return tuple(Place(direction.position, direction.layer) for direction in self.directions)

    def random_like(self, seed: int) -> Ablate:
        """The ablation of a random span of the same rank: the control for every effect of this one."""
        seeds = range(seed * self.effective_rank, (seed + 1) * self.effective_rank)
        return Ablate([self.directions[0].random_like(each) for each in seeds])

    def record(self) -> CombinationRecord:
        """Ranks, places, hook points, effective rank, relative singular values and cosines."""
        singular = torch.linalg.svdvals(self.span.units)
        return CombinationRecord(
            self.label,
            self.ranks,
            self.multi,
            tuple(direction.hook_name for direction in self.directions),
            tuple(direction.norm for direction in self.directions),
            self.effective_rank,
            tuple((singular / singular[0]).tolist()),
            tuple(tuple(cosine(a, b) for b in self.directions) for a in self.directions),
            self.warning,
            self.places,
        )


def combine(ranks: Sequence[int], directions: Sequence[Direction], multi: Multi = "span") -> Combination:
    """The combination of `directions`, which hold these ranks.

    Examples:
        >>> combine((0, 2), [direction, other]).label
        '0-2'

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
    check_choice("--multi", multi, get_args(Multi))


def save_combination(run: Prepared, combination: Combination) -> str:
    """Write `{label}/directions.pt`, `directions_metadata.json` and `directions_span.json`; return the folder."""
    where = f"{combination.label}/"
    files = [f"{where}directions.pt", f"{where}{PLACES}", f"{where}{SPAN}"]

    def compute() -> None:
        write_tensors(run.path / files[0], [direction.vector for direction in combination.directions])
        write_json(run.path / files[1], combination.places)
        span = as_json(combination.record())
        del span["directions"]  # they are the published file beside it
        write_json(run.path / files[2], span | run.mark)

    record = {"ranks": list(combination.ranks), "places": combination.places, "multi": combination.multi}
    run.stage(f"{combination.label}_directions", run.inputs(MEAN_DIFFS, SURVIVORS, **record), files, compute, "")
    if combination.warning:
        run.folder.report(f"warning: {combination.warning}")
    return where


def labelled(combination: Combination, seed: int | None = None) -> Labelled:
    """The ablation of a combination, or of a random span of its rank, under the published label."""
    file, record = f"{combination.label}/directions.pt", dict[str, str](multi=combination.multi)
    if combination.multi == "sequential":
        record["sites"] = "block inputs, attention, MLP"
    if seed is None:
        return Labelled("ablation", combination.interventions, record, file)
    rank = {"seed": seed, "rank": combination.effective_rank}
    return Labelled(f"random_ablation_{seed}", (combination.random_like(seed),), rank, file)


def evaluate_combination(
    run: Prepared,
    combination: Combination,
    summary: RunSummary,
    texts: tuple[PromptSet, PromptSet] | None,
) -> RunSummary:
    """Completions and CE loss under the ablation of a combination, beside the run's baselines: `{label}/`.

    The baselines lie in the run folder and are shared by all combinations.

    Args:
        summary: the head of the summary, which is completed and written to `{label}/summary.json`.
        texts: from `loss_sets`; None leaves CE loss out.
    """
    where = save_combination(run, combination)
    ablation = labelled(combination)
    controls = [labelled(combination, seed) for seed in range(run.options.n_random)]
    summary = replace(summary, combination=combination.record(), status="done")
    if "completions" in run.options.steps:
        effects: dict[Side, SideEffects] = {
            "harmful": rates(run, "harmful", [ablation, *controls], where),
            "harmless": rates(run, "harmless", [ablation], where),
        }
        summary = replace(summary, completions=effects)
    if texts is not None and (scored := loss_texts(run, texts)):
        by_label = {each.label: losses(run, each, scored, where) for each in (ablation, *controls)}
        summary = replace(summary, ce_loss={"baseline": losses(run, BASELINE, scored), **by_label})
    summary = replace(summary, seconds=run.folder.seconds())
    write_record(run.path / where / SUMMARY, summary)
    return summary


N_BEST = 5
NONE_SURVIVE = "no candidate survives"
TIE_NATS = 0.01
"""Bypass scores closer than this are a tie, which CE loss decides."""


def run_combos(
    model: HookedModel,
    source: str,
    options: RunOptions,
    folder: RunFolder,
    combos: CombosOptions,
    engine: Engine | None = None,
) -> CombosResult:
    """Ablate every single direction and every combination on validation prompts; test the winner on held-out ones.

    The winner has the lowest bypass score among those with KL ≤ `kl_max`; of those within 0.01 nats of it, the one
    with the lowest CE loss on plain text. Choosing the best of many on the prompts that it is reported on would
    overstate it. Returns what `combos.json` holds; the search is the run's own.

    Args:
        engine: where combinations are measured, candidates scored, answers written and losses read; None is here.
    """
    sets = loss_sets(options)
    run = prepare(RunContext.start(model, source, options, folder, engine))
    texts = loss_texts(run, sets, own_answers=False)
    if not texts:
        raise UserError("combos decides ties by CE loss, and neither the run's text set nor its answers can be scored")
    record_run(run)
    if not run.prompts.refuses:
        rate = run.prompts.refused("harmful")
        explanation = f"it refuses {rate} of the harmful prompts"
        return _finish(run, CombosResult(run.model_record, options.quick, DOES_NOT_REFUSE, combos, explanation))
    grid = find_directions(run)
    chosen = choose_direction(run, grid, score_directions(run, grid))
    result = CombosResult(run.model_record, options.quick, NONE_SURVIVE, combos)
    if not chosen.survivors and combos.ranks is None:
        return _finish(run, replace(result, explanation=chosen.explain()))
    ranks = combos.ranks or tuple(range(min(N_BEST, len(chosen.survivors))))
    by_rank = dict(zip(ranks, ranked(grid, chosen, ranks), strict=True))
    validation = _Validation(run, combos, texts)
    there: dict[str, Combination] = {}
    skipped: list[Skipped] = []
    for members in _members(ranks, combos.max_size):
        try:
            each = combine(members, [by_rank[rank] for rank in members])
        except UserError as error:
            skipped.append(Skipped(members, str(error)))
            continue
        there[each.label] = each
    arms = [Arm(each.label, each.interventions) for each in there.values()]
    baseline, *measured = validation.rows([Arm("baseline"), *arms])
    rows = [CombinationRow(each.record(), row) for each, row in zip(there.values(), measured, strict=True)]
    for each in there.values():
        if each.warning:
            folder.report(f"warning: {each.warning}")
    result = replace(
        result,
        text_set=validation.text_set,
        n_validation={"harmful": len(validation.job.harmful), "harmless": len(validation.job.harmless)},
        baseline=baseline,
        combinations=tuple(rows),
        skipped=tuple(skipped),
    )
    winner = choose([row.measured for row in rows], combos.kl_max, validation.text_set)
    singles = [row.measured for row in rows if len(row.combination.ranks) == 1]
    single = choose(singles, combos.kl_max, validation.text_set)
    if winner is None:
        return _finish(run, replace(result, status=f"no combination has a KL of at most {combos.kl_max} nats"))
    best = there[winner.label]
    randoms = [Arm(f"{best.label}_random_{seed}", (best.random_like(seed),)) for seed in range(combos.n_random)]
    result = replace(
        result,
        random=tuple(validation.rows(randoms)),
        winner=winner.label,
        single_best=single.label if single else None,
        test=_test(run, best, there[single.label] if single else None, combos.n_random),
        status="done",
    )
    return _finish(run, result)


def choose(rows: Sequence[ValidationRow], kl_max: float | None, text_set: str) -> ValidationRow | None:
    """The row with the lowest bypass score among those with KL ≤ `kl_max`; ties by CE loss on `text_set`."""
    passing = [row for row in rows if kl_max is None or row.kl_nats <= kl_max]
    if not passing:
        return None
    lowest = min(row.bypass for row in passing)
    tied = [row for row in passing if row.bypass <= lowest + TIE_NATS]
    return min(tied, key=lambda row: row.ce_loss[text_set].ce_loss)


class _Validation:
    """Scores, short answers and CE loss under interventions, one stage each: `combos/{label}.json`."""

    def __init__(self, run: Prepared, options: CombosOptions, texts: Mapping[str, Sequence[ScoredText]]) -> None:
        some = {name: tuple(scored[: options.n_ce]) for name, scored in texts.items()}
        self.run, self.text_set = run, next(iter(some))
        self.job = Validating(
            run.chat,
            run.options,
            tuple(run.kept("harmful", "val")),
            tuple(run.kept("harmless", "val")),
            run.prompts.prefixes,
            some,
            options.val_new_tokens,
        )
        self.pieces = Pieces(run.folder, self.job, run.model, run.engine)

    def rows(self, arms: Sequence[Arm]) -> list[ValidationRow]:
        """What `combos/{label}.json` holds, for every label."""
        self.run.hashes |= self.pieces.run([self._piece(arm) for arm in arms])
        return [read_record(self.run.path / f"combos/{arm.label}.json", ValidationRow) for arm in arms]

    def _piece(self, arm: Arm) -> Piece:
        path, job = f"combos/{arm.label}.json", self.job
        files = [PROMPTS, *([MEAN_DIFFS, SURVIVORS] if arm.interventions else [])]
        inputs = self.run.inputs(
            *files, label=arm.label, texts=texts_sha256(job.texts), val_new_tokens=job.val_new_tokens
        )
        inputs |= self.run.options.kl_input
        n_prompts = len(job.harmful) + len(job.harmless)
        about = f"{n_prompts} prompts, {len(job.harmful)} short answers, {sum(map(len, job.texts.values()))} texts"
        write = partial(write_record, self.run.path / path)
        return Piece(f"combos_{arm.label}", inputs, [path], about, lambda: arm, write)


def _test(run: Prepared, winner: Combination, single: Combination | None, n_random: int) -> CombosTest:
    """Refusal on held-out prompts: plain, winner, best single direction, random spans, and winner minus single."""
    controls = [labelled(winner, seed) for seed in range(n_random)]
    side = rates(run, "harmful", [labelled(winner), *controls], save_combination(run, winner))
    baseline, ablated, *random = side.effects
    test = CombosTest(side.set_name, side.n, baseline, ablated, tuple(random))
    if single is None:
        return test
    where = save_combination(run, single)
    alone = rates(run, "harmful", [labelled(single)], where).effects[1]
    gap = rate_difference(_refused(run, winner), _refused(run, single))
    return replace(test, single_best=alone, winner_minus_single=gap)


def _refused(run: Prepared, combination: Combination) -> list[bool]:
    name = f"{combination.label}/completions/{run.test('harmful').name}_ablation_evaluations.json"
    return [answer.is_refused for answer in Evaluation.load(run.path / name).answers]


def rate_difference(of: Sequence[bool], against: Sequence[bool]) -> Difference:
    """Difference of two rates on the same prompts, with its paired 95% interval."""
    paired = Paired.of(against, of)
    return Difference(paired.difference, *paired.interval)


def _members(ranks: Sequence[int], max_size: int) -> Iterator[tuple[int, ...]]:
    """Singles first, then pairs, and so on, each with its ranks in order."""
    for size in range(1, min(max_size, len(ranks)) + 1):
        yield from combinations(sorted(ranks), size)


def _finish(run: Prepared, result: CombosResult) -> CombosResult:
    finished = replace(result, seconds=run.folder.seconds())
    write_record(run.path / "combos.json", finished)
    return finished
