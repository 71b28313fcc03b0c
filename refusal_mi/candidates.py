"""The search: every candidate direction, ablated and added, scored on validation prompts."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .chat import ChatFormat
from .directions import DirectionGrid
from .models import HookedModel
from .progress import track
from .score_grid import CandidateScore, ScoreGrid, finite_mean, layer_limit
from .work import Kind, Place, Scorer, WorkItem, cut

__all__ = ["CandidateScore", "ScoreGrid", "ScoreTable", "exact_items", "sweep", "sweep_token_sets"]


def sweep(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_tokens: Sequence[int],
    *,
    prune_layers: float | None = None,
    batch_size: int | None = None,
    share_work: bool = True,
) -> ScoreGrid:
    """Score every candidate of `grid` on validation prompts (Arditi et al. 2024, section 2.5 and appendix C).

    Per candidate: harmful and harmless prompts under ablation (bypass, KL), harmless prompts with the candidate
    added (induce). Only the logits after the last position are computed.

    Args:
        harmful: validation instructions that the model refuses.
        harmless: validation instructions that it answers.
        refusal_tokens: token ids of the refusal score.
        prune_layers: leave out the candidates that the rule with this fraction would drop for their layer anyway;
            they have no scores then.
        batch_size: most rows (prompts × candidates) in a pass; None: as many as are fast, fewer if memory ends.
        share_work: False runs every prompt in full for every candidate: slow, the same scores up to rounding.
    """
    return sweep_token_sets(
        model,
        chat,
        grid,
        harmful,
        harmless,
        [refusal_tokens],
        prune_layers=prune_layers,
        batch_size=batch_size,
        share_work=share_work,
    )[0]


def sweep_token_sets(
    model: HookedModel,
    chat: ChatFormat,
    grid: DirectionGrid,
    harmful: Sequence[str],
    harmless: Sequence[str],
    token_sets: Sequence[Sequence[int]],
    *,
    prune_layers: float | None = None,
    batch_size: int | None = None,
    share_work: bool = True,
) -> list[ScoreGrid]:
    """`sweep` with the refusal score read from several token sets at once: one grid for each."""
    scorer = Scorer(model, chat, grid, harmful, harmless, token_sets, batch_size=batch_size, share_work=share_work)
    table = ScoreTable(scorer)
    table.skip_layers(prune_layers)
    items = exact_items(table.open, scorer.n_harmful, scorer.n_prompts)
    for item in track(items, "scoring candidates"):
        table.run(item)
    return table.grids()


def exact_items(candidates: Sequence[Place], n_harmful: int, n_prompts: int) -> list[WorkItem]:
    """All the work of an exact sweep; the items may run in any order, anywhere."""
    # Additions first: they read the plain streams, and with them the logits that the KL is measured from.
    added = cut("add", candidates, range(n_harmful, n_prompts))
    return [*added, *cut("ablate", candidates, range(n_prompts))]


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
        return CandidateScore(*place, bypass, induce, kl)

    def grids(self) -> list[ScoreGrid]:
        """One grid per token set; candidates that are not measured on all prompts have no scores."""
        is_exact = torch.tensor([self.is_exact(place) for place in self.places])
        values = self.values.masked_fill(~is_exact[:, None, None], math.nan)
        n_harmful = self.scorer.n_harmful
        return [
            ScoreGrid(
                tuple(self.row(place, index) for place in self.places),
                self.n_layers,
                finite_mean(baseline[:n_harmful]),
                finite_mean(baseline[n_harmful:]),
                values[index].clone(),
            )
            for index, baseline in enumerate(self.scorer.baseline)
        ]

    def _cell(self, kind: Kind, prompt: int) -> tuple[int, int]:
        """Measure and column of a score."""
        is_harmful = prompt < self.scorer.n_harmful
        measure = 1 if kind == "add" else 0 if is_harmful else 2
        return measure, prompt if is_harmful else prompt - self.scorer.n_harmful
