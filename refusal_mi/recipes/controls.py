"""What the chosen direction does that others of its length do not: random ones, and differences within a class."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, DirectionGrid
from ..files import read_record, write_record
from ..reading import template_residuals
from ..run.answers import SIDES
from ..run.record import CONTROLS, DIRECTION, ControlKind, ControlRow, ControlsRecord
from ..search.sweep import sweep
from .context import Prepared

N_RANDOM, N_HALVES = 5, 2
N_PROMPTS = 16
"""Validation prompts of a side that they are measured on: what tells them apart is large."""


def measure_controls(run: Prepared, direction: Direction) -> tuple[ControlRow, ...]:
    """Scores and share of the stream of the chosen direction and of its controls, on validation prompts.

    An isotropic random direction meets little of the stream, so that it can hardly fail. The difference between the
    means of two random halves of one class's training prompts lies where activations vary, without saying what is
    harmful. (Halves of shuffled labels would not do: where more of one class falls into one half, they hold the
    direction itself.)

    Returns:
        The chosen one first; what `select_direction/controls.json` holds.
    """
    harmful, harmless = (run.kept(side, "val")[:N_PROMPTS] for side in SIDES)

    def compute() -> None:
        named: list[Named] = [("chosen", None, direction), *random_directions(direction), *halves(run, direction)]
        vectors = [each for _, _, each in named]
        shares = shares_of_stream(_streams_at(run, direction, [*harmful, *harmless]), vectors).tolist()
        scores = sweep(
            run.model,
            run.chat,
            _as_grid(vectors, run.model.cfg.n_layers),
            harmful,
            harmless,
            run.prompts.prefixes,
            kl_formula=run.options.kl_formula,
            batch_size=run.options.batch_size,
        )
        measured = [row for row in scores.rows if row.layer == direction.layer]
        rows = [
            ControlRow(kind, seed, share, row.bypass, row.induce, row.kl_nats)
            for (kind, seed, _), share, row in zip(named, shares, measured, strict=True)
        ]
        write_record(run.path / CONTROLS, ControlsRecord(tuple(rows), quick=run.options.quick))

    n_most = 1 + N_RANDOM + 2 * N_HALVES
    about = f"the chosen direction beside {N_RANDOM} random ones and {2 * N_HALVES} of random halves of one class"
    n_passes = round(n_most * (len(harmful) + (2 - direction.layer / run.model.cfg.n_layers) * len(harmless)))
    inputs = run.inputs(DIRECTION, harmful=harmful, harmless=harmless, tokens=run.prompts.prefixes)
    inputs |= {side: run.kept(side, "train") for side in SIDES} | {"seed": run.options.seed} | run.options.kl_input
    run.stage("controls", inputs, [CONTROLS], compute, about + run.estimate("pass", n_passes, most=True))
    return read_record(run.path / CONTROLS, ControlsRecord).rows


Named = tuple[ControlKind, int | None, Direction]


def random_directions(direction: Direction) -> list[Named]:
    """Isotropic ones of its norm; the first are those whose answers are judged."""
    return [("random", seed, direction.random_like(seed)) for seed in range(N_RANDOM)]


def halves(run: Prepared, direction: Direction) -> list[Named]:
    """Differences of the means of random halves within a class, read where the direction was, scaled to its norm."""
    found: list[Named] = []
    kinds: dict[str, ControlKind] = {"harmful": "within harmful", "harmless": "within harmless"}
    for side in SIDES:
        streams = _streams_at(run, direction, run.kept(side, "train"))
        for seed in range(N_HALVES):
            order = torch.randperm(len(streams), generator=torch.Generator().manual_seed(run.options.seed + seed))
            one, other = order[: len(order) // 2], order[len(order) // 2 :]
            difference = streams[one].mean(0) - streams[other].mean(0) if len(one) > 0 else streams[:0].sum(0)
            if bool(difference.any()):
                vector = (difference * (direction.norm / difference.norm())).to(direction.vector.dtype)
                found.append((kinds[side], seed, replace(direction, vector=vector, provenance={"seed": seed})))
    return found


def shares_of_stream(
    streams: Float[Tensor, "prompt d_model"], directions: Sequence[Direction]
) -> Float[Tensor, " direction"]:
    """The share of the streams' squared length along each direction: what ablating it removes, mean over prompts.

    Of an isotropic direction 1/d_model is expected.
    """
    units = torch.stack([direction.unit for direction in directions])
    along = einsum(streams, units, "prompt d_model, direction d_model -> direction prompt")
    return (along.square() / streams.square().sum(-1)).mean(-1)


def _streams_at(run: Prepared, direction: Direction, prompts: Sequence[str]) -> Float[Tensor, "prompt d_model"]:
    """The plain stream at the direction's layer and position, float64."""
    assert direction.position is not None
    layers, n_last = [direction.layer], -direction.position

    def read(batch_size: int) -> Float[Tensor, "prompt pos layer d_model"]:
        return template_residuals(run.model, run.chat, prompts, layers=layers, n_last=n_last, batch_size=batch_size)

    return run.batched(read)[:, 0, 0].double()


def _as_grid(vectors: Sequence[Direction], n_layers: int) -> DirectionGrid:
    """Directions of one layer as candidates that the search takes: each in the place of a position."""
    layer, n = vectors[0].layer, len(vectors)
    table = torch.zeros(n, n_layers, len(vectors[0].vector), dtype=torch.float64)
    table[:, layer] = torch.stack([each.vector.double() for each in vectors])
    is_absent = tuple(each != layer for each in range(n_layers))
    return DirectionGrid(table, tuple(range(-n, 0)), (is_absent,) * n)
