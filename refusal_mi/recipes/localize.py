"""The least intervention of a finished run: searched and chosen on validation prompts, measured on held-out ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..engine.jobs import Engine
from ..errors import UserError
from ..files import read_record, write_record
from ..generation import generate
from ..interventions import Ablate
from ..judges.substring import SubstringJudge, is_degenerate
from ..measures import RefusalTokens
from ..model.points import Component, HookedModel, write_hooks
from ..model.provenance import ModelRecord
from ..progress import track
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.record import RUN, RunInfo
from ..search.grid import select
from ..search.localize import Localized, Measured, localize_removal, map_writes
from ..search.passes import Weights
from ..search.removals import Removal, RemovalScorer, complement
from ..stats import Paired, Rate, bootstrap_interval, mean_interval, ratio_of_means
from ..text.chat import ChatFormat
from ..values import Value, frame

FILE, DIRECTION_FILE = "localize.json", "direction.pt"
KL_TOKENS, N_DIRECTIONS, N_VERIFIED, N_RANDOM, NEW_TOKENS = 1, 4, 3, 5, 64


@dataclass(frozen=True, eq=False, repr=False)
class RemovalRow(Value):
    """A removal and what it does on validation prompts, without generating."""

    first: int
    last: int
    """Blocks [first, last)."""
    components: tuple[Component, ...]
    strength: float
    shape: str
    floor: float
    direction_layer: int
    direction_position: int | None
    refused: float
    """Share of harmful prompts to be expected above the zero point."""
    score_nats: float
    kl_nats: float
    n_refused_text: int | None = None
    """Refused answers, of those removals whose answers were read."""

    @property
    def label(self) -> str:
        """In words."""
        shape = "" if self.shape == "flat" else f" (peak; {self.floor:.3g} at the ends)"
        return f"{self.first}:{self.last} {'+'.join(self.components)} × {self.strength:.3g}{shape}"


@dataclass(frozen=True, eq=False, repr=False)
class HeldOut(Value):
    """What an intervention does on held-out prompts."""

    label: str
    """plain, whole, least, complement, random 0, ..."""
    refused_by_score: Rate
    kl_nats: tuple[float, float, float]
    """Mean over harmless prompts with its 95% interval."""
    refused_by_text: Rate | None = None
    degenerate: Rate | None = None


@dataclass(frozen=True, eq=False, repr=False)
class WriteRow(Value):
    """What the whole direction does where one write alone loses it, on a few validation prompts."""

    hook: str
    score_nats: float
    kl_nats: float


@dataclass(frozen=True, eq=False, repr=False)
class LeastIntervention(Value):
    """`localize.json`."""

    model: ModelRecord
    n_layers: int
    kl_tokens: int
    zero_point_nats: float
    n_tried: int
    n_validation: int
    plain_score_nats: float
    """Of the plain model on the prompts of `writes`."""
    whole: RemovalRow
    """All writes."""
    least: RemovalRow
    measured: tuple[RemovalRow, ...]
    """All that were measured on all validation prompts, best first."""
    front: tuple[RemovalRow, ...]
    """Those that none beats in refusals and KL both."""
    writes: tuple[WriteRow, ...]
    held_out: tuple[HeldOut, ...]
    text_change: dict[str, float | int]
    """Refused answers under the least removal minus under the whole ablation, the same prompts; interval, exact p."""
    kl_ratio: tuple[float | None, float | None, float | None]
    """KL of the least removal over that of the whole ablation, held-out, with its 95% interval."""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "LeastIntervention":
        """Read `localize.json`, or the one in this folder."""
        path = Path(path)
        return read_record(path / FILE if path.is_dir() else path, cls)

    def row(self, label: str) -> HeldOut:
        """What was measured of one intervention on held-out prompts."""
        return next(each for each in self.held_out if each.label == label)

    def to_frame(self) -> Any:
        """A pandas table of `measured`."""
        return frame([{"label": each.label, "refused": each.refused, "kl": each.kl_nats} for each in self.measured])


def localize(
    run: RunInputs,
    *,
    kl_tokens: int = KL_TOKENS,
    n_directions: int = N_DIRECTIONS,
    n_random: int = N_RANDOM,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int | None = None,
    output_dir: Path | None = None,
    engine: Engine | None = None,
) -> tuple[LeastIntervention, Ablate]:
    """Find the removal of a run's direction with the least KL that stops as many refusals as ablating it whole.

    The search reads scores and KL of validation prompts (`localize_removal`). Of the best flat ones the answers to
    these prompts are judged, and the first whose answers refuse no more often than those of the whole ablation is
    taken. It is then measured once on held-out prompts, beside the plain model, the whole ablation, its complement
    (everything except what it touches) and random directions removed from the same writes.

    Args:
        kl_tokens: over how many tokens of the plain model's answers the KL goes.
        n_directions: source directions: the chosen one, then survivors of other layers and means of neighbours.
        batch_size: most rows in a pass.
        output_dir: where `localize.json` and the direction go; None writes nothing.
        engine: where removals are measured and answers written; None is here.

    Returns:
        What was measured, and the removal as an ordinary `Ablate`.

    Raises:
        UserError: the run chose no direction, or has no prompts left.
    """
    if kl_tokens < 1:
        raise UserError(f"--kl-tokens must be at least 1, not {kl_tokens}")
    n_layers, zero = run.model.cfg.n_layers, run.record.zero_point_nats or 0.0
    scorer = removal_scorer(run, "val", kl_tokens, batch_size, engine)
    sources = source_directions(run, n_directions)
    found = localize_removal(scorer, sources, zero, engine=engine)
    plain, *mapped = map_writes(scorer, run.direction, engine)
    texts = judged_answers(run, run.prompts("harmful", "val"), max_new_tokens, engine)
    least, counts = _verified(found, texts)
    rows = _held_out(run, found, least, kl_tokens, n_random, max_new_tokens, batch_size, engine)
    by_text = {label: texts for label, _, _, texts in rows if texts is not None}
    kl = {label: values.tolist() for label, _, values, _ in rows}
    record = LeastIntervention(
        read_record(run.path / RUN, RunInfo).model,
        n_layers,
        kl_tokens,
        zero,
        found.n_tried,
        scorer.n_harmful,
        plain,
        _row(found.whole, zero, counts),
        _row(least, zero, counts),
        tuple(_row(each, zero, counts) for each in found.measured),
        tuple(_row(each, zero, counts) for each in found.front),
        tuple(WriteRow(*each) for each in zip(write_hooks(n_layers), *(row.tolist() for row in mapped), strict=True)),
        tuple(_held_out_row(*each, zero) for each in rows),
        Paired.of(by_text["whole"].refused, by_text["least"].refused).describe(),
        _finite(bootstrap_interval(kl["least"], kl["whole"], statistic=ratio_of_means)),
        {"n_directions": n_directions, "max_new_tokens": max_new_tokens, "n_random": n_random},
    )
    if output_dir is not None:
        least.removal.direction.save(output_dir / DIRECTION_FILE)
        write_record(output_dir / FILE, record)
    return record, least.removal.interventions[0]


def source_directions(run: RunInputs, n: int) -> list[Direction]:
    """The chosen direction; survivors of other layers, best first; means of it and its neighbours' at its position."""
    chosen, found = run.direction, [run.direction]
    layers = {chosen.layer}
    for row in select(run.scores, run.options.thresholds).survivors:
        if row.layer not in layers:
            layers.add(row.layer)
            found.append(run.grid.direction(row.position, row.layer))
    between = [_between(chosen, run.grid, chosen.layer + step) for step in (-1, 1)]
    found = [found[0], *[each for each in between if each is not None][: max(0, n - 2)], *found[1:]]
    return found[: max(1, n)]


