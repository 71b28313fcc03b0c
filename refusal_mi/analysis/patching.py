"""Activation patching between harmful and harmless prompts, whole and along a direction only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack, get_args

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..model.points import HookedModel, check_raw_basis
from ..run.folder import RunInputs
from ..stats import bootstrap_interval, ratio_of_means
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .patched_runs import PatchedRuns, Site, check_sites
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of, template_tokens

Way = Literal["into harmless", "into harmful"]
WAYS: tuple[Way, ...] = get_args(Way)
MIN_GAP, MIN_EFFECT = 1e-6, 0.1
MAX_PAIRS = 32


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult(AnalysisResult):
    """Refusal scores of patched prompts, pair by pair, with the scores that they lie between.

    Cells are `[layer, post-instruction position]`, rows as in `layers`; for heads `[layer, head]`, each patched at all
    post-instruction positions at once.

    Examples:
        >>> found.sites, found.layers, found.n_pairs
        (('resid', 'attn', 'mlp', 'heads'), (0, 2), 2)
        >>> found.effects(found.sites[0]).shape == (len(found.layers), len(found.positions))
        True
    """

    kind: ClassVar[str] = "patching"
    units: ClassVar[Mapping[str, str]] = {
        name: "refusal score, log-odds (nats)"
        for name in ("patched", "directional", "controls", "harmful_scores", "harmless_scores")
    }

    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    """The blocks that were patched: the second axis from the right."""
    positions: tuple[int, ...]
    position_tokens: tuple[str, ...]
    patched: dict[str, Tensor]
    """Site -> `[way pair layer cell]`, float64: the ways are "into harmless", "into harmful"."""
    directional: dict[str, Tensor]
    """Site -> `[way pair layer cell]`: only the component along the direction patched; empty without a direction."""
    controls: dict[str, Tensor]
    """Site -> `[pair layer cell]`: another harmless prompt's activations patched into the harmless one."""
    harmful_scores: Float[Tensor, " pair"]
    harmless_scores: Float[Tensor, " pair"]

    def __post_init__(self) -> None:
        for site in self.sites:
            if self.patched[site].shape[:3] != (len(WAYS), self.n_pairs, len(self.layers)):
                raise ValueError(f"patching of {site!r} has shape {tuple(self.patched[site].shape)}")

    @property
    def n_pairs(self) -> int:
        return len(self.harmful_scores)

    @property
    def gap_nats(self) -> float:
        """Mean refusal score of the harmful prompts minus that of the harmless ones."""
        return (self.harmful_scores.mean() - self.harmless_scores.mean()).item()

    def effects(self, site: Site, way: Way = "into harmless") -> Float[Tensor, "layer cell"]:
        """(patched − target) / (source − target) of mean refusal scores: 0 nothing, 1 the source's whole score."""
        return self._shifts(self.patched[site], way).mean(0)

    def directional_effects(self, site: Site, way: Way = "into harmless") -> Float[Tensor, "layer cell"]:
        """`effects` of patching the component along the direction only."""
        return self._shifts(self.directional[site], way).mean(0)

    def control_effects(self, site: Site) -> Float[Tensor, "layer cell"]:
        """The shift that another harmless prompt causes, in units of the harmful–harmless gap."""
        return (self.controls[site] - self.harmless_scores[:, None, None]).mean(0) / self.gap_nats

    def interval(self, site: Site, layer: int, cell: int, way: Way = "into harmless") -> tuple[float, float]:
        """95% interval of an effect, a ratio of means, over pairs (BCa bootstrap; the gap is drawn with the shift)."""
        gaps = self.harmful_scores - self.harmless_scores
        shifts = self._shifts(self.patched[site], way)[:, layer, cell] * self.gap_nats
        _, low, high = bootstrap_interval(shifts.tolist(), gaps.tolist(), statistic=ratio_of_means)
        return low, high

    def shares(self, site: Site, way: Way = "into harmless") -> Float[Tensor, "layer cell"]:
        """Directional effect / effect: the share that the direction explains; NaN where the effect is below 0.1."""
        whole = self.effects(site, way)
        share = self.directional_effects(site, way) / whole
        return share.masked_fill(whole < MIN_EFFECT, float("nan"))

    def _shifts(self, scores: Float[Tensor, "way pair layer cell"], way: Way) -> Float[Tensor, "pair layer cell"]:
        inward = way == "into harmless"
        target = self.harmless_scores if inward else self.harmful_scores
        shift = scores[WAYS.index(way)] - target[:, None, None]
        return shift / (self.gap_nats if inward else -self.gap_nats)


