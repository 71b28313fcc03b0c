"""How the candidate directions lie to each other, how long they are, and how sure: bootstrap and shuffled labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import MIN_RELATIVE_NORM
from ..errors import UserError
from ..figures import style as draw
from ..model.points import HookedModel
from ..reading import template_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of, template_tokens


@dataclass(frozen=True, eq=False, repr=False)
class GeometryResult(AnalysisResult):
    """Geometry of the difference in means at every position and layer; NaN where the two means do not differ."""

    kind: ClassVar[str] = "geometry"
    units: ClassVar[Mapping[str, str]] = {
        "cosines": "cosine, -1 to 1",
        "cosines_null_p95": "|cosine|, 95th percentile over shuffled labels",
        "norms": "residual stream units",
        "norms_null_p95": "residual stream units, 95th percentile over shuffled labels",
        "stability": "mean cosine between a bootstrap direction and the full one",
        "stability_p05": "the same, 5th percentile",
        "shuffled_p95": "|cosine| between a shuffled-label direction and the full one, 95th percentile",
    }

    cosines: Float[Tensor, "candidate candidate"]
    """Candidates in the order of the grid: position by position, layer within."""
    cosines_null_p95: Float[Tensor, "candidate candidate"]
    norms: Float[Tensor, "pos layer"]
    norms_null_p95: Float[Tensor, "pos layer"]
    stability: Float[Tensor, "pos layer"]
    stability_p05: Float[Tensor, "pos layer"]
    shuffled_p95: Float[Tensor, "pos layer"]
    positions: tuple[int, ...]
    position_tokens: tuple[str, ...]
    n_harmful: int
    n_harmless: int
    n_resamples: int

    def __post_init__(self) -> None:
        if self.norms.numel() != len(self.cosines) or len(self.norms) != len(self.positions):
            raise ValueError(f"{len(self.cosines)} candidates do not fill a grid of {tuple(self.norms.shape)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the candidates."""
        layers = range(self.norms.shape[1])
        return tuple(f"position {position}, layer {layer}" for position in self.positions for layer in layers)


def direction_geometry(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Prompts,
    harmless: Prompts,
    *,
    n_resamples: int = 50,
    seed: int = 0,
    batch_size: int = 32,
) -> GeometryResult:
    """Cosines between all candidates with a null band, their norms, and their self-consistency.

    Neighboring layers share most of their stream, so that even directions of shuffled labels have high cosines
    there: only what exceeds the null band says something about refusal. Bootstrap samples are drawn with replacement
    inside each class. A shuffle puts half of each class on either side, so that nothing of their difference is left
    (after a plain shuffle, which is never quite balanced, some of it is).

    Examples:
        >>> figure = plot_geometry(direction_geometry(model, chat, harmful, harmless, n_resamples=3))

    Args:
        n_resamples: bootstrap samples, and as many shuffles.

    Raises:
        UserError: fewer than 2 prompts on a side.
    """
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    if min(len(harmful), len(harmless)) < 2 or n_resamples < 2:
        raise UserError("direction geometry needs at least 2 prompts on each side and 2 resamples")
    residuals = template_residuals(
        model, chat, [*harmful, *harmless], layers=range(model.cfg.n_layers), batch_size=batch_size
    )
    drawn = _weights(len(harmful), len(harmless), n_resamples, seed)
    vectors = _combine(residuals, drawn)
    scale = residuals.norm(dim=-1).mean(0).double()
    true, bootstrap, shuffled = vectors[0], vectors[1 : 1 + n_resamples], vectors[1 + n_resamples :]
    norms = true.norm(dim=-1)
    missing = norms <= MIN_RELATIVE_NORM * scale
    units = torch.where(missing[..., None], torch.nan, true / norms[..., None])
    shuffled_norms = shuffled.norm(dim=-1)
    again = _cosine(bootstrap, units)
    mixed = _cosine(shuffled, units).abs()
    return GeometryResult(
        _gram(units),
        torch.stack([_gram(_unit(one)).abs() for one in shuffled]).quantile(0.95, dim=0),
        torch.where(missing, 0.0, norms),
        shuffled_norms.quantile(0.95, dim=0),
        again.mean(0),
        again.quantile(0.05, dim=0),
        mixed.quantile(0.95, dim=0),
        chat.positions,
        template_tokens(chat),
        len(harmful),
        len(harmless),
        n_resamples,
        provenance=provenance_of(
            model, chat, {"harmful": harmful, "harmless": harmless}, {"seed": seed, "n_resamples": n_resamples}
        ),
    )


