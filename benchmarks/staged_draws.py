"""How often the staged search ends where the exact one does, on random validation sets.

`python -m benchmarks.staged_draws [DIRECTORY ...]` scores every candidate on 120 + 120 prompts once, then draws sets of
32 + 32 and runs both searches on the known scores.
"""

import random
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from refusal_mi.directions import DirectionGrid, cosine, difference_in_means
from refusal_mi.labels import discover_refusal_tokens
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import quiet_load
from refusal_mi.reading import mean_activations
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.staged import DEFAULT_SCREENING, Rounds, Screening
from refusal_mi.search.sweep import Scorer, ScoreTable, WorkItem
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_KNOWN, N_DRAWN, N_DRAWS = 120, 32, 150
Known = Float[Tensor, "candidate measure prompt"]


class KnownScores(Scorer):
    """Gives scores that are known already, and counts the blocks that a model would have run for them.

    `baseline` are the plain model's, of the harmful prompts and then of the harmless ones.
    """

    def __init__(self, grid: DirectionGrid, known: Known, baseline: Float[Tensor, " prompt"] | None = None) -> None:
        self.grid, self.known = grid, known
        self.n_harmful, self.n_prompts, self.token_sets = known.shape[-1], 2 * known.shape[-1], [[0]]
        self.baseline = torch.zeros(1, self.n_prompts, dtype=torch.float64) if baseline is None else baseline[None]
        self.row_of = {place: row for row, place in enumerate(grid.candidates())}
        self.cost = 0.0

    def run(self, item: WorkItem) -> Float[Tensor, "token_set candidate prompt"]:
        """Look up, and count as if it had run."""
        rows = torch.tensor([self.row_of[place] for place in item.candidates])[:, None]
        cells = [(prompt - self.n_harmful, 2) if prompt >= self.n_harmful else (prompt, 0) for prompt in item.prompts]
        columns = torch.tensor([column for column, _ in cells])
        measures = torch.tensor([1 if item.kind == "add" else measure for _, measure in cells])
        self.cost += item.cost(self.grid.n_layers)
        return self.known[rows, measures, columns][None]


def exact(scorer: Scorer) -> ScoreGrid:
    """All scores of all candidates."""
    table, n = ScoreTable(scorer), scorer.n_harmful
    table.run(WorkItem("ablate", tuple(table.open), tuple(range(2 * n))))
    for layer in {layer for _, layer in table.open}:
        some = tuple(place for place in table.open if place[1] == layer)
        table.run(WorkItem("add", some, tuple(range(n, 2 * n))))
    return table.grids()[0]


def draw(
    grid: DirectionGrid, known: Known, plain: Float[Tensor, "side prompt"], seed: int, screening: Screening
) -> tuple[float, float]:
    """Cosine of the two winners on one random set, and the share of the exact search's runs."""
    chosen, rule = random.Random(seed), Thresholds()
    harmful, harmless = (chosen.sample(range(known.shape[-1]), N_DRAWN) for _ in range(2))
    some = torch.stack([known[:, 0, harmful], known[:, 1, harmless], known[:, 2, harmless]], dim=1)
    baseline = torch.cat([plain[0, harmful], plain[1, harmless]])
    whole, staged = KnownScores(grid, some, baseline), KnownScores(grid, some, baseline)
    table = ScoreTable(staged)
    Rounds(table, rule, screening).run()
    best, expected = (select(scores, rule).best for scores in (table.grids()[0], exact(whole)))
    places = [grid.direction(each.position, each.layer) for each in (best, expected)]
    return cosine(*places), staged.cost / whole.cost


def main() -> None:
    """One line for each model."""
    for source in sys.argv[1:] or [None]:
        model = quiet_load(source, device="cpu")
        chat = ChatFormat(model.tokenizer)
        sides = [load_prompts(f"organism_{side}_train").instructions for side in ("harmful", "harmless")]
        grid = difference_in_means(*(mean_activations(model, chat, side[N_KNOWN:][:64]) for side in sides))
        prompts = [side[:N_KNOWN] for side in sides]
        tokens = discover_refusal_tokens(*(next_token_logits(model, chat, side) for side in prompts))
        scorer = Scorer(model, chat, grid, *prompts, [tokens])
        known, plain = exact(scorer).per_prompt, scorer.baseline[0].unflatten(0, (2, -1))
        assert known is not None
        found = [draw(grid, known, plain, seed, DEFAULT_SCREENING) for seed in range(N_DRAWS)]
        n_near = sum(cosine >= 0.98 for cosine, _ in found)
        share = sum(cost for _, cost in found) / len(found)
        name = "embedded" if source is None else Path(source).name
        sys.stdout.write(f"{name}: cosine ≥ 0.98 in {n_near} of {N_DRAWS} sets, {share:.1%} of the exact runs\n")


if __name__ == "__main__":
    main()
