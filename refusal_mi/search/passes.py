"""Next-token logits of fixed prompts under many directions, with the work left out that cannot change them.

Four savings, none of which changes a number beyond rounding: several directions share a pass, each with rows of its
own; the prompts' common beginning runs once per direction instead of once per prompt, where that pays; an addition
starts at its own layer, from the plain stream stored there; prompts of similar length share a pass. `PlainPasses`
does none of this and is what the other is tested against.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..interventions import Ablate, Add, Constant, Intervention, PromptWidth, all_hooks, hook_of
from ..model.points import Hook, HookedModel, model_device, parameters_of, resid_hook, write_hooks
from ..model.running import (
    LastPositions,
    cache_from_layers,
    has_key_cache,
    last_logits,
    layers_of_cache,
    n_block_outputs,
    prefix_logits_and_cache,
    running,
    running_from,
)
from ..text.batches import batches_by_cost, batches_by_length, left_pad
from ..values import Value

Rows = Sequence[Sequence[int]]
Logits = Float[Tensor, "direction prompt d_vocab"]
Layers = list[tuple[Tensor, Tensor]]
Basis = Float[Tensor, "_ d_model"]
"""Orthonormal rows."""
Weights = Mapping[str, float]
"""Hook point of a write -> the fraction of the component along the direction that is removed there; others keep it."""
Result = TypeVar("Result")
PASS_TOKENS = {"cpu": 3072, "cuda": 16384}
"""Tokens in a pass beyond which it no longer gets faster per token (see docs/scaling.md); fewer where memory ends."""


@dataclass(frozen=True, eq=False, repr=False)
class AblateEach(Value):
    """`Ablate` with a direction of its own for every group of rows: a batch holds all prompts once per direction."""

    units: Float[Tensor, "direction d_model"]

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook per write; rows come direction by direction."""
        units = Constant(self.units)

        def project_out(x: Tensor) -> Tensor:
            columns = units.beside(x)[:, :, None]
            grouped = x.reshape(len(self.units), -1, x.shape[-1])
            return torch.baddbmm(grouped, grouped @ columns, columns.mT, alpha=-1).reshape(x.shape)

        return [(name, hook_of(project_out, "all", prompt_width)) for name in write_hooks(model.cfg.n_layers)]


@dataclass(frozen=True, eq=False, repr=False)
class AblateWritesEach(Value):
    """`Ablate` with a subspace and strengths of its own for every group of rows, which come group by group."""

    bases: Float[Tensor, "group rank d_model"]
    """Orthonormal rows; those beyond a group's own rank are zero."""
    weights: tuple[Weights, ...]

    @classmethod
    def of(cls, removed: Sequence[Direction | Basis], weights: Sequence[Weights]) -> "AblateWritesEach":
        """From one direction, or one basis, for each group."""
        bases = [each.unit[None] if isinstance(each, Direction) else each.double() for each in removed]
        rank = max(map(len, bases))
        padded = [torch.nn.functional.pad(basis, (0, 0, 0, rank - len(basis))) for basis in bases]
        return cls(torch.stack(padded), tuple(weights))

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook per write that any group changes."""
        names = [name for name in write_hooks(model.cfg.n_layers) if any(each.get(name) for each in self.weights)]
        return [self._hook(name, prompt_width) for name in names]

    def _hook(self, name: str, prompt_width: PromptWidth) -> Hook:
        bases = Constant(self.bases)
        amounts = Constant(torch.tensor([each.get(name, 0.0) for each in self.weights], dtype=torch.float64))

        def project_out(x: Tensor) -> Tensor:
            rows = bases.beside(x)
            grouped = x.reshape(len(self.bases), -1, x.shape[-1])
            removed = amounts.beside(x)[:, None, None] * (grouped @ rows.mT)
            return torch.baddbmm(grouped, removed, rows, alpha=-1).reshape(x.shape)

        return name, hook_of(project_out, "all", prompt_width)


@dataclass(frozen=True, eq=False, repr=False)
class AddEach(Value):
    """`Add` at one layer with a vector of its own for every group of rows, optionally on a stream given beforehand."""

    vectors: Float[Tensor, "direction d_model"]
    layer: int
    stream: Float[Tensor, "prompt pos d_model"] | None = None
    """What enters the layer without the addition; replaces what the blocks below would compute."""

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook; rows come direction by direction."""
        vectors = Constant(self.vectors)

        def add(x: Tensor) -> Tensor:
            n = len(self.vectors)
            base = x if self.stream is None else self.stream.to(x).repeat(n, 1, 1)
            return base + vectors.beside(x).repeat_interleave(len(x) // n, dim=0)[:, None]

        return [(resid_hook(self.layer, model.cfg.n_layers), hook_of(add, "all", prompt_width))]


@runtime_checkable
class Passes(Protocol):
    """Logits of chosen prompts (by index) under every direction, ablated or added."""

    def plain(self, prompts: Sequence[int]) -> Float[Tensor, "prompt d_vocab"]: ...

    def remember(self, prompts: Sequence[int]) -> None: ...

    def ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits: ...

    def added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits: ...

    def removed(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], prompts: Sequence[int]
    ) -> Logits: ...


