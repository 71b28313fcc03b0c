"""Logits under many directions of a model whose weights lie on disk: each is read once for all passes that fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..interventions import Intervention
from ..model.blocks import Blocks, Keep, Pending, offloaded_blocks
from ..model.points import HookedModel, model_device
from ..text.batches import TokenBatch, batches_by_length, left_pad
from .passes import (
    PASS_TOKENS,
    AblateEach,
    AblateWritesEach,
    AddEach,
    Basis,
    Logits,
    Passes,
    Rows,
    Weights,
    choose_passes,
    left_padded,
)

OfPrompts = Float[Tensor, "prompt d_vocab"]


def passes_for(model: HookedModel, rows: Rows, pad_id: int, batch_size: int | None = None) -> Passes:
    """By blocks where weights are offloaded, else what `choose_passes` chooses."""
    blocks = offloaded_blocks(model)
    if blocks is None:
        return choose_passes(model, rows, pad_id, batch_size)
    return BlockPasses(blocks, rows, pad_id, batch_size)


class BlockPasses:
    """Whole passes (a common beginning is run for every prompt), all of them in one block before the next is read.

    Plain streams of the prompts that are remembered stay in memory at every layer: additions start from them.
    """

    def __init__(self, blocks: Blocks, rows: Rows, pad_id: int, batch_size: int | None = None) -> None:
        """`batch_size` is the most rows in a pass (prompts × directions); None: by tokens."""
        self.blocks, self.model, self.rows, self.pad_id = blocks, blocks.model, rows, pad_id
        self.batch_size, self.device = batch_size, model_device(blocks.model)
        self.most_rows = blocks.fitting(max(map(len, rows)))
        """Whose streams fit into memory together."""
        self._logits: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}

    def plain(self, prompts: Sequence[int]) -> OfPrompts:
        self._run_plain([each for each in prompts if each not in self._logits])
        return torch.stack([self._logits[prompt] for prompt in prompts])

    def remember(self, prompts: Sequence[int]) -> None:
        self._run_plain([each for each in prompts if each not in self._streams], keep_streams=True)

    def ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        return torch.stack(list(self.each_ablated(directions, prompts)))

    def added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        return torch.stack(list(self.each_added(directions, prompts)))

    def removed(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], prompts: Sequence[int]
    ) -> Logits:
        def change(some: Sequence[int]) -> AblateWritesEach:
            return AblateWritesEach.of([removed[index] for index in some], [weights[index] for index in some])

        return torch.stack(list(self._changed(len(weights), change, prompts)))

    def each_ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Iterator[OfPrompts]:
        """`ablated`, whose logits are in memory one direction at a time."""
        units = torch.stack([direction.unit for direction in directions])
        return self._changed(len(units), lambda some: AblateEach(units[list(some)]), prompts)

    def each_added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Iterator[OfPrompts]:
        """`added`, in the same way; the directions may be of several layers."""
        self.remember(prompts)
        vectors = torch.stack([direction.vector.detach().cpu().double() for direction in directions])
        for group in self._fitting(len(directions), prompts):
            jobs = []
            for layer in sorted({directions[index].layer for index in group}):
                at_layer = [index for index in group if directions[index].layer == layer]
                for some, places, batch in self._split(at_layer, prompts):
                    stream = left_padded([self._streams[prompts[place]][layer] for place in places])
                    hooks = AddEach(vectors[some], layer).hooks(self.model)
                    jobs.append(Job(some, places, Pending(batch, hooks, layer, stream.repeat(len(some), 1, 1))))
            yield from self._run(jobs, group, len(prompts))

    def _changed(
        self, n: int, change: Callable[[Sequence[int]], Intervention], prompts: Sequence[int]
    ) -> Iterator[OfPrompts]:
        """Passes of every prompt under `change` of some of `n` directions."""
        for group in self._fitting(n, prompts):
            split = self._split(group, prompts)
            jobs = [Job(some, places, Pending(batch, change(some).hooks(self.model))) for some, places, batch in split]
            yield from self._run(jobs, group, len(prompts))

    def _run_plain(self, prompts: Sequence[int], keep_streams: bool = False) -> None:
        if not prompts:
            return
        jobs = [Job(some, places, Pending(batch)) for some, places, batch in self._split([0], prompts)]
        kept: dict[int, list[Tensor]] = {prompt: [] for prompt in prompts}

        def keep(index: int, layer: int, stream: Tensor) -> None:
            for place, of_prompt in zip(jobs[index].places, stream if keep_streams else (), strict=False):
                prompt = prompts[place]
                kept[prompt].append(of_prompt[-len(self.rows[prompt]) :].cpu().clone())

        (logits,) = self._run(jobs, [0], len(prompts), keep)
        self._logits |= zip(prompts, logits, strict=True)
        self._streams |= {prompt: torch.stack(streams) for prompt, streams in kept.items() if streams}

    def _run(
        self, jobs: list["Job"], group: Sequence[int], n_prompts: int, keep: Keep | None = None
    ) -> Iterator[OfPrompts]:
        """Logits of each direction of a group, in order."""
        self.blocks.run([job.run for job in jobs], self.model.cfg.n_layers, keep=keep)
        lines = {direction: line for line, direction in enumerate(group)}
        last = torch.empty(len(group), n_prompts, self.model.cfg.d_model, dtype=self.model.cfg.dtype)
        for job in jobs:
            assert job.run.stream is not None
            at = torch.tensor([lines[direction] for direction in job.directions])[:, None]
            last[at, torch.tensor(job.places)] = job.run.stream[:, -1].unflatten(0, (len(job.directions), -1))
        jobs.clear()
        return self.blocks.logits(list(last))

    def _fitting(self, n: int, prompts: Sequence[int]) -> Iterator[range]:
        """Some of `n` directions after the other, all of whose passes fit into memory."""
        at_once = max(1, self.most_rows // max(1, len(prompts)))
        return (range(start, min(start + at_once, n)) for start in range(0, n, at_once))

    def _split(self, group: Sequence[int], prompts: Sequence[int]) -> Iterator[tuple[list[int], list[int], TokenBatch]]:
        """Some directions of a group, places of some prompts, and those prompts once for each of these directions."""
        rows, most = [self.rows[prompt] for prompt in prompts], PASS_TOKENS.get(self.device.type, PASS_TOKENS["cpu"])
        for places in batches_by_length(
            rows, self.batch_size or len(rows), most_tokens=None if self.batch_size else most
        ):
            batch = left_pad([rows[place] for place in places], self.pad_id).to(self.device)
            at_once = max(1, (self.batch_size or most // batch.tokens.shape[1]) // len(places))
            for start in range(0, len(group), at_once):
                some = list(group[start : start + at_once])
                repeated = TokenBatch(batch.tokens.repeat(len(some), 1), batch.mask.repeat(len(some), 1))
                yield some, places, repeated


@dataclass(eq=False)
class Job:
    """A pass of some prompts under some directions; rows come direction by direction."""

    directions: Sequence[int]
    places: Sequence[int]
    run: Pending
