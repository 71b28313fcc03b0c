"""The search: every candidate direction, ablated and added, scored in pure pieces of work."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, DirectionGrid
from ..engine.jobs import Engine
from ..errors import UserError
from ..measures import RefusalPrefixes, RefusalTokens, kl_nats
from ..model.points import HookedModel, check_raw_basis
from ..model.running import check_fits
from ..options import KLFormula
from ..progress import track
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import check_named
from .block_passes import BlockPasses, passes_for
from .grid import ScoreGrid, finite_mean, median_of
from .passes import Passes, PlainPasses
from .thresholds import CandidateScore, layer_limit

Kind = Literal["ablate", "add"]
Place = tuple[int, int]
"""A candidate: its position and layer."""
ITEM_ROWS = 512
"""Most rows (candidates × prompts) in an item: what bounds the logits that are held at once."""


@dataclass(frozen=True)
class WorkItem:
    """Candidates to be scored on prompts. Nothing is drawn at random: the same item gives the same numbers anywhere."""

    kind: Kind
    """"ablate": refusal score of harmful prompts, KL of harmless ones; "add": refusal score of harmless prompts."""
    candidates: tuple[Place, ...]
    """For "add" all of one layer, unless weights lie on disk."""
    prompts: tuple[int, ...]
    """Harmful validation prompts are 0 .. n − 1, harmless ones follow."""

    def cost(self, n_layers: int) -> float:
        """The work in runs of one prompt through the whole model; an addition starts at its own layer."""
        shares = [1 - layer / n_layers if self.kind == "add" else 1.0 for _, layer in self.candidates]
        return len(self.prompts) * sum(shares)

    def __str__(self) -> str:
        some = f"{len(self.candidates)} candidates from {self.candidates[0]}" if self.candidates else "no candidates"
        return f"{self.kind} {some} on {len(self.prompts)} prompts"

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "WorkItem":
        """Read what `describe` gave, from JSON."""
        return cls(record["kind"], tuple((p, layer) for p, layer in record["candidates"]), tuple(record["prompts"]))


def cut(
    kind: Kind,
    candidates: Sequence[Place],
    prompts: Sequence[int],
    n_rows: int = ITEM_ROWS,
    *,
    of_one_layer: bool = True,
) -> Iterator[WorkItem]:
    """Items of at most `n_rows` rows that together score every candidate on every prompt.

    Args:
        of_one_layer: whether the additions of an item are.
    """
    groups: dict[int, list[Place]] = {}
    for place in candidates:
        groups.setdefault(place[1] if kind == "add" and of_one_layer else 0, []).append(place)
    at_once = max(1, n_rows // max(1, len(prompts)))
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), at_once):
            yield WorkItem(kind, tuple(group[start : start + at_once]), tuple(prompts))


class Scorer:
    """Runs items for one model, one grid of candidates and one set of validation prompts; an engine's `Job`.

    An item's numbers do not depend on what ran before it: the plain model runs all harmless prompts at once.
    """

    rows_in_memory: int | None = None
    """Where weights lie on disk, each item reads all of them: how large it may be instead, and of several layers."""

    def __init__(
        self,
        model: HookedModel,
        chat: ChatFormat,
        grid: DirectionGrid,
        harmful: Prompts,
        harmless: Prompts,
        token_sets: Sequence[RefusalTokens],
        *,
        kl_formula: KLFormula = "exact",
        batch_size: int | None = None,
        share_work: bool = True,
    ) -> None:
        grid.check_all_layers()
        check_raw_basis(model)
        check_named("kl_formula", kl_formula, get_args(KLFormula))
        harmful, harmless = as_prompts(harmful), as_prompts(harmless)
        if not harmful or not harmless:
            raise UserError(
                f"the sweep needs prompts on both sides, not {len(harmful)} harmful, {len(harmless)} harmless"
            )
        self.model, self.kl_formula = model, kl_formula
        parts = {"chat": chat, "grid": grid, "harmful": list(harmful), "harmless": list(harmless)}
        how = {"token_sets": list(token_sets), "kl_formula": kl_formula, "share_work": share_work}
        self._again: Callable[[HookedModel], Scorer] = partial(Scorer, **parts, **how, batch_size=batch_size)  # type: ignore[arg-type]
        self.grid, self.token_sets = grid, [RefusalPrefixes.of(tokens) for tokens in token_sets]
        self.contexts = sorted({each for tokens in self.token_sets for each in tokens.contexts}, key=len)
        self.n_harmful, self.n_prompts = len(harmful), len(harmful) + len(harmless)
        prompts = chat.encode_all([*harmful, *harmless])
        rows = [[*prompt, *context] for context in self.contexts for prompt in prompts]
        check_fits(model, rows)
        self.passes: Passes = (passes_for if share_work else PlainPasses)(model, rows, chat.pad_id, batch_size)
        if isinstance(self.passes, BlockPasses):
            self.rows_in_memory = max(1, self.passes.most_rows // len(self.contexts))

    def cut(
        self, kind: Kind, candidates: Sequence[Place], prompts: Sequence[int], n_rows: int = ITEM_ROWS
    ) -> Iterator[WorkItem]:
        """`cut`, as this model is run best."""
        if self.rows_in_memory is None:
            return cut(kind, candidates, prompts, n_rows)
        return cut(kind, candidates, prompts, self.rows_in_memory, of_one_layer=False)

    def start(self, model: HookedModel) -> Callable[[WorkItem], Tensor]:
        """`run`, for another copy of the model that of a scorer like this one."""
        return (self if model is self.model else self._again(model)).run

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None, "_again": self._again}

    @cached_property
    def baseline(self) -> Float[Tensor, "token_set prompt"]:
        """Refusal score (nats) of every prompt in the plain model."""
        self._remember()
        n_rows = len(self.contexts) * self.n_prompts
        return self._scores(self.passes.plain(range(n_rows)).unflatten(0, (-1, self.n_prompts)))

    def run(self, item: WorkItem) -> Float[Tensor, "token_set candidate prompt"]:
        """The item's scores in nats, on the CPU, float64."""
        directions = [self.grid.direction(*place) for place in item.candidates]
        self._remember()
        is_scored = [item.kind == "add" or prompt < self.n_harmful for prompt in item.prompts]
        scored = [index for index, flag in enumerate(is_scored) if flag]
        compared = [index for index, flag in enumerate(is_scored) if not flag]
        plain = self.passes.plain([item.prompts[index] for index in compared]) if compared else None
        starts = range(self.n_prompts, len(self.contexts) * self.n_prompts, self.n_prompts)
        rows = [*item.prompts, *(start + item.prompts[index] for start in starts for index in scored)]
        measured = torch.empty(len(self.token_sets), len(directions), len(item.prompts), dtype=torch.float64)
        for candidate, logits in enumerate(self._changed(item.kind, directions, rows)):
            first, continued = logits[: len(is_scored)], logits[len(is_scored) :]
            if scored:
                by_context = torch.cat([first[None, scored], continued.unflatten(0, (len(starts), len(scored)))])
                measured[:, candidate, scored] = self._scores(by_context)
            if plain is not None:
                measured[:, candidate, compared] = kl_nats(plain, first[compared], self.kl_formula).cpu()
        return measured

    def _changed(
        self, kind: Kind, directions: Sequence[Direction], rows: Sequence[int]
    ) -> Iterator[Float[Tensor, "prompt d_vocab"]]:
        """Logits of these rows under each direction."""
        if isinstance(self.passes, BlockPasses):
            yield from (self.passes.each_added if kind == "add" else self.passes.each_ablated)(directions, rows)
            return
        at_once = max(1, len(directions) // len(self.contexts))  # every context is as many rows more
        for start in range(0, len(directions), at_once):
            yield from (self.passes.added if kind == "add" else self.passes.ablated)(directions[start:][:at_once], rows)

    def _remember(self) -> None:
        starts = range(0, len(self.contexts) * self.n_prompts, self.n_prompts)
        self.passes.remember([start + prompt for start in starts for prompt in range(self.n_harmful, self.n_prompts)])

    def _scores(self, logits: Float[Tensor, "context prompt d_vocab"]) -> Float[Tensor, "token_set prompt"]:
        rows = [[self.contexts.index(context) for context in tokens.contexts] for tokens in self.token_sets]
        scores = (tokens.score(logits[some]) for tokens, some in zip(self.token_sets, rows, strict=True))
        return torch.stack([each.cpu().double() for each in scores])


__all__ = ["CandidateScore", "ScoreGrid", "ScoreTable", "exact_items", "sweep", "sweep_token_sets"]


def sweep(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: RefusalTokens,
    *,
    prune_layers: float | None = None,
    zero_point: float | None = None,
    kl_formula: KLFormula = "exact",
    batch_size: int | None = None,
    share_work: bool = True,
    engine: Engine | None = None,
) -> ScoreGrid:
    """Score every candidate of `grid` on validation prompts (Arditi et al. 2024, section 2.5 and appendix C).

    Per candidate: harmful and harmless prompts under ablation (bypass, KL), harmless prompts with the candidate
    added (induce). Only the logits after the last position are computed.

    Examples:
        >>> scores = sweep(model, chat, grid, harmful, harmless, [5, 7])
        >>> len(scores.rows) == len(grid.candidates())
        True

    Args:
        harmful: validation instructions that the model refuses.
        harmless: validation instructions that it answers.
        refusal_tokens: token ids of the refusal score, or prefixes of them (`refusal_mi.labels.find_refusal_tokens`).
        prune_layers: leave out the candidates that the rule with this fraction would drop for their layer anyway;
            they have no scores then.
        zero_point: the refusal score (nats) above which this model counts as refusing (`refusal_mi.zero_point`), which
            `select` then asks half of the harmless prompts to reach under addition; None is the published rule.
        kl_formula: of `refusal_mi.kl_nats`.
        batch_size: most rows (prompts × candidates) in a pass; None: as many as are fast, fewer if memory ends.
        share_work: False runs every prompt in full for every candidate: slow, the same scores up to rounding.
        engine: where candidates are scored; None is here. Scores depend on it no more than on the number of threads.
    """
    (scores,) = sweep_token_sets(
        model,
        chat,
        grid,
        harmful,
        harmless,
        [refusal_tokens],
        prune_layers=prune_layers,
        kl_formula=kl_formula,
        batch_size=batch_size,
        share_work=share_work,
        engine=engine,
    )
    return replace(scores, zero_point=zero_point)


def sweep_token_sets(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Prompts,
    harmless: Prompts,
    token_sets: Sequence[RefusalTokens],
    *,
    prune_layers: float | None = None,
    kl_formula: KLFormula = "exact",
    batch_size: int | None = None,
    share_work: bool = True,
    engine: Engine | None = None,
) -> list[ScoreGrid]:
    """`sweep` with the refusal score read from several token sets at once: one grid for each."""
    scorer = Scorer(
        model,
        chat,
        grid,
        harmful,
        harmless,
        token_sets,
        kl_formula=kl_formula,
        batch_size=batch_size,
        share_work=share_work,
    )
    table = ScoreTable(scorer)
    table.skip_layers(prune_layers)
    items = exact_items(table.open, scorer.n_harmful, scorer.n_prompts, scorer.cut)
    deque(track(table.done(items, engine), "scoring candidates", total=len(items)), maxlen=0)
    return table.grids()


def exact_items(
    candidates: Sequence[Place],
    n_harmful: int,
    n_prompts: int,
    cutting: Callable[[Kind, Sequence[Place], Sequence[int]], Iterator[WorkItem]] = cut,
) -> list[WorkItem]:
    """All the work of an exact sweep, cut so; the items may run in any order, anywhere."""
    # Additions first: they read the plain streams, and with them the logits that the KL is measured from.
    added = cutting("add", candidates, range(n_harmful, n_prompts))
    return [*added, *cutting("ablate", candidates, range(n_prompts))]


MEASURES = ("bypass", "induce", "kl")


class ScoreTable:
    """The scores known so far of every candidate on every prompt, and why a candidate will have none."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        n_harmful, n_harmless = scorer.n_harmful, scorer.n_prompts - scorer.n_harmful
        self.places, self.n_layers = scorer.grid.candidates(), scorer.grid.n_layers
        self.row_of = {place: row for row, place in enumerate(self.places)}
        shape = (len(scorer.token_sets), len(self.places), len(MEASURES), max(n_harmful, n_harmless))
        self.values = torch.full(shape, math.nan, dtype=torch.float64)
        self.is_known = torch.zeros(shape[1:], dtype=torch.bool)
        self.sizes = (n_harmful, n_harmless, n_harmless)
        self.reasons: dict[Place, str] = {}

    @property
    def open(self) -> list[Place]:
        """The candidates that are directions and not skipped, in the order of the grid."""
        rows = {position: row for row, position in enumerate(self.scorer.grid.positions)}
        degenerate = self.scorer.grid.is_degenerate
        return [
            (position, layer)
            for position, layer in self.places
            if not degenerate[rows[position]][layer] and (position, layer) not in self.reasons
        ]

    def skip_layers(self, prune_layers: float | None) -> None:
        """Leave out the last layers."""
        limit = layer_limit(self.n_layers, prune_layers)
        for place in self.open:
            if place[1] >= limit:
                self.reasons[place] = f"not run: layers from {limit} on are pruned"

    def run(self, item: WorkItem) -> None:
        """Run an item here and keep its scores."""
        self.add(item, self.scorer.run(item))

    def done(self, items: Sequence[WorkItem], engine: Engine | None = None) -> Iterator[WorkItem]:
        """Run items and keep their scores; each of them, once that is done."""
        if engine is None:
            for item in items:
                self.run(item)
                yield item
            return
        for index, scores in engine.run(self.scorer, self.scorer.model, items):
            self.add(items[index], scores)
            yield items[index]

    def add(self, item: WorkItem, scores: Float[Tensor, "token_set candidate prompt"]) -> None:
        """Keep the scores of an item, wherever it ran."""
        rows = torch.tensor([self.row_of[place] for place in item.candidates])[:, None]
        cells = [self._cell(item.kind, prompt) for prompt in item.prompts]
        measures, columns = torch.tensor(cells, dtype=torch.long).reshape(-1, 2).T
        self.values[:, rows, measures, columns] = scores.to(self.values)
        self.is_known[rows, measures, columns] = True

    def unknown(self, kind: Kind, place: Place, prompts: Sequence[int]) -> list[int]:
        """The prompts that a candidate has not been run on."""
        known = self.is_known[self.row_of[place]].tolist()
        cells = [(prompt, self._cell(kind, prompt)) for prompt in prompts]
        return [prompt for prompt, (measure, column) in cells if not known[measure][column]]

    def known(self, place: Place, measure: int) -> Float[Tensor, " known"]:
        """A candidate's scores so far, from the first token set."""
        row = self.row_of[place]
        return self.values[0, row, measure][self.is_known[row, measure]]

    def differences(self, place: Place, other: Place, measure: int) -> Float[Tensor, " known"]:
        """By how much a candidate's scores are above another's, on the prompts that both were run on."""
        row, beside = self.row_of[place], self.row_of[other]
        both = self.is_known[row, measure] & self.is_known[beside, measure]
        return (self.values[0, row, measure] - self.values[0, beside, measure])[both]

    def is_exact(self, place: Place) -> bool:
        """Whether all three scores are measured on all prompts."""
        return all(len(self.known(place, measure)) == size for measure, size in enumerate(self.sizes))

    def row(self, place: Place, token_set: int = 0) -> CandidateScore:
        """The candidate's scores where all prompts are measured."""
        if not self.is_exact(place):
            return CandidateScore(*place, None, None, None, self.reasons.get(place))
        values = self.values[token_set, self.row_of[place]]
        bypass, induce, kl = (finite_mean(line[:size]) for line, size in zip(values, self.sizes, strict=True))
        median = None if induce is None else median_of(values[1, : self.sizes[1]])
        return CandidateScore(*place, bypass, induce, kl, median_induce=median)

    def grids(self) -> list[ScoreGrid]:
        """One grid per token set; where not all prompts are measured there are only the scores of those that are."""
        n_harmful = self.scorer.n_harmful
        return [
            ScoreGrid(
                tuple(self.row(place, index) for place in self.places),
                self.n_layers,
                finite_mean(baseline[:n_harmful]),
                finite_mean(baseline[n_harmful:]),
                self.values[index].clone(),
            )
            for index, baseline in enumerate(self.scorer.baseline)
        ]

    def _cell(self, kind: Kind, prompt: int) -> tuple[int, int]:
        """Measure and column of a score."""
        is_harmful = prompt < self.scorer.n_harmful
        measure = 1 if kind == "add" else 0 if is_harmful else 2
        return measure, prompt if is_harmful else prompt - self.scorer.n_harmful
