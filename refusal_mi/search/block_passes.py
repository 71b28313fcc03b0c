"""Logits under many directions of a model whose weights lie on disk: each is read once for all passes that fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..interventions import Intervention
from ..model.blockwise import Blocks, Keep, Pending, offloaded_blocks
from ..model.points import HookedModel, model_device
from ..text.batches import TokenBatch, batches_by_length, left_pad
from .passes import (
    PASS_TOKENS,
    SAME_PROBABILITY,
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
    n_shared,
    probe_of,
    warn_not_shared,
)

OfPrompts = Float[Tensor, "prompt d_vocab"]
Change = Callable[[Sequence[int]], Intervention]
"""What the directions of these numbers do, to rows that come direction by direction."""


def passes_for(model: HookedModel, rows: Rows, pad_id: int, batch_size: int | None = None) -> Passes:
    """By blocks where weights are offloaded, else what `choose_passes` chooses."""
    blocks = offloaded_blocks(model)
    if blocks is None:
        return choose_passes(model, rows, pad_id, batch_size)
    return BlockPasses(blocks, rows, pad_id, batch_size)


@dataclass(eq=False)
class Job:
    """A pass of some prompts under some directions; rows come direction by direction."""

    directions: Sequence[int]
    places: Sequence[int]
    run: Pending


class BlockPasses:
    """All passes in one block before the next is read; the prompts' common beginning once for each direction.

    Plain streams of the prompts that are remembered stay in memory at every layer: additions start from them.
    """

    def __init__(self, blocks: Blocks, rows: Rows, pad_id: int, batch_size: int | None = None) -> None:
        """`batch_size` is the most rows in a pass (prompts × directions); None: by tokens."""
        self.runner, self.model, self.rows, self.pad_id = blocks, blocks.model, rows, pad_id
        self.batch_size, self.device = batch_size, model_device(blocks.model)
        self.pass_tokens = PASS_TOKENS.get(self.device.type, PASS_TOKENS["cpu"])
        self.most_rows = blocks.fitting(max(map(len, rows)))
        """Whose streams fit into memory together."""
        self._logits: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}
        self.n_common = min(n_shared(rows), min(map(len, rows)) - 1) if blocks.has_keys else 0
        most = SAME_PROBABILITY.get(self.model.cfg.dtype, 0.05)
        if self.n_common and not (difference := self._difference_of_sharing()) <= most:
            warn_not_shared(difference, stacklevel=4)
            self.n_common = 0

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

        groups = self._fitting(len(weights), prompts)
        found = [logits for group in groups for logits in self._run(self._jobs(group, prompts, change), group, prompts)]
        return torch.stack(found)

    def each_ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Iterator[OfPrompts]:
        """`ablated`, whose logits are in memory one direction at a time."""
        units = torch.stack([direction.unit for direction in directions])
        for group in self._fitting(len(units), prompts):
            jobs = self._jobs(group, prompts, lambda some: AblateEach(units[list(some)]))
            yield from self._run(jobs, group, prompts)

    def each_added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Iterator[OfPrompts]:
        """`added`, in the same way; the directions may be of several layers."""
        self.remember(prompts)
        vectors = torch.stack([direction.vector.detach().cpu().double() for direction in directions])
        for group in self._fitting(len(vectors), prompts):
            jobs: list[Job] = []
            for layer in sorted({directions[index].layer for index in group}):

                def change(some: Sequence[int], layer: int = layer) -> AddEach:
                    return AddEach(vectors[list(some)], layer)

                at_layer = [index for index in group if directions[index].layer == layer]
                jobs += self._jobs(at_layer, prompts, change, layer)
            yield from self._run(jobs, group, prompts)

    def _run_plain(self, prompts: Sequence[int], keep_streams: bool = False) -> None:
        if not prompts:
            return
        jobs, n_layers = self._jobs([0], prompts), self.model.cfg.n_layers
        kept: list[list[Tensor]] = [[] for _ in jobs]

        def keep(index: int, layer: int, stream: Tensor) -> None:
            if layer < n_layers:
                kept[index].append(stream.cpu())

        places = [job.places for job in jobs]
        (logits,) = self._run(jobs, [0], prompts, keep if keep_streams else None)
        self._logits |= zip(prompts, logits, strict=True)
        common: list[Tensor] = []
        for of_job, streams in zip(places, kept if keep_streams else (), strict=False):
            if not of_job:  # the common columns
                common = [torch.stack([stream[0] for stream in streams])]
            for line, place in enumerate(of_job):
                n = len(self.rows[prompts[place]]) - sum(part.shape[1] for part in common)
                own = torch.stack([stream[line, -n:] for stream in streams])
                self._streams[prompts[place]] = torch.cat([*common, own], dim=1)

    def _jobs(
        self, group: Sequence[int], prompts: Sequence[int], change: Change | None = None, layer: int | None = None
    ) -> list[Job]:
        """Passes of every prompt under every direction of a group; from a layer on where one is named."""
        n_common, jobs = self.n_common if len(prompts) > 1 else 0, list[Job]()
        rows = [self.rows[prompt][n_common:] for prompt in prompts]
        most_tokens = self.pass_tokens if self.batch_size is None else None
        batches = batches_by_length(rows, self.batch_size or len(rows), most_tokens=most_tokens)
        at_once = self.batch_size or max(1, self.pass_tokens // max(1, n_common))
        for chunk in _slices(group, at_once if n_common else len(group)):
            common = None
            if n_common:
                first = left_pad([self.rows[prompts[0]][:n_common]], self.pad_id)
                common = self._pending(first, chunk, prompts[:1], (0, n_common), change, layer)
                common.is_continued = True
                jobs.append(Job(chunk, [], common))
            for places in batches:
                batch, asked = left_pad([rows[place] for place in places], self.pad_id), [prompts[at] for at in places]
                most = (self.batch_size or self.pass_tokens // batch.tokens.shape[1]) // len(places)
                for some in _slices(chunk, max(1, most)):
                    run = self._pending(batch, some, asked, (n_common, None), change, layer)
                    run.common = common
                    run.common_rows = torch.tensor([chunk.index(each) for each in some]).repeat_interleave(len(places))
                    jobs.append(Job(some, places, run))
        return jobs

    def _pending(
        self,
        batch: TokenBatch,
        some: Sequence[int],
        prompts: Sequence[int],
        columns: tuple[int, int | None],
        change: Change | None,
        layer: int | None,
    ) -> Pending:
        """A batch once for each of some directions; the streams of its prompts at these columns enter the layer."""
        n, stream = len(some), None
        if layer is not None:
            own = [self._streams[prompt][layer, slice(*columns)] for prompt in prompts]
            stream = left_padded(own).repeat(n, 1, 1)
        repeated = TokenBatch(batch.tokens.repeat(n, 1), batch.mask.repeat(n, 1)).to(self.device)
        return Pending(repeated, [] if change is None else change(some).hooks(self.model), layer or 0, stream)

    def _run(
        self, jobs: list[Job], group: Sequence[int], prompts: Sequence[int], keep: Keep | None = None
    ) -> Iterator[OfPrompts]:
        """Logits of each direction of a group, in order."""
        self.runner.run([job.run for job in jobs], self.model.cfg.n_layers, keep=keep)
        lines = {direction: line for line, direction in enumerate(group)}
        last = torch.empty(len(group), len(prompts), self.model.cfg.d_model, dtype=self.model.cfg.dtype)
        for job in jobs:
            if job.places and job.run.stream is not None:
                at = torch.tensor([lines[direction] for direction in job.directions])[:, None]
                last[at, torch.tensor(job.places)] = job.run.stream[:, -1].unflatten(0, (len(job.directions), -1))
        jobs.clear()
        return self.runner.logits(list(last))

    def _fitting(self, n: int, prompts: Sequence[int]) -> list[list[int]]:
        """Some of `n` directions after the other, all of whose passes fit into memory."""
        return _slices(range(n), max(1, self.most_rows // max(1, len(prompts))))

    def _difference_of_sharing(self) -> float:
        """Of a probability, where the common columns run by themselves, on the longest and the shortest prompt.

        As in `choose_passes`, architectures can depend on column distances.
        """
        order = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index]))
        prompts, n_common, jobs = [order[0], order[-1]], self.n_common, list[Job]()
        unit = probe_of(self.model).unit
        for number, n in enumerate((0, n_common)):
            self.n_common = n
            jobs += self._jobs([number], prompts, lambda some: AblateEach(unit.expand(len(some), -1)))
        one, other = (logits.double().softmax(-1) for logits in self._run(jobs, [0, 1], prompts))
        return (one - other).abs().max().item()


def _slices(group: Sequence[int], n: int) -> list[list[int]]:
    return [list(group[start : start + n]) for start in range(0, len(group), n)]
