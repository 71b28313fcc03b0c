"""The one reader of residual streams: means, spans, single prompts, and whatever else hook points carry."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from .directions import ActivationMeans
from .errors import UserError
from .estimators.samples import ActivationSamples
from .interventions import Interventions, PromptWidth, all_hooks
from .model.blockwise import Blocks, Pending, offloaded_blocks
from .model.points import Hook, HookedModel, check_point, missing_points, model_device
from .model.running import LastPositions, batches, last_logits, residuals, running
from .precision import as_double, finite, with_float64
from .text.batches import Span, TokenBatch
from .text.chat import ChatFormat
from .text.given import Prompts, as_prompts
from .text.prompts import PromptSet

STREAMS, READING = "the model's residual streams", "reading residual streams"
MAX_TABLE_BYTES = 2**31
"""Largest table of residual streams that is kept in memory."""


def mean_activations(
    model: HookedModel, chat: ChatFormat, instructions: Prompts, *, hook: str | None = None, batch_size: int = 32
) -> ActivationMeans:
    """Mean over prompts of the stream entering every block, at every post-instruction position.

    Examples:
        >>> means = mean_activations(model, chat, ["Hi", "Bye"])
        >>> means.means.shape == (len(chat.positions), model.cfg.n_layers, model.cfg.d_model)
        True
        >>> mean_activations(model, chat, "Hi", hook="blocks.3.attn.hook_z").means.shape[1]
        1

    Args:
        instructions: user messages, one prompt each; a string is one.
        hook: read this hook point of a block instead, such as `blocks.3.attn.hook_z` (what its heads hold, one after
            the other), `blocks.3.hook_attn_out`, `blocks.3.mlp.hook_post` (neurons).
        batch_size: prompts per forward pass; the result does not depend on it.

    Raises:
        UserError: there are no instructions, one does not fit the model, activations are not finite, or the model has
            no such hook point, or none that holds a vector at every position.
        ValueError: the model's weights are not in HF coordinates.
    """
    if hook is not None:
        return _means_at(model, chat, as_prompts(instructions), hook, batch_size)
    instructions, layers = as_prompts(instructions), range(model.cfg.n_layers)
    total = torch.zeros(len(chat.positions), len(layers), model.cfg.d_model, dtype=torch.float64)
    for _, streams in _streams(model, chat, instructions, layers, len(chat.positions), [], batch_size):
        for layer, stream in enumerate(streams):
            total[:, layer] += with_float64(stream).sum(0, dtype=torch.float64).cpu()
    return ActivationMeans(total / len(instructions), chat.positions, len(instructions))


def sample_activations(
    model: HookedModel, chat: ChatFormat, instructions: Prompts, *, hook: str | None = None, batch_size: int = 32
) -> ActivationSamples:
    """The stream of every prompt entering every block, at every post-instruction position, in float32.

    Examples:
        >>> sample_activations(model, chat, ["Hi", "Bye"]).n_prompts
        2
        >>> sample_activations(model, chat, "Hi", hook="blocks.3.mlp.hook_post").n_layers
        1

    Args:
        instructions: user messages, one prompt each; the categories of a `PromptSet` are kept.
        hook: read this hook point of a block instead, as `mean_activations` does.
        batch_size: prompts per forward pass; the result does not depend on it.

    Raises:
        UserError: there are no instructions, their activations would take more than 2 GiB, or are not finite, or the
            model has no such hook point, or none that holds a vector at every position.
        ValueError: the model's weights are not in HF coordinates.
    """
    categories = instructions.categories if isinstance(instructions, PromptSet) else ()
    if hook is not None:
        table = _samples_at(model, chat, as_prompts(instructions), hook, batch_size)
    else:
        layers = range(model.cfg.n_layers)
        table = template_residuals(model, chat, instructions, layers=layers, batch_size=batch_size)
    return ActivationSamples(table, chat.positions, categories if any(categories) else (), hook)


def combine_spans(
    model: HookedModel,
    spans: Sequence[Span],
    weights: Float[Tensor, "combination span"],
    *,
    pad_id: int,
    normalize: bool = False,
    batch_size: int = 8,
    description: str = READING,
) -> Float[Tensor, "combination layer d_model"]:
    """Σ_s weights[c, s] · (mean of the stream over the tokens of span s), for layers 0..n_layers, in float64.

    Args:
        weights: one row per combination: 1/n over one class is its mean, ±1/n over two classes their difference.
        pad_id: the id under the padding.
        normalize: replace every span's mean by its unit vector times the mean norm over all spans, per layer, so
            that each counts the same.
        batch_size: texts per forward pass; the result does not depend on it.

    Raises:
        UserError: there are no spans.
        ValueError: the model's weights are not in HF coordinates.
    """
    layers = range(model.cfg.n_layers + 1)
    total = torch.zeros(len(weights), len(layers), model.cfg.d_model, dtype=torch.float64)
    norms = torch.zeros(len(layers), dtype=torch.float64)
    rows = [span.token_ids[: span.end] for span in spans]
    for indices, batch in batches(model, rows, pad_id, batch_size, description=description):
        lengths = torch.tensor([spans[index].end - spans[index].first for index in indices])
        streams = residuals(model, batch, layers, int(lengths.max()))
        means = torch.stack([_span_means(stream, lengths) for stream in streams], dim=1)
        if normalize:
            norm = means.norm(dim=-1, keepdim=True)
            norms += norm[..., 0].sum(0) / len(spans)
            means = means / norm
        summed = "combination span, span layer d_model -> combination layer d_model"
        total += einsum(weights[:, indices].double(), means, summed)
    return finite(total * norms[:, None] if normalize else total, STREAMS)


def stream_residuals(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Prompts,
    *,
    layers: Sequence[int] | None = None,
    n_last: int | None = None,
    interventions: Interventions = (),
    batch_size: int = 32,
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos layer d_model"]]]:
    """Indices into `instructions` and the stream of those prompts at their last positions, a batch at a time.

    Args:
        layers: 0..n_layers by default; n_layers is the stream after the last block.
        n_last: how many positions from the end; the post-instruction positions by default. One more begins with
            the last token of the instruction.

    Raises:
        UserError: there are no prompts, one does not fit the model, or streams are not finite.
    """
    instructions = as_prompts(instructions)
    wanted = range(model.cfg.n_layers + 1) if layers is None else layers
    n = len(chat.positions) if n_last is None else n_last
    hooks = all_hooks(model, interventions)
    for indices, streams in _streams(model, chat, instructions, wanted, n, hooks, batch_size):
        yield indices, torch.stack([stream.to(streams[0].device) for stream in streams], dim=2)


def template_residuals(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Prompts,
    *,
    layers: Sequence[int] | None = None,
    n_last: int | None = None,
    interventions: Interventions = (),
    batch_size: int = 32,
) -> Float[Tensor, "prompt pos layer d_model"]:
    """The whole of `stream_residuals` in one float32 table on the CPU, in the order of `instructions`.

    Examples:
        >>> template_residuals(model, chat, ["Hi", "Bye"], layers=[2, 3]).shape[:3] == (2, len(chat.positions), 2)
        True

    Raises:
        UserError: there are no prompts, the table would take more than 2 GiB, or streams are not finite.
    """
    instructions = as_prompts(instructions)
    n_layers = model.cfg.n_layers + 1 if layers is None else len(layers)
    width = len(chat.positions) if n_last is None else n_last
    table = _table(len(instructions), width, n_layers, model.cfg.d_model)
    for indices, streams in stream_residuals(
        model,
        chat,
        instructions,
        layers=layers,
        n_last=n_last,
        interventions=interventions,
        batch_size=batch_size,
    ):
        table[indices] = streams.float().cpu()
    return table


def captured(
    model: HookedModel,
    batch: TokenBatch,
    readers: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    interventions: Interventions = (),
    prompt_width: PromptWidth = None,
) -> dict[str, Tensor]:
    """What each reader takes from the activation at its hook point, after the interventions, in one forward pass.

    Args:
        readers: hook point -> function of its activation, `[batch, pos, ...]`.
        prompt_width: columns of each row that are prompt, for interventions on prompt or response only.

    Raises:
        UserError: the model has no such hook point, or an activation is not finite.
    """
    missing = missing_points(model, readers)
    if missing:
        raise UserError(f"this model has no {missing[0]}, which this analysis reads")
    taken: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            taken[name] = finite(readers[name](activation).detach(), f"the activations at {name}")

        return read

    hooks = [*all_hooks(model, interventions, prompt_width), *((name, hook_for(name)) for name in readers)]
    with torch.no_grad(), running(model, hooks):
        last_logits(model, batch)
    return taken


def _means_at(
    model: HookedModel, chat: ChatFormat, instructions: Sequence[str], hook: str, batch_size: int
) -> ActivationMeans:
    """Means at one hook point, heads one after the other."""
    total = torch.zeros(len(chat.positions), _width_at(model, chat, hook), dtype=torch.float64)
    for _, read in _at_point(model, chat, instructions, hook, batch_size):
        total += with_float64(read).sum(0, dtype=torch.float64).cpu()
    means = rearrange(total / len(instructions), "pos width -> pos 1 width")
    return ActivationMeans(means, chat.positions, len(instructions), hook)


def _samples_at(
    model: HookedModel, chat: ChatFormat, instructions: Sequence[str], hook: str, batch_size: int
) -> Float[Tensor, "prompt pos 1 width"]:
    """Every prompt at one hook point, heads one after the other."""
    table = _table(len(instructions), len(chat.positions), 1, _width_at(model, chat, hook))
    for indices, read in _at_point(model, chat, instructions, hook, batch_size):
        table[indices, :, 0] = read.float().cpu()
    return table


def _table(n_prompts: int, n_positions: int, n_layers: int, width: int) -> Float[Tensor, "prompt pos layer width"]:
    """A float32 table to be filled, if it is not too large."""
    shape = (n_prompts, n_positions, n_layers, width)
    n_bytes = 4 * torch.Size(shape).numel()
    if n_bytes > MAX_TABLE_BYTES:
        raise UserError(
            f"residuals of {n_prompts} prompts at {n_positions} positions and {n_layers} layers take "
            f"{n_bytes / 2**30:.1f} GiB; use fewer prompts or name some layers"
        )
    return torch.empty(shape, dtype=torch.float32)


def _width_at(model: HookedModel, chat: ChatFormat, hook: str) -> int:
    """How wide a hook point is, if it holds one vector at every position."""
    check_point(model, hook)
    for width in (2, 3):  # what holds no vector at every position does not follow the length of a text
        text = torch.full((1, width), chat.pad_id, device=model_device(model))
        whole = captured(model, TokenBatch(text, torch.ones_like(text)), {hook: lambda x: x})[hook]
        if whole.ndim < 3 or whole.shape[:2] != (1, width) or not whole.is_floating_point():
            raise UserError(f"{hook} holds no vector at every position of a prompt: nothing can be read there")
    return int(whole[0, 0].numel())


def _at_point(
    model: HookedModel, chat: ChatFormat, instructions: Sequence[str], hook: str, batch_size: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos width"]]]:
    """Indices, and what a hook point holds at the last positions."""
    n, rows = len(chat.positions), chat.encode_all(instructions)
    for indices, batch in batches(model, rows, chat.pad_id, batch_size, description=f"reading {hook}"):
        yield indices, captured(model, batch, {hook: lambda x: x[:, -n:].flatten(2)})[hook]


def _streams(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    layers: Sequence[int],
    n_last: int,
    hooks: Sequence[Hook],
    batch_size: int,
) -> Iterator[tuple[list[int], list[Float[Tensor, "batch pos d_model"]]]]:
    """Indices, and the stream entering each of `layers` at the last positions."""
    rows = chat.encode_all(instructions)
    blocks = None if hooks else offloaded_blocks(model)
    if blocks is not None:
        yield from _streams_by_blocks(blocks, rows, layers, n_last, chat.pad_id, batch_size)
        return
    narrow = LastPositions(model, max(layers) - 1, n_last) if max(layers) > 0 else None
    for indices, batch in batches(model, rows, chat.pad_id, batch_size, description=READING):
        streams = residuals(model, batch, layers, n_last, hooks=hooks, narrow=narrow)
        yield indices, [finite(stream, STREAMS) for stream in streams]


def _streams_by_blocks(
    blocks: Blocks, rows: Sequence[Sequence[int]], layers: Sequence[int], n_last: int, pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], list[Float[Tensor, "batch pos d_model"]]]]:
    """The same for a model with weights on disk, which are read once for all batches that fit into memory."""
    groups = list(batches(blocks.model, rows, pad_id, batch_size, description=READING, is_shown=False))
    together = blocks.fitting(max(map(len, rows)) + n_last * len(layers))
    at_once = max(1, together // batch_size)
    for some in (groups[start : start + at_once] for start in range(0, len(groups), at_once)):
        kept: list[dict[int, Tensor]] = [{} for _ in some]

        def keep(index: int, layer: int, stream: Tensor, kept: list[dict[int, Tensor]] = kept) -> None:
            if layer in layers:
                kept[index][layer] = stream[:, -n_last:].clone()

        blocks.run([Pending(batch) for _, batch in some], max(1, *layers), keep=keep, description=READING)
        for (indices, _), streams in zip(some, kept, strict=True):
            yield indices, [finite(streams[layer], STREAMS) for layer in layers]


def _span_means(
    stream: Float[Tensor, "batch pos d_model"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    """Means over the last `lengths` positions of every row, in float64 on the CPU."""
    double = as_double(stream)
    n = rearrange(lengths, "batch -> batch 1 1").to(double.device)
    is_outside = torch.arange(double.shape[1], 0, -1, device=double.device)[:, None] > n  # counted from the end
    return (reduce(double.masked_fill(is_outside, 0), "batch pos d_model -> batch d_model", "sum") / n[:, 0]).cpu()
