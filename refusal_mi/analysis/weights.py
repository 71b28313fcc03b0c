"""Which weights write a direction into the stream and which read it, against random directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack, get_args

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..model.points import HookedModel
from ..model.readers import ModelWeights, Norm, NormMap, norm_before, norms_along, readers
from ..run.folder import RunInputs
from .result import AnalysisResult, call_with_a_run, provenance_of

Side = Literal["writes", "reads"]


@dataclass(frozen=True, eq=False, repr=False)
class WeightsResult(AnalysisResult):
    """How strongly each writer and reader is aligned with a direction.

    Examples:
        >>> found.writer_names, found.writes.shape == (model.cfg.n_layers, len(found.writer_names))
        (('H0', 'H1', 'H2', 'H3', 'MLP'), True)
        >>> found.ratio("writes").allclose(found.writes / found.writes_null_mean)
        True
    """

    kind: ClassVar[str] = "weights"
    units: ClassVar[Mapping[str, str]] = {
        "writes": "residual stream units along the unit direction per unit of input (norm over inputs)",
        "reads": "units of output per unit direction in the normed stream (norm over outputs)",
        "writes_null_p95": "as writes",
        "reads_null_p95": "as reads",
    }

    writes: Float[Tensor, "layer writer"]
    """‖(g ⊙ r̂)ᵀ W_O[h]‖ of every head and ‖(g ⊙ r̂)ᵀ W_out‖ of the MLP; g is 1 without a post-norm."""
    reads: Float[Tensor, "layer reader"]
    """‖W (g ⊙ r̂)‖ of every reader, g the gain of the norm before it."""
    writes_null_mean: Float[Tensor, "layer writer"]
    """Mean over random unit directions."""
    writes_null_p95: Float[Tensor, "layer writer"]
    reads_null_mean: Float[Tensor, "layer reader"]
    reads_null_p95: Float[Tensor, "layer reader"]
    writer_names: tuple[str, ...]
    reader_names: tuple[str, ...]
    n_random: int
    direction_layer: int
    direction_position: int | None

    def __post_init__(self) -> None:
        widths = self.writes.shape[1], self.reads.shape[1]
        if widths != (len(self.writer_names), len(self.reader_names)):
            raise ValueError(f"{widths} columns for {len(self.writer_names)} writers, {len(self.reader_names)} readers")

    def ratio(self, side: Side) -> Float[Tensor, "layer component"]:
        """The norms over those of a random direction: 1 is chance."""
        if side == "writes":
            return self.writes / self.writes_null_mean
        return self.reads / self.reads_null_mean


def weight_alignment(model: HookedModel, direction: Direction, *, n_random: int = 100, seed: int = 0) -> WeightsResult:
    """‖r̂ᵀW_O[h]‖ and ‖r̂ᵀW_out‖ of every layer, and ‖W r̂‖ of every reader, beside their null.

    Before a post-norm of gain g the write along r̂ is (g ⊙ r̂)ᵀW up to that norm's scale. Experts of a mixture are
    taken together.

    Examples:
        >>> figure = plot_weights(weight_alignment(model, direction, n_random=3))

    Args:
        n_random: random unit directions of the null.
    """
    check_in_stream(direction)
    if n_random < 2:
        raise UserError(f"the null needs at least 2 random directions, not {n_random}")
    weights = ModelWeights(model)
    controls = [direction.random_like(seed + index).unit for index in range(n_random)]
    vectors = torch.stack([direction.unit, *controls])
    layers = range(model.cfg.n_layers)
    writes = torch.stack([_writes(weights, layer, vectors) for layer in layers])
    by_layer = [_reads(weights, layer, vectors) for layer in layers]
    names = tuple(by_layer[0])
    reads = torch.stack([torch.stack([row[name] for name in names]) for row in by_layer])
    writer_names = (*(f"H{head}" for head in range(model.cfg.n_heads)), "MLP")
    return WeightsResult(
        writes[..., 0],
        reads[..., 0],
        writes[..., 1:].mean(-1),
        writes[..., 1:].quantile(0.95, dim=-1),
        reads[..., 1:].mean(-1),
        reads[..., 1:].quantile(0.95, dim=-1),
        writer_names,
        names,
        n_random,
        direction.layer,
        direction.position,
        provenance=provenance_of(
            model, None, {}, {"seed": seed, "n_random": n_random, "direction": direction.describe()}
        ),
    )


def from_run(run: RunInputs) -> WeightsResult:
    """The weights against the direction of a run."""
    return weight_alignment(run.model, run.direction, seed=run.seed)


def _writes(
    weights: ModelWeights, layer: int, vectors: Float[Tensor, "vector d_model"]
) -> Float[Tensor, "writer vector"]:
    heads = [norms_along(rows, vectors * weights.gain("attn", layer)) for rows in weights.head_rows(layer)]
    seen = vectors * weights.gain("mlp", layer)
    mlp = [norms_along(weights.written_rows(writer), seen) for writer in weights.writers("mlp", layer)]
    return torch.stack([*heads, _together(mlp)])


def _reads(
    weights: ModelWeights, layer: int, vectors: Float[Tensor, "vector d_model"]
) -> dict[str, Float[Tensor, " vector"]]:
    model, norms = weights.model, {}
    like = weights.unembedding
    for name, module in readers(model, layer).items():
        norm = norm_before(model, layer, "attn" if name in "qkv" else "mlp")
        seen = _normed(norm, model, vectors).to(like.dtype).to(like.device)
        with torch.no_grad():
            read = module(seen[None])[0] - module(torch.zeros_like(seen[:1])[None])[0]
        norms[name] = read.double().cpu().norm(dim=-1)
    experts = weights.expert_readers(layer)
    if experts is not None:
        norms["experts"] = norms_along(experts, _normed(norm_before(model, layer, "mlp"), model, vectors))
    return norms


def _normed(norm: Norm | None, model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Tensor:
    return vectors if norm is None else NormMap.of(norm, model).apply(vectors)


def _together(norms: Sequence[Float[Tensor, " vector"]]) -> Float[Tensor, " vector"]:
    return torch.stack(list(norms)).square().sum(0).sqrt()


def plot_weights(result: WeightsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Norm of every writer and every reader along the direction, over that of random directions.

    Examples:
        >>> plot_weights(found).layout.title.text
        'Weights along the direction, relative to a random direction'
    """
    titles = ["<b>writes</b>: ‖r̂ᵀW_O[h]‖, ‖r̂ᵀW_out‖", "<b>reads</b>: ‖W r̂‖"]
    share = max(0.5, min(0.75, len(result.writer_names) / (len(result.writer_names) + len(result.reader_names))))
    figure = draw.panels(titles, widths=[share, 1 - share])
    ratios = torch.cat([result.ratio("writes"), result.ratio("reads")], dim=1)
    for column, side in enumerate(get_args(Side), start=1):
        trace = _table(result, side, (ratios.min().item(), ratios.max().item()))
        trace.showscale = column == 2
        figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(type="category", tickangle=0)
    figure.update_xaxes(title="attention head, MLP", col=1)
    figure.update_xaxes(title="q, k, v of the attention; inputs of the MLP", col=2)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="block", col=1)
    about = draw.subtitle(
        result.model_name,
        draw.read_at(result.direction_position, result.direction_layer),
        f"n = {result.n_random} random directions",
        "stars: above 95% of them",
    )
    height = max(240, 30 * len(result.writes))
    title = "Weights along the direction, relative to a random direction"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def _table(result: WeightsResult, side: Side, limits: tuple[float, float]) -> go.Heatmap:
    values = result.writes if side == "writes" else result.reads
    null = result.writes_null_p95 if side == "writes" else result.reads_null_p95
    names = [draw.plain(name) for name in (result.writer_names if side == "writes" else result.reader_names)]
    custom = torch.stack([values, null], dim=-1).tolist()
    hover = (
        "block %{y}, %{x}<br>%{z:.2f} × a random direction<br>norm %{customdata[0]:.4g}, "
        "95% of random below %{customdata[1]:.4g}"
    )
    trace = draw.heatmap(
        result.ratio(side),
        names,
        [str(layer) for layer in range(len(values))],
        "ratio to random",
        hover=hover,
        custom=custom,
        limits=limits,
    )
    above = (values > null).tolist()
    ratios = result.ratio(side).tolist()
    shows_number = trace.texttemplate is not None
    trace.text = [
        [f"{f'{ratio:.2f}' if shows_number else ''}{'*' if flag else ''}" for ratio, flag in zip(*rows, strict=True)]
        for rows in zip(ratios, above, strict=True)
    ]
    trace.texttemplate = "%{text}"
    return trace


FIGURES = {"weights": plot_weights}

call_with_a_run(__name__)