def patch_activations(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: Sequence[int],
    *,
    sites: Sequence[Site] = ("resid", "attn", "mlp", "heads"),
    direction: Direction | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> PatchingResult:
    """Put one prompt's activations into its partner's run, cell by cell, and read the refusal score.

    Prompts are paired in order and aligned from the right, so only post-instruction positions, which all prompts
    share, are patched. With a direction, also x + r̂ r̂ᵀ(x_source − x) in place of x_source (not for heads, which
    are patched before W_O). Controls put in the activations of the next harmless prompt.

    Examples:
        >>> found = patch_activations(model, chat, harmful[:2], harmless[:2], [5, 7], layers=[0, 2])
        >>> figure = plot_patching(found)

    Args:
        layers: blocks to patch; all by default.

    Raises:
        UserError: the sides differ in number or not in score, or the model has no such site or layer.
    """
    if direction is not None:
        check_in_stream(direction)
    check_raw_basis(model)
    check_sites(model, sites)
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    layers = range(model.cfg.n_layers) if layers is None else layers
    if len(harmful) != len(harmless) or len(harmful) < 2:
        raise UserError(
            f"patching needs pairs, at least 2, not {len(harmful)} harmful and {len(harmless)} harmless prompts"
        )
    run = PatchedRuns(model, chat, sites, layers, direction, refusal_tokens, batch_size)
    next_harmless = [*harmless[1:], harmless[0]]
    harmless_scores, inward = run.patch(harmful, harmless, "patching harmful into harmless")
    harmful_scores, outward = run.patch(harmless, harmful, "patching harmless into harmful")
    _, control = run.patch(next_harmless, harmless, "patching harmless into harmless", with_direction=False)
    if abs((harmful_scores.mean() - harmless_scores.mean()).item()) < MIN_GAP:
        raise UserError("both sides have the same mean refusal score: there is no effect to normalize by")
    settings = {"direction": None if direction is None else direction.describe(), "tokens": list(refusal_tokens)}
    return PatchingResult(
        tuple(sites),
        tuple(layers),
        chat.positions,
        template_tokens(chat),
        {site: torch.stack([inward[site, False], outward[site, False]]) for site in sites},
        {site: torch.stack([inward[site, True], outward[site, True]]) for site in sites if (site, True) in inward},
        {site: control[site, False] for site in sites},
        harmful_scores,
        harmless_scores,
        provenance=provenance_of(model, chat, {"harmful": harmful, "harmless": harmless}, settings),
    )


def from_run(run: RunInputs) -> PatchingResult:
    """Patching between held-out harmful and harmless prompts, also along the chosen direction."""
    harmful, harmless = prompts_of(run, n=MAX_PAIRS).values()
    n = min(len(harmful), len(harmless))
    return patch_activations(
        run.model,
        run.chat,
        harmful[:n],
        harmless[:n],
        run.refusal_tokens,
        direction=run.direction,
        batch_size=run.batch_size,
    )


_UNIT = "effect (fraction of the gap)"
_LIMITS = (-1.0, 1.0)
_SHOWN = 0.05
"""Effects below are not printed in the narrow cells."""
_MAX_COLUMNS_WITH_TEXT = 12
_NAMES = {"resid": "stream", "attn": "attention", "mlp": "MLP", "resid_mid": "stream between", "heads": "heads"}


def plot_patching(result: PatchingResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Normalized effect at every layer and post-instruction position: both ways, and the control.

    Examples:
        >>> plot_patching(found).layout.title.text
        'Activation patching: share of the refusal score that one activation carries over'
    """
    sites: list[Site] = [site for site in result.sites if site != "heads"] or ["heads"]
    titles = [f"<b>{_NAMES[site]}</b>, {what}" for what in (*map(_way_text, WAYS), "control") for site in sites]
    figure = make_subplots(
        3,
        len(sites),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.1 if len(result.positions) < 8 else 0.05,
    )
    for column, site in enumerate(sites, start=1):
        tables = [
            *((result.effects(site, way), _intervals(result, site, way)) for way in WAYS),
            (result.control_effects(site), None),
        ]
        for row, (values, notes) in enumerate(tables, start=1):
            trace = _map(result, site, values, notes)
            trace.showscale = row == 1 and column == len(sites)
            figure.add_trace(trace, row=row, col=column)
    figure.update_xaxes(title="layer", row=3)
    figure.update_yaxes(title="position" if sites != ["heads"] else "head", col=1, automargin=True)
    draw.categories(figure)
    figure.update_annotations(font_size=13)
    figure.update_traces(colorbar={"len": 0.36, "y": 0.84})
    height = 3 * max(150, 30 * len(result.positions)) + 80
    about = _about(result, f"control: another harmless prompt · no number: below {_SHOWN:g}")
    title = "Activation patching: share of the refusal score that one activation carries over"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def plot_patching_heads(result: PatchingResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Normalized effect of every head, patched at all post-instruction positions; beside it the control.

    Examples:
        >>> plot_patching_heads(found).layout.yaxis.title.text
        'layer'

    Raises:
        UserError: the heads were not patched.
    """
    if "heads" not in result.sites:
        raise UserError("this result has no heads; patch with sites that include heads")
    tables = [result.effects("heads"), result.effects("heads", "into harmful"), result.control_effects("heads")]
    figure = draw.panels([*map(_way_text, WAYS), "control"], gap=0.03)
    largest = max(float(max(table.abs().max() for table in tables[:2])), 0.1)
    for column, values in enumerate(tables, start=1):
        heads = [f"H{head}" for head in range(values.shape[1])]
        layers = [str(layer) for layer in result.layers]
        hover = "layer %{y}, %{x}<br>effect %{z:.3f}"
        trace = draw.heatmap(values, heads, layers, _UNIT, hover=hover, limits=(-largest, largest))
        trace.showscale = column == 3
        figure.add_trace(trace, row=1, col=column)
    draw.categories(figure)
    figure.update_xaxes(title="head")
    figure.update_yaxes(title="layer", col=1)
    height = max(240, 30 * tables[0].shape[0])
    about = _about(result, "heads patched at all post-instruction positions; control: another harmless prompt")
    title = "Activation patching of single heads"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def plot_directional(result: PatchingResult, **look: Unpack[draw.Look]) -> go.Figure:
    """At each layer's best position: effect of the whole stream, and of its component along the direction alone.

    Examples:
        >>> plot_directional(found).layout.title.text
        'Directional patching: what of the effect goes through the direction'

    Raises:
        UserError: nothing was patched along a direction.
    """
    if "resid" not in result.directional:
        raise UserError("this result has no directional patching of resid; call patch_activations with direction=...")
    figure = draw.panels([_way_text(way) for way in WAYS])
    for column, way in enumerate(WAYS, start=1):
        place: dict[str, Any] = {"row": 1, "col": column}
        whole, along = result.effects("resid", way), result.directional_effects("resid", way)
        best = whole.argmax(1)
        rows, layers = range(len(whole)), list(result.layers)
        names = [draw.position_label(result.positions[cell], result.position_tokens[cell]) for cell in best.tolist()]
        for index, (name, values) in enumerate((("whole stream", whole), ("component along the direction", along))):
            hover = f"<b>{name}</b>, layer %{{x}}, position %{{customdata}}<br>effect %{{y:.3f}}"
            chosen = values[rows, best].tolist()
            draw.add_line(figure, layers, chosen, name, draw.other_style(index), hover, names, **place)
        if way == "into harmless":
            hover = "control, layer %{x}<br>effect %{y:.3f}"
            control = result.control_effects("resid")[rows, best].tolist()
            draw.add_line(figure, layers, control, "another harmless prompt", draw.CONTROL, hover, **place)
        draw.zero_line(figure, **place)
        draw.zero_line(figure, 1.0, **place)
    draw.layer_axis(figure)
    figure.update_yaxes(title=_UNIT, row=1, col=1)
    about = _about(result, "position with the largest effect at each layer")
    title = "Directional patching: what of the effect goes through the direction"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _map(
    result: PatchingResult, site: Site, values: Float[Tensor, "layer cell"], notes: list[list[str]] | None
) -> go.Heatmap:
    labels = [
        draw.position_label(position, token)
        for position, token in zip(result.positions, result.position_tokens, strict=True)
    ]
    if site == "heads":
        labels = [f"H{head}" for head in range(values.shape[1])]
    layers = [str(layer) for layer in result.layers]
    hover = f"{_NAMES[site]}, layer %{{x}}, %{{y}}<br>effect %{{z:.3f}}" + (" %{customdata}" if notes else "")
    trace = draw.heatmap(values.T, layers, labels, _UNIT, hover=hover, custom=notes, limits=_LIMITS)
    trace.text = [[draw.number(value) if abs(value) >= _SHOWN else "" for value in row] for row in values.T.tolist()]
    trace.texttemplate = "%{text}" if len(layers) <= _MAX_COLUMNS_WITH_TEXT else None
    trace.textfont.size = 11 if len(layers) <= 8 else 9
    return trace


def _intervals(result: PatchingResult, site: Site, way: Way) -> list[list[str]]:
    n_layers, n_cells = result.effects(site, way).shape
    rows = [[result.interval(site, layer, cell, way) for layer in range(n_layers)] for cell in range(n_cells)]
    return [["[unbounded]" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]" for low, high in row] for row in rows]


def _way_text(way: Way) -> str:
    return "harmful → harmless" if way == "into harmless" else "harmless → harmful"


def _about(result: PatchingResult, note: str = "") -> str:
    return draw.subtitle(
        result.model_name, f"n = {result.n_pairs} pairs", f"gap {result.gap_nats:.3g} nats".replace("-", "−"), note
    )


FIGURES = {
    "patching": plot_patching,
    "patching_heads": plot_patching_heads,
    "patching_directional": plot_directional,
}

call_with_a_run(__name__)
