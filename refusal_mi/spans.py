"""Residual streams averaged over spans of tokens, and summed over texts in float64 while they stream by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import UserError
from .forward import read_streams
from .models import HookedModel, check_raw_basis, model_device
from .native import without_grad
from .progress import track
from .tokens import batches_by_length, left_pad


@dataclass(frozen=True)
class Span:
    """The tokens `first` to `end - 1` of a text; those before them are only context, those after are not run."""

    token_ids: tuple[int, ...]
    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end <= len(self.token_ids):
            raise ValueError(f"a span needs 0 <= first < end <= {len(self.token_ids)}, not {self.first}, {self.end}")


def combine_spans(
    model: HookedModel,
    spans: Sequence[Span],
    weights: Float[Tensor, "combination span"],
    *,
    pad_id: int,
    normalize: bool = False,
    batch_size: int = 8,
    description: str = "reading residual streams",
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
    check_raw_basis(model)
    if not spans:
        raise UserError("there is no text to read residual streams from")
    layers = range(model.cfg.n_layers + 1)
    total = torch.zeros(len(weights), len(layers), model.cfg.d_model, dtype=torch.float64)
    norms = torch.zeros(len(layers), dtype=torch.float64)
    rows = [span.token_ids[: span.end] for span in spans]
    with without_grad(model):
        for indices in track(batches_by_length(rows, batch_size), description):
            batch = left_pad([rows[index] for index in indices], pad_id).to(model_device(model))
            lengths = torch.tensor([spans[index].end - spans[index].first for index in indices])
            means = torch.stack(read_streams(model, batch, layers, lambda stream: _span_means(stream, lengths)), dim=1)
            if normalize:
                norm = means.norm(dim=-1, keepdim=True)
                norms += norm[..., 0].sum(0) / len(spans)
                means = means / norm
            total += torch.einsum("cs,sld->cld", weights[:, indices].double(), means)
    return total * norms[:, None] if normalize else total


def _span_means(
    stream: Float[Tensor, "batch pos d_model"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    """Means over the last `lengths` positions of every row, in float64."""
    if stream.device.type == "mps":  # no float64 there
        stream = stream.cpu()
    width, n = int(lengths.max()), lengths.to(stream.device)[:, None, None]
    is_outside = torch.arange(width, 0, -1, device=stream.device)[None, :, None] > n
    return (stream[:, -width:].double().masked_fill(is_outside, 0).sum(1) / n[:, 0]).cpu()