class PlainPasses:
    """One full forward pass per direction and batch."""

    def __init__(self, model: HookedModel, rows: Rows, pad_id: int, batch_size: int | None = None) -> None:
        self.model, self.rows, self.pad_id = model, rows, pad_id
        self.batch_size = 32 if batch_size is None else batch_size

    def plain(self, prompts: Sequence[int]) -> Float[Tensor, "prompt d_vocab"]:
        return self._logits([], prompts)

    def remember(self, prompts: Sequence[int]) -> None:
        """Nothing is kept here."""

    def ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        return torch.stack([self._logits([Ablate(direction)], prompts) for direction in directions])

    def added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        return torch.stack([self._logits([Add(direction)], prompts) for direction in directions])

    def removed(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], prompts: Sequence[int]
    ) -> Logits:
        each = zip(removed, weights, strict=True)
        return torch.stack([self._logits([AblateWritesEach.of([one], [some])], prompts) for one, some in each])

    def _logits(self, interventions: Sequence[Intervention], prompts: Sequence[int]) -> Float[Tensor, "prompt d_vocab"]:
        logits: list[Tensor] = [torch.empty(0)] * len(prompts)
        rows = [self.rows[prompt] for prompt in prompts]
        with torch.no_grad(), running(self.model, all_hooks(self.model, interventions), keep_wrappers=True):
            for places in batches_by_length(rows, self.batch_size):
                batch = left_pad([rows[place] for place in places], self.pad_id).to(model_device(self.model))
                for place, row in zip(places, last_logits(self.model, batch), strict=True):
                    logits[place] = row
        return torch.stack(logits)