def _between(chosen: Direction, grid: Any, layer: int) -> Direction | None:
    """The mean of two unit directions of neighbouring layers, of the chosen one's norm."""
    position = chosen.position
    if position is None or not 0 <= layer < grid.n_layers:
        return None
    if grid.is_degenerate[grid.positions.index(position)][layer]:
        return None
    mean = chosen.unit + grid.direction(position, layer).unit
    vector = (mean * (chosen.norm / mean.norm())).to(chosen.vector.dtype)
    made = {"method": "interpolated", "layers": [chosen.layer, layer]}
    return replace(chosen, vector=vector, provenance={**chosen.provenance, **made})


def removal_scorer(
    run: RunInputs, part: str, kl_tokens: int, batch_size: int | None, engine: Engine | None = None
) -> RemovalScorer:
    """A scorer of a part of a run's prompts: "train", "val" or "test"."""
    harmful, harmless = (run.prompts(side, part) for side in SIDES)
    return scorer_of(run.model, run.chat, harmful, harmless, run.refusal_prefixes, kl_tokens, batch_size, engine)


def scorer_of(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    tokens: RefusalTokens,
    kl_tokens: int,
    batch_size: int | None,
    engine: Engine | None = None,
) -> RemovalScorer:
    """A scorer of these prompts, whose KL goes over so many tokens of the plain model's answers."""
    answers: list[tuple[int, ...]] = []
    if kl_tokens > 1:
        how = {"max_new_tokens": kl_tokens, "description": "plain answers", "engine": engine}
        answers = [each.token_ids for each in generate(model, chat, list(harmless), **how)]  # type: ignore[arg-type]
    how = {"answers": answers, "n_kl": kl_tokens, "batch_size": batch_size}
    return RemovalScorer(model, chat, list(harmful), list(harmless), tokens, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Judged:
    """Answers, judged one by one."""

    refused: tuple[bool, ...]
    degenerate: tuple[bool, ...]


def judged_answers(
    run: RunInputs, prompts: Sequence[str], max_new_tokens: int, engine: Engine | None = None
) -> Callable[[Sequence[Ablate]], Judged]:
    """A function that reads the answers to these prompts under interventions."""
    return partial(judged, run.model, run.chat, prompts, max_new_tokens, run.batch_size, engine)


def judged(
    model: HookedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    engine: Engine | None,
    interventions: Sequence[Ablate],
) -> Judged:
    """What a judge of substrings says of the answers to these prompts under interventions."""
    how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "description": "answers", "engine": engine}
    answers = generate(model, chat, list(prompts), interventions=interventions, **how)  # type: ignore[arg-type]
    texts = [each.text for each in answers]
    complied = SubstringJudge().complied(list(prompts), texts)
    return Judged(tuple(not each for each in complied), tuple(map(is_degenerate, texts)))


