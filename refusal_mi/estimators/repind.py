"""Representational independence of directions (Wollschläger et al. 2025): ablating one leaves the other's cosines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..model.points import Hook, HookedModel, resid_hook
from ..model.running import batches, last_logits, running
from ..text.batches import Span, TokenBatch
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import check_named
from .rdo import Fit, Loss, RDOOptions, RDOTexts, Term, ablation_hooks, fit_terms, padded, rdo_terms

PromptTokens = Literal["instruction", "last"]
"""Those of the instruction, as in the paper; the last of the prompt, as in its code."""
WEIGHT, RETENTION = 200.0, 0.1
"""Published: of the independence term, and of the retention beside it."""


def fit_independent(
    model: HookedModel,
    chat: ChatFormat,
    start: Direction,
    texts: RDOTexts,
    others: Sequence[Direction],
    options: RDOOptions | None = None,
    *,
    weight: float = WEIGHT,
    tokens: PromptTokens = "instruction",
    orthogonal_to: Sequence[Direction] = (),
    checkpoint: str | Path | None = None,
) -> Fit:
    """A direction of low RDO loss that is independent of others: that loss + weight · `independence_loss`.

    Examples:
        >>> found = fit_independent(model, chat, direction.random_like(0), texts, [direction], RDOOptions(n_steps=1))
        >>> found.terms
        ('loss', 'ablation', 'addition', 'retention', 'independence')

    Args:
        start: not one of `others`: `random_like(seed)` of one, as published.
        others: those found before.
        options: by default the published ones of this method, with a retention weight of 0.1.
        tokens: of the harmful prompts, at which cosines are read.

    Raises:
        UserError: there are no others, or as `fit_rdo` says.
    """
    check_named("tokens", tokens, get_args(PromptTokens))
    if not others:
        raise UserError("fit_independent needs at least one direction to be independent of; fit_rdo finds the first")
    options = RDOOptions(retention=RETENTION) if options is None else options
    spans = prompt_spans(chat, [span.token_ids[: span.first] for span in texts.complied], tokens)
    pad_id = chat.pad_id
    term = Term("independence", weight, spans, lambda some: independence_loss(model, some, pad_id, others))
    method = f"RepInd of {len(others)} others, {tokens} tokens"
    terms = [*rdo_terms(model, chat, start, texts, options), term]
    key = [each.vector.tolist() for each in others]
    return fit_terms(
        model,
        terms,
        start,
        start.unit[None],
        options,
        method,
        orthogonal_to=orthogonal_to,
        checkpoint=checkpoint,
        key=key,
    )


def independence_loss(model: HookedModel, texts: Sequence[Span], pad_id: int, others: Sequence[Direction]) -> Loss:
    """Σ over others u of the mean of (cos(x_v, u) − cos(x, u))² + (cos(x_u, v) − cos(x, v))², x_v with v ablated.

    x is the stream entering block l, of all l < 0.9 n_layers, at the spans' tokens; the mean is over texts of the mean
    over these layers and tokens. Of a direction with itself it is 2·mean cos²(x, v).
    """
    batch, n_read = padded(model, texts, pad_id)
    units = [other.unit for other in others]
    with torch.no_grad():
        plain = _streams(model, batch, n_read, [])
        under = [_streams(model, batch, n_read, ablation_hooks(model, unit)) for unit in units]

    def loss(vector: Tensor) -> Tensor:
        ablated = _streams(model, batch, n_read, ablation_hooks(model, vector))
        total = torch.zeros((), dtype=torch.float64)
        for unit, without in zip(units, under, strict=True):
            changes = (_cosines(ablated, unit) - _cosines(plain, unit)).square()
            changes = changes + (_cosines(without, vector) - _cosines(plain, vector)).square()
            total = total + _mean_at(changes, n_read).cpu().double()
        return total

    return loss


def dependence(
    model: HookedModel,
    chat: ChatFormat,
    directions: Sequence[Direction],
    prompts: Prompts,
    *,
    tokens: PromptTokens = "instruction",
    batch_size: int = 32,
) -> Float[Tensor, "ablated read"]:
    """How much ablating one direction changes the cosines of the stream with another: mean |cos(x_v, u) − cos(x, u)|.

    Over prompts, their tokens, and layers below 0.9 n_layers. Rows are ablated, columns are read; it is not symmetric,
    and of a direction with itself it is mean |cos(x, v)|.

    Examples:
        >>> table = dependence(model, chat, [direction, other], ["Hi"])
        >>> table.shape, bool((table >= 0).all())
        (torch.Size([2, 2]), True)

    Raises:
        UserError: there are no directions or no prompts.
    """
    check_named("tokens", tokens, get_args(PromptTokens))
    if not directions:
        raise UserError("dependence needs at least one direction")
    spans = prompt_spans(chat, chat.encode_all(as_prompts(prompts)), tokens)
    units = [each.unit for each in directions]
    table, rows = (
        torch.zeros(len(units), len(units), dtype=torch.float64),
        [span.token_ids[: span.end] for span in spans],
    )
    for indices, batch in batches(model, rows, chat.pad_id, batch_size, description="reading dependence"):
        n_read = [spans[index].end - spans[index].first for index in indices]
        with torch.no_grad():
            plain = _streams(model, batch, n_read, [])
            for row, unit in enumerate(units):
                ablated = _streams(model, batch, n_read, ablation_hooks(model, unit))
                for column, other in enumerate(units):
                    changes = (_cosines(ablated, other) - _cosines(plain, other)).abs()
                    table[row, column] += _mean_at(changes, n_read).cpu().double() * len(indices) / len(rows)
    return table


def prompt_spans(chat: ChatFormat, prompts: Sequence[Sequence[int]], tokens: PromptTokens) -> tuple[Span, ...]:
    """Where cosines are read in prompts of these token ids.

    Raises:
        UserError: an instruction has no tokens.
    """
    before, after = len(chat.pre_instruction_ids), len(chat.post_instruction_ids)
    if tokens == "last":
        return tuple(Span(tuple(ids), len(ids) - 1, len(ids)) for ids in prompts)
    if any(len(ids) <= before + after for ids in prompts):
        raise UserError("an instruction has no tokens of its own to read at; leave it out, or read tokens='last'")
    return tuple(Span(tuple(ids), before, len(ids) - after) for ids in prompts)


def layers_read(n_layers: int) -> range:
    """Those l with l < 0.9 n_layers."""
    return range(-(-9 * n_layers // 10))


def _streams(
    model: HookedModel, batch: TokenBatch, n_read: Sequence[int], hooks: Sequence[Hook]
) -> Float[Tensor, "layer token d_model"]:
    """What enters the blocks at the last tokens of every text, one text after the other, with its gradient.

    At no others: of a stream that is zero, as under padding, a cosine has no gradient.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def read(x: Tensor, hook: Any) -> None:
            kept[layer] = torch.cat([row[-n:] for row, n in zip(x, n_read, strict=True)])

        return read

    n_layers = model.cfg.n_layers
    with running(model, [*hooks, *((resid_hook(layer, n_layers), keep(layer)) for layer in layers_read(n_layers))]):
        last_logits(model, batch)
    first, *_ = kept.values()
    streams = torch.stack([stream.to(first.device) for stream in kept.values()])
    return streams.to(torch.promote_types(streams.dtype, torch.float32))


def _cosines(
    streams: Float[Tensor, "layer token d_model"], vector: Float[Tensor, " d_model"]
) -> Float[Tensor, "layer token"]:
    unit = (vector / vector.norm()).to(streams.dtype).to(streams.device)
    return (streams @ unit) / streams.norm(dim=-1)


def _mean_at(values: Float[Tensor, "layer token"], n_read: Sequence[int]) -> Float[Tensor, ""]:
    """Mean over texts of the mean over layers and a text's tokens."""
    return torch.stack([each.mean() for each in values.split(list(n_read), dim=1)]).mean()