SAME_PROBABILITY = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far a probability may lie from the plain pass before the savings are not used; 0.05 in half precision."""


def choose_passes(model: HookedModel, rows: Rows, pad_id: int, batch_size: int | None = None) -> Passes:
    """`SharedPasses` where it reproduces an addition's next-token distribution on these prompts, else `PlainPasses`.

    Architectures can depend on column distances (sliding windows narrower than a prompt) or keep other state; the
    comparison is made on the longest and the shortest prompt, with a random direction added halfway up, which uses
    all the savings; a fallback is a warning.
    """
    plain = PlainPasses(model, rows, pad_id, batch_size)
    if not has_key_cache(model):
        return plain
    shared = SharedPasses(model, rows, pad_id, batch_size)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    probe, ends = probe_of(model), sorted({order[0], order[-1]})
    expected, obtained = (passes.added([probe], ends).double().softmax(-1) for passes in (plain, shared))
    difference = (expected - obtained).abs().max().item()
    if difference <= SAME_PROBABILITY.get(shared.plain(ends).dtype, 0.05):
        return shared
    warn_not_shared(difference, stacklevel=3)
    return plain


def warn_not_shared(difference: float, *, stacklevel: int) -> None:
    """In one line; that is how far a probability moves."""
    text = f"sharing work changes a probability by {difference:.1e} on this model: not shared"
    warnings.warn(text, stacklevel=stacklevel)


class SharedPasses:
    """The same logits with the common beginning, the blocks below an addition and most padding left out."""

    def __init__(self, model: HookedModel, rows: Rows, pad_id: int, batch_size: int | None = None) -> None:
        """`batch_size` is the most rows in a pass (prompts × directions); None: by tokens, fewer if memory ends."""
        self.model, self.rows, self.pad_id, self.batch_size = model, rows, pad_id, batch_size
        self.device = model_device(model)
        self.n_common = min(n_shared(rows), min(map(len, rows)) - 1)
        self.last_position = LastPositions(model, -1, 1)
        self.n_block_outputs = n_block_outputs(model)
        self.overhead = _pass_overhead(model)
        self.pass_tokens = PASS_TOKENS.get(self.device.type, PASS_TOKENS["cpu"])
        self._common_layers: Layers = []
        self._logits: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}

    def plain(self, prompts: Sequence[int]) -> Float[Tensor, "prompt d_vocab"]:
        self._backing_off(lambda: self._run_plain([each for each in prompts if each not in self._logits]))
        return torch.stack([self._logits[prompt] for prompt in prompts])

    def remember(self, prompts: Sequence[int]) -> None:
        """Run prompts in the plain model, all in one go, and keep their logits and streams.

        Which prompts share a pass changes the rounding: what is remembered does not depend on what is asked for next.
        """
        self._backing_off(lambda: self._run_plain([each for each in prompts if each not in self._streams], True))

    def ablated(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        units = torch.stack([direction.unit for direction in directions])
        return self._backing_off(lambda: self._run_changed(len(units), lambda some: AblateEach(units[some]), prompts))

    def removed(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], prompts: Sequence[int]
    ) -> Logits:
        def change(some: slice) -> AblateWritesEach:
            return AblateWritesEach.of(removed[some], weights[some])

        return self._backing_off(lambda: self._run_changed(len(weights), change, prompts))

    def added(self, directions: Sequence[Direction], prompts: Sequence[int]) -> Logits:
        """All directions must be of one layer."""
        (layer,) = {direction.layer for direction in directions}
        vectors = torch.stack([direction.vector.detach().cpu().double() for direction in directions])
        self.remember(prompts)
        return self._backing_off(lambda: self._run_added(vectors, layer, prompts))

    def _run_changed(self, n: int, change: Callable[[slice], Intervention], prompts: Sequence[int]) -> Logits:
        """Every prompt from its first token on, once per direction; `change` is what some of the directions do."""
        n_common, logits = self._shared_columns(prompts), [[torch.empty(0)] * len(prompts) for _ in range(n)]
        with torch.no_grad():
            with running(self.model, change(slice(0, n)).hooks(self.model)):
                layers = self._run_common(n, n_common)
            for chunk, places in self._split(n, prompts, n_common):
                batch = [self.rows[prompts[place]][n_common:] for place in places]
                with running(self.model, change(chunk).hooks(self.model)):
                    rows = self._run_rows(batch, _some(layers, chunk), len(range(n)[chunk]), n_common)
                _keep(logits[chunk], places, rows)
        return torch.stack([torch.stack(rows) for rows in logits])

    def _run_added(self, vectors: Float[Tensor, "direction d_model"], layer: int, prompts: Sequence[int]) -> Logits:
        n_common, logits = self._shared_columns(prompts), [[torch.empty(0)] * len(prompts) for _ in vectors]
        layers: Layers = []
        with torch.no_grad():
            if n_common:
                common = self._streams[prompts[0]][layer, None, :n_common]
                with self._running_from(layer, AddEach(vectors, layer, common)):
                    above = self._run_common(len(vectors), n_common, layer)
                layers = [*_copies(self._common_layers[:layer], len(vectors)), *above]
            for chunk, places in self._split(len(vectors), prompts, n_common):
                batch = [self.rows[prompts[place]][n_common:] for place in places]
                stream = left_padded([self._streams[prompts[place]][layer, n_common:] for place in places])
                with self._running_from(layer, AddEach(vectors[chunk], layer, stream)):
                    rows = self._run_rows(batch, _some(layers, chunk), len(vectors[chunk]), n_common)
                _keep(logits[chunk], places, rows)
        return torch.stack([torch.stack(rows) for rows in logits])

    def _run_plain(self, prompts: Sequence[int], keep_streams: bool = False) -> None:
        """Run prompts that have not run; with their stream at every layer, which `added` starts from."""
        kept: list[Tensor] = []
        hooks = self._recorders(kept) if keep_streams else []
        if not prompts:
            return
        with torch.no_grad(), running(self.model, hooks):
            self._common_layers = self._run_common(1, self.n_common)
            common = [stream[0].to(self.device) for stream in kept]
            for _, places in self._split(1, prompts, self.n_common):
                kept.clear()
                rows = [self.rows[prompts[place]][self.n_common :] for place in places]
                logits = self._run_rows(rows, self._common_layers, 1, self.n_common)[0]
                for line, (place, row) in enumerate(zip(places, rows, strict=True)):
                    self._logits[prompts[place]] = logits[line]
                    if keep_streams:
                        own = torch.stack([stream[line, -len(row) :].to(self.device) for stream in kept])
                        parts = [torch.stack(common), own] if common else [own]
                        self._streams[prompts[place]] = torch.cat(parts, dim=1)

    def _running_from(self, layer: int, addition: AddEach) -> AbstractContextManager[None]:
        return running_from(self.model, layer, addition.hooks(self.model), self.n_block_outputs)

    def _recorders(self, kept: list[Tensor]) -> list[Any]:
        def record(activation: Tensor, hook: Any) -> Tensor:
            kept.append(activation)
            return activation

        layers = range(self.model.cfg.n_layers)
        return [(resid_hook(layer, self.model.cfg.n_layers), record) for layer in layers]

    def _split(self, n_directions: int, prompts: Sequence[int], n_common: int) -> Iterator[tuple[slice, list[int]]]:
        """What runs in one pass: some of the directions, and the places of some of the prompts."""
        lengths = [len(self.rows[prompt]) - n_common for prompt in prompts]
        most = self.batch_size or max(1, self.pass_tokens // max(lengths))
        for places in batches_by_cost(lengths, most, self.overhead / n_directions):
            width = max(lengths[place] for place in places)
            rows = self.batch_size or self.pass_tokens // width
            n_passes = math.ceil(n_directions / max(1, rows // len(places)))
            at_once = math.ceil(n_directions / n_passes)
            for start in range(0, n_directions, at_once):
                yield slice(start, start + at_once), places

    def _shared_columns(self, prompts: Sequence[int]) -> int:
        """How many columns run once per direction: none where a pass of their own costs more than they save."""
        return self.n_common if self.n_common * (len(prompts) - 1) > self.overhead else 0

    def _run_common(self, n_copies: int, n_common: int, first_layer: int = 0) -> Layers:
        """Keys and values from `first_layer` on; blocks that are skipped have none."""
        if not n_common:
            return []
        tokens = torch.tensor([list(self.rows[0][:n_common])], device=self.device)
        _, cache = prefix_logits_and_cache(self.model, tokens.expand(n_copies, -1))
        return layers_of_cache(cache, first_layer)

    def _run_rows(self, rows: Rows, layers: Layers, n_copies: int, n_common: int) -> Logits:
        """All prompts of a batch once per copy, with that copy's keys and values of the common columns before them."""
        batch = left_pad(rows, self.pad_id).to(self.device)
        tokens, mask = batch.tokens.repeat(n_copies, 1), batch.mask.repeat(n_copies, 1)
        past = None
        if layers:
            repeated = [(k.repeat_interleave(len(rows), 0), v.repeat_interleave(len(rows), 0)) for k, v in layers]
            past = cache_from_layers(repeated)
            mask = torch.cat([mask.new_ones(len(mask), n_common), mask], dim=1)
        with self.last_position.narrowed():
            logits, _ = prefix_logits_and_cache(self.model, tokens, past, mask)
        return logits.unflatten(0, (n_copies, len(rows)))

    def _backing_off(self, work: Callable[[], Result]) -> Result:
        """`work()`, with passes half as large from now on whenever memory runs out at a size nobody asked for."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.batch_size is not None or self.pass_tokens <= max(map(len, self.rows)):
                    size = "one prompt" if self.batch_size is None else f"batch size {self.batch_size}"
                    raise UserError(
                        f"out of memory in a pass of {size}; use a smaller --batch-size, shorter prompts or another "
                        "device"
                    ) from None
            torch.cuda.empty_cache()
            self.pass_tokens //= 2


def probe_of(model: HookedModel) -> Direction:
    """A random direction about as long as a stream of unit variance, halfway up."""
    layer, width = model.cfg.n_layers // 2, model.cfg.d_model
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return Direction(vector, layer, resid_hook(layer, model.cfg.n_layers))


def _copies(layers: Layers, n: int) -> Layers:
    return [(keys.expand(n, *keys.shape[1:]), values.expand(n, *values.shape[1:])) for keys, values in layers]


def _some(layers: Layers, chunk: slice) -> Layers:
    return [(keys[chunk], values[chunk]) for keys, values in layers]


def _keep(logits: Sequence[list[Tensor]], places: Sequence[int], of_batch: Logits) -> None:
    for direction, rows in enumerate(logits):
        for line, place in enumerate(places):
            rows[place] = of_batch[direction, line]


def left_padded(streams: Sequence[Float[Tensor, "_ d_model"]]) -> Float[Tensor, "prompt pos d_model"]:
    width = max(map(len, streams))
    return torch.stack([torch.nn.functional.pad(stream, (0, 0, width - len(stream), 0)) for stream in streams])


def n_shared(rows: Rows) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _pass_overhead(model: HookedModel) -> float:
    """What one more forward pass costs, in tokens: Python and kernel launches against a token's arithmetic."""
    n_parameters = sum(parameter.numel() for parameter in parameters_of(model))
    return 16 + 1.6e8 / n_parameters if model_device(model).type == "cpu" else 512.0
