"""COSMIC's cosines of the candidates of a finished run, whose own choice stays what it is."""

from dataclasses import dataclass
from typing import Annotated

import torch

from ..errors import UserError
from ..files import parsed, read_record, sha256_file, sha256_json, write_record
from ..model.provenance import check_same_weights, describe_model, versions
from ..reading import template_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.record import EVALUATIONS, MEAN_DIFFS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.cosmic import CosmicScore, CosmicSelection, cosmic_scores, evaluation_layers, select_cosmic
from ..search.thresholds import Thresholds, layer_limit
from ..text.batches import with_smaller_batches
from ..values import Value

FILE = "select_direction/cosmic.json"


@dataclass(frozen=True, eq=False, repr=False)
class CosmicRecord(Value):
    """`select_direction/cosmic.json`."""

    layers: tuple[int, ...]
    """Whose streams are compared: those that tell the training prompts' classes apart most."""
    n_layers: int
    rows: Annotated[tuple[CosmicScore, ...], parsed(lambda rows: tuple(map(CosmicScore.read, rows)))]
    """Of every candidate, on the validation prompts; KL as the run's search measured it."""

    def choose(self, thresholds: Thresholds) -> CosmicSelection:
        """The published filters, with these thresholds of KL and layers; a sum of cosines has none.

        Raises:
            UserError: KL has a threshold, and the run's search left it unmeasured.
        """
        kl_max, prune_layers = thresholds.kl_max, thresholds.prune_layers
        limit = layer_limit(self.n_layers, prune_layers)
        asked = [row for row in self.rows if row.layer < limit and row.total is not None]
        n_without = sum(row.kl_nats is None for row in asked)
        if n_without and kl_max is not None:
            raise UserError(
                f"the run's search did not measure the KL of {n_without} of {len(asked)} candidates, which this "
                "rule asks for: give --kl-max inf, or make the run with --search exact"
            )
        return select_cosmic(self.rows, self.n_layers, kl_max=kl_max, prune_layers=prune_layers)


def cosmic_of_run(run: RunInputs, folder: RunFolder | None = None, *, batch_size: int | None = None) -> CosmicRecord:
    """Measure both cosines of every candidate of a run, on the prompts that it kept; what was measured is kept.

    Args:
        folder: that of the run; one that reports, or that measures again.
        batch_size: prompts per forward pass; None is as many as the memory holds.

    Raises:
        UserError: the run has no candidates and scores, or was made of other weights.
    """
    folder = RunFolder(run.path) if folder is None else folder
    made = read_record(run.path / RUN, RunInfo).model
    model = describe_model(run.model, made.source)
    check_same_weights(made, run.model, str(run.path))
    train, val = ({side: run.record.side(side).kept(part) for side in SIDES} for part in ("train", "val"))
    grid, kl = run.grid, {(row.position, row.layer): row.kl_nats for row in run.scores.rows}

    def compute() -> None:
        def measured(size: int) -> CosmicRecord:
            outputs = range(1, grid.n_layers + 1)
            means = [
                template_residuals(run.model, run.chat, train[side], layers=outputs, n_last=1, batch_size=size)
                .mean(0, dtype=torch.float64)
                .squeeze(0)
                for side in SIDES
            ]
            layers = evaluation_layers(means[0], means[1])
            scores = cosmic_scores(
                run.model, run.chat, grid, val["harmful"], val["harmless"], layers, kl=kl, batch_size=size
            )
            return CosmicRecord(layers, grid.n_layers, tuple(scores))

        write_record(run.path / FILE, with_smaller_batches(measured, batch_size))

    inputs = {
        "model": model,
        "chat": run.chat.record(),
        "versions": versions(),
        "files": {file: sha256_file(run.path / file) for file in (MEAN_DIFFS, EVALUATIONS)},
        "prompts": sha256_json([train, val]),
    }
    n = sum(map(len, val.values()))
    folder.stage("cosmic", inputs, [FILE], compute, about=f"{len(grid.candidates())} candidates on {n} prompts")
    return read_record(run.path / FILE, CosmicRecord)