def _verified(found: Localized, texts: Callable[[Sequence[Ablate]], Judged]) -> tuple[Measured, dict[int, int]]:
    """The first of the best flat removals whose answers refuse no more often than the whole ablation's."""
    counts = {id(found.whole): sum(texts(found.whole.removal.interventions).refused)}
    for each in [one for one in found.measured if one.removal.shape == "flat"][:N_VERIFIED]:
        counts[id(each)] = sum(texts(each.removal.interventions).refused)
        if counts[id(each)] <= counts[id(found.whole)]:
            return each, counts
    return found.whole, counts


def _row(each: Measured, zero_point: float, counts: dict[int, int]) -> RemovalRow:
    removal = each.removal
    return RemovalRow(
        removal.first,
        removal.last,
        removal.components,
        removal.strength,
        removal.shape,
        removal.floor,
        removal.direction.layer,
        removal.direction.position,
        each.refused(zero_point),
        each.scores.mean().item(),
        each.mean_kl,
        counts.get(id(each)),
    )


_Rows = list[tuple[str, Float[Tensor, " harmful"], Float[Tensor, " harmless"], Judged | None]]


def _held_out(
    run: RunInputs,
    found: Localized,
    least: Measured,
    kl_tokens: int,
    n_random: int,
    max_new_tokens: int,
    batch_size: int | None,
    engine: Engine | None,
) -> _Rows:
    """Scores, KL and, of all but the later random ones, judged answers; the only use of the held-out prompts."""
    n_layers, removal = run.model.cfg.n_layers, least.removal
    scorer = removal_scorer(run, "test", kl_tokens, batch_size, engine)
    texts = judged_answers(run, run.prompts("harmful"), max_new_tokens, engine)
    everything = found.whole.removal
    named: list[tuple[str, Direction, Weights, Sequence[Ablate] | None]] = [
        ("plain", everything.direction, {}, ()),
        ("whole", everything.direction, everything.weights(n_layers), everything.interventions),
        ("least", removal.direction, removal.weights(n_layers), removal.interventions),
        ("complement", removal.direction, complement(removal, n_layers), _complement_steps(removal, n_layers)),
    ]
    for seed in range(n_random):
        other = replace(removal, direction=removal.direction.random_like(seed))
        read = other.interventions if seed == 0 else None
        named.append((f"random {seed}", other.direction, other.weights(n_layers), read))
    directions, weights = [each[1] for each in named], [each[2] for each in named]
    n, n_all = len(named), max(scorer.n_harmful, scorer.n_harmless)
    scores, kl = scorer.measure(directions, weights, n_all, about="held-out scores", engine=engine, at_once=n)
    rows: _Rows = []
    for (label, _, _, steps), score, cost in track(list(zip(named, scores, kl, strict=True)), "held-out prompts"):
        rows.append((label, score, cost, None if steps is None else texts(steps)))
    return rows


def _complement_steps(removal: Removal, n_layers: int) -> list[Ablate]:
    """`complement` as ablations: the other blocks whole, the same blocks' other components."""
    inside = list(removal.strengths())
    outside = [block for block in range(n_layers) if block not in inside]
    others: tuple[Component, ...] = tuple(part for part in ("embed", "attn", "mlp") if part not in removal.components)
    steps = [Ablate(removal.direction, layers=outside)] if outside else []
    return [*steps, Ablate(removal.direction, layers=inside, components=others)] if others else steps


def _held_out_row(
    label: str, scores: Float[Tensor, " harmful"], kl: Float[Tensor, " harmless"], texts: Judged | None, zero: float
) -> HeldOut:
    return HeldOut(
        label,
        Rate.of([score > zero for score in scores.tolist()]),
        mean_interval(kl.tolist()),
        None if texts is None else Rate.of(texts.refused),
        None if texts is None else Rate.of(texts.degenerate),
    )


def _finite(values: tuple[float, float, float]) -> tuple[float | None, float | None, float | None]:
    value, low, high = (each if math.isfinite(each) else None for each in values)
    return value, low, high
