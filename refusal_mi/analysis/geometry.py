"""How the candidate directions lie to each other and to the classes, how long they are, and how sure."""

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
from ..progress import track
from ..reading import template_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import check_named
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of, template_tokens
from .separation import MEASURES, class_measures, random_folds


@dataclass(frozen=True, eq=False, repr=False)
class GeometryResult(AnalysisResult):
    """Geometry of the difference in means at every position and layer; NaN where the two means do not differ.

    Examples:
        >>> found.cosines.diagonal().nanmean().round(decimals=6).item()
        1.0
        >>> found.measure("norm of r").allclose(found.norms, equal_nan=True)
        True
    """

    kind: ClassVar[str] = "geometry"
    units: ClassVar[Mapping[str, str]] = {
        "cosines": "cosine, -1 to 1",
        "cosines_null_p95": "|cosine|, 95th percentile over shuffled labels",
        "norms": "residual stream units",
        "norms_null_p95": "residual stream units, 95th percentile over shuffled labels",
        "stability": "mean cosine between a bootstrap direction and the full one",
        "stability_p05": "the same, 5th percentile",
        "shuffled_p95": "|cosine| between a shuffled-label direction and the full one, 95th percentile",
        "table": "as `separation.MEASURES`: residual stream units, cosines, fractions",
        "table_null_low": "the same with shuffled labels, 5th percentile",
        "table_null_high": "the same with shuffled labels, 95th percentile",
    }

    cosines: Float[Tensor, "candidate candidate"]
    """Candidates in the order of the grid: position by position, layer within."""
    cosines_null_p95: Float[Tensor, "candidate candidate"]
    norms: Float[Tensor, "pos layer"]
    norms_null_p95: Float[Tensor, "pos layer"]
    stability: Float[Tensor, "pos layer"]
    stability_p05: Float[Tensor, "pos layer"]
    shuffled_p95: Float[Tensor, "pos layer"]
    table: Float[Tensor, "measure pos layer"]
    """What `separation.class_measures` says of the two classes at every place."""
    table_null_low: Float[Tensor, "measure pos layer"]
    table_null_high: Float[Tensor, "measure pos layer"]
    measures: tuple[str, ...]
    positions: tuple[int, ...]
    position_tokens: tuple[str, ...]
    n_harmful: int
    n_harmless: int
    n_resamples: int

    def __post_init__(self) -> None:
        if self.norms.numel() != len(self.cosines) or len(self.norms) != len(self.positions):
            raise ValueError(f"{len(self.cosines)} candidates do not fill a grid of {tuple(self.norms.shape)}")

    def measure(self, name: str) -> Float[Tensor, "pos layer"]:
        """One row of the table, such as "silhouette"."""
        check_named("measure", name, self.measures)
        return self.table[self.measures.index(name)]

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
    """Cosines between all candidates with a null band, their norms, their self-consistency, and a table of the classes.

    Neighboring layers share most of their stream, so that even directions of shuffled labels have high cosines
    there: only what exceeds the null band says something about refusal. Bootstrap samples are drawn with replacement
    inside each class. A shuffle puts half of each class on either side, so that nothing of their difference is left
    (after a plain shuffle, which is never quite balanced, some of it is). The table (`to_frame("table")`) has the norms
    and cosines of both means and r, signal to noise, purity, silhouette and held-out linear separability of every
    place, each beside what plain shuffles of the labels give.

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
    table = _table(residuals, len(harmful), n_resamples, seed)
    return GeometryResult(
        _gram(units),
        torch.stack([_gram(_unit(one)).abs() for one in shuffled]).quantile(0.95, dim=0),
        torch.where(missing, 0.0, norms),
        shuffled_norms.quantile(0.95, dim=0),
        again.mean(0),
        again.quantile(0.05, dim=0),
        mixed.quantile(0.95, dim=0),
        table[..., 0],
        table[..., 1:].quantile(0.05, dim=-1),
        table[..., 1:].quantile(0.95, dim=-1),
        MEASURES,
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


def _table(
    residuals: Float[Tensor, "prompt pos layer d_model"], n_harmful: int, n_shuffles: int, seed: int
) -> Float[Tensor, "measure pos layer labeling"]:
    """The measures of the true labels, which come first, and of shuffled ones, place by place."""
    n, n_positions, n_layers, _ = residuals.shape
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(n) < n_harmful
    labels = torch.stack([true, *(true[torch.randperm(n, generator=generator)] for _ in range(n_shuffles))])
    folds = random_folds(n, generator)
    places = [(pos, layer) for pos in range(n_positions) for layer in range(n_layers)]
    found = [class_measures(residuals[:, pos, layer], labels, folds) for pos, layer in track(places, "two classes")]
    return torch.stack(found, dim=1).unflatten(1, (n_positions, n_layers))


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
    """Cosine between every two candidates, beside the 95th percentile of its size with shuffled labels.

    Examples:
        >>> plot_geometry(found).layout.title.text
        'Cosines between the candidate directions'
    """
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
    """Cosine of bootstrap directions with the full one, and of shuffled-label directions as their control.

    Examples:
        >>> plot_stability(found).layout.yaxis.title.text
        'cosine with the direction of all prompts'
    """
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
    """Length of the candidates over that of shuffled-label directions.

    Examples:
        >>> plot_lengths(found).layout.yaxis.title.text
        'length / 95th percentile of shuffled labels'
    """
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


_SHOWN = ("cosine of the means", "signal to noise", "purity", "silhouette", "held-out accuracy")


def plot_geometry_table(result: GeometryResult, **look: Unpack[draw.Look]) -> go.Figure:
    """What tells the classes apart at every position, by layer, over the range that shuffled labels give.

    Examples:
        >>> plot_geometry_table(found).layout.title.text
        'The two classes at every place'
    """
    layers = _layers(result)
    figure = draw.panels(list(_SHOWN), gap=0.045, shares_y=False)
    name = "shuffled labels, 5th to 95th percentile (range over positions)"
    for column, measure in enumerate(_SHOWN, start=1):
        place, row = {"row": 1, "col": column}, result.measures.index(measure)
        low, high = result.table_null_low[row], result.table_null_high[row]
        there = [layer for layer in layers if not bool(low[:, layer].isnan().all())]
        if there:
            least = [low[:, layer].nan_to_num(torch.inf).min().item() for layer in there]
            most = [high[:, layer].nan_to_num(-torch.inf).max().item() for layer in there]
            figure.add_trace(draw.band(there, least, most, name, draw.CONTROL), **place)
            draw.add_line(figure, there, most, name, draw.CONTROL, "shuffled, up to %{y:.3f}", None, **place)
        for index, (position, style) in enumerate(draw.position_styles(result.positions, result.position_tokens)):
            hover = f"<b>{measure}</b><br>position {position}, layer %{{x}}<br>%{{y:.3f}}, shuffled %{{customdata}}"
            limits = zip(low[index].tolist(), high[index].tolist(), strict=True)
            custom = [f"{draw.number(least, 3)} to {draw.number(most, 3)}" for least, most in limits]
            values = draw.gaps(result.table[row, index])
            draw.add_line(figure, layers, values, position, style, hover, custom, **place)
    draw.layer_axis(figure, "layer")
    figure.update_yaxes(title="value", row=1, col=1)
    about = draw.subtitle(result.model_name, _counts(result), f"{result.n_resamples} shuffles")
    title = "The two classes at every place"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _layers(result: GeometryResult) -> list[int]:
    return list(range(result.norms.shape[1]))


def _counts(result: GeometryResult) -> str:
    return draw.counted({"harmful": result.n_harmful, "harmless": result.n_harmless})


FIGURES = {
    "geometry": plot_geometry,
    "geometry_table": plot_geometry_table,
    "geometry_stability": plot_stability,
    "geometry_lengths": plot_lengths,
}

call_with_a_run(__name__)