def from_run(run: RunInputs) -> GeometryResult:
    """The candidates of a run, from its training prompts."""
    harmful, harmless = prompts_of(run, "train").values()
    return direction_geometry(run.model, run.chat, harmful, harmless, seed=run.seed, batch_size=run.batch_size)


def _weights(n_harmful: int, n_harmless: int, n_resamples: int, seed: int) -> Float[Tensor, "draw prompt"]:
    """One row per direction, as weights of the prompts: the true one, bootstrap samples, shuffles."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.cat([torch.full((n_harmful,), 1.0 / n_harmful), torch.full((n_harmless,), -1.0 / n_harmless)])
    rows = [true]
    for _ in range(n_resamples):
        sides = []
        for n, sign in ((n_harmful, 1.0), (n_harmless, -1.0)):
            counts = torch.randint(n, (n,), generator=generator).bincount(minlength=n)
            sides.append(sign * counts / n)
        rows.append(torch.cat(sides))
    for _ in range(n_resamples):
        signs = torch.cat([_balanced_signs(n, generator) for n in (n_harmful, n_harmless)])
        rows.append(signs / (signs > 0).sum())
    return torch.stack([row.double() for row in rows])


def _balanced_signs(n: int, generator: torch.Generator) -> Float[Tensor, " prompt"]:
    """One class, half of it on either side; the odd one out counts on neither."""
    signs = torch.zeros(n)
    order = torch.randperm(n, generator=generator)
    signs[order[: n // 2]], signs[order[n // 2 : 2 * (n // 2)]] = 1.0, -1.0
    return signs


def _combine(
    residuals: Float[Tensor, "prompt pos layer d_model"], weights: Float[Tensor, "draw prompt"]
) -> Float[Tensor, "draw pos layer d_model"]:
    """Weighted sums over prompts, in float64, layer by layer."""
    layers = [
        torch.einsum("kn,npd->kpd", weights, residuals[:, :, layer].double()) for layer in range(residuals.shape[2])
    ]
    return torch.stack(layers, dim=2)


def _unit(vectors: Float[Tensor, "pos layer d_model"]) -> Float[Tensor, "pos layer d_model"]:
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, torch.nan)


def _gram(units: Float[Tensor, "pos layer d_model"]) -> Float[Tensor, "candidate candidate"]:
    rows = units.flatten(0, 1)
    return rows @ rows.T


def _cosine(
    drawn: Float[Tensor, "draw pos layer d_model"], units: Float[Tensor, "pos layer d_model"]
) -> Float[Tensor, "draw pos layer"]:
    return (drawn * units).sum(-1) / drawn.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)


def plot_geometry(result: GeometryResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cosine between every two candidates, beside the 95th percentile of its size with shuffled labels."""
    labels = [f"{draw.signed(position)}:{layer}" for position in result.positions for layer in _layers(result)]
    figure = draw.panels(["cosine", "shuffled labels, 95th percentile of |cosine|"], gap=0.05, shares_y=False)
    for column, table in enumerate((result.cosines, result.cosines_null_p95), start=1):
        hover = "%{x} and %{y} (position:layer)<br>%{z:.3f}"
        trace = draw.heatmap(table, labels, labels, "cosine", hover=hover, limits=(-1.0, 1.0))
        trace.text = trace.texttemplate = None
        trace.xgap = trace.ygap = 0
        trace.showscale = column == 2
        figure.add_trace(trace, row=1, col=column)
    n_layers = result.norms.shape[1]
    ticks = [n_layers * row + n_layers // 2 for row in range(len(result.positions))]
    names = [draw.position_label(*pair) for pair in zip(result.positions, result.position_tokens, strict=True)]
    axis: dict[str, Any] = {"tickvals": [labels[tick] for tick in ticks], "type": "category"}
    short = [draw.signed(position) for position in result.positions]
    figure.update_xaxes(title="position (within each: layers in order)", ticktext=short, tickangle=0, **axis)
    figure.update_yaxes(autorange="reversed", automargin=True, ticktext=names, **axis)
    figure.update_yaxes(title="position", col=1)
    figure.update_yaxes(showticklabels=False, col=2)
    for edge in range(1, len(result.positions)):
        for column in (1, 2):
            cut = {"line": {"color": "white", "width": 1.5}, "row": 1, "col": column}
            figure.add_vline(edge * n_layers - 0.5, **cut)
            figure.add_hline(edge * n_layers - 0.5, **cut)
    title = "Cosines between the candidate directions"
    about = draw.subtitle(result.model_name, _counts(result), "grey: the two means do not differ")
    return draw.finish(figure, title=title, about=about, height=420, look=look)


def plot_stability(result: GeometryResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cosine of bootstrap directions with the full one, and of shuffled-label directions as their control."""
    figure = go.Figure()
    layers = _layers(result)
    for row, (name, style) in enumerate(draw.position_styles(result.positions, result.position_tokens)):
        hover = f"position {name}, layer %{{x}}<br>mean %{{y:.3f}}, 5th percentile %{{customdata:.3f}}"
        values, low = result.stability[row].tolist(), result.stability_p05[row].tolist()
        draw.add_line(figure, layers, values, name, style, hover, low)
    name = "shuffled labels, 95th percentile (range over positions)"
    null = torch.where(result.shuffled_p95.isnan(), 0.0, result.shuffled_p95)
    figure.add_trace(draw.band(layers, [0.0] * len(layers), null.amax(0).tolist(), name, draw.CONTROL))
    draw.add_line(figure, layers, null.amax(0).tolist(), name, draw.CONTROL)
    draw.layer_axis(figure)
    figure.update_yaxes(title="cosine with the direction of all prompts", range=[-0.05, 1.05])
    about = draw.subtitle(result.model_name, _counts(result), f"mean over {result.n_resamples} bootstrap samples")
    title = "How far resampled prompts give the same direction"
    return draw.finish(figure, title=title, about=about, height=380, look=look)


def plot_lengths(result: GeometryResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Length of the candidates over that of shuffled-label directions."""
    figure = go.Figure()
    layers = _layers(result)
    for row, (name, style) in enumerate(draw.position_styles(result.positions, result.position_tokens)):
        null = result.norms_null_p95[row]
        values = draw.gaps(torch.where(null > 0, result.norms[row] / null, torch.nan))
        custom = torch.stack([result.norms[row], null], dim=-1).tolist()
        hover = (
            f"position {name}, layer %{{x}}<br>%{{customdata[0]:.4g}} against %{{customdata[1]:.4g}} shuffled"
            "<br>ratio %{y:.2f}"
        )
        draw.add_line(figure, layers, values, name, style, hover, custom)
    figure.add_hline(1, line={"color": "#1a1a1a", "dash": "dash", "width": 1.4}, annotation={"text": "chance"})
    draw.layer_axis(figure)
    figure.update_yaxes(title="length / 95th percentile of shuffled labels", rangemode="tozero")
    about = draw.subtitle(result.model_name, _counts(result), f"{result.n_resamples} shuffles")
    title = "Length of the candidate directions against chance"
    return draw.finish(figure, title=title, about=about, height=360, look=look)


def _layers(result: GeometryResult) -> list[int]:
    return list(range(result.norms.shape[1]))


def _counts(result: GeometryResult) -> str:
    return draw.counted({"harmful": result.n_harmful, "harmless": result.n_harmless})


FIGURES = {"geometry": plot_geometry, "geometry_stability": plot_stability, "geometry_lengths": plot_lengths}

call_with_a_run(__name__)
