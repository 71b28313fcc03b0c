"""What the chosen direction does to answers, and what it costs in CE loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..loss import LossResult
from ..stats import Rate
from .style import INK, MUTED, finish, plain

Side = Literal["harmful", "harmless"]
_WIDE, _NARROW = 1080, 360
_BAR = 46


@dataclass(frozen=True)
class Effect:
    """What one intervention did to the answers to one set of prompts."""

    label: str
    """As in the names of the files: baseline, ablation, actadd, random_ablation_0, ..."""
    refusal: Rate
    degenerate: Rate


@dataclass(frozen=True)
class SideEffects:
    """The answers to one set of held-out prompts under every intervention."""

    side: Side
    set_name: str
    effects: tuple[Effect, ...]

    @property
    def title(self) -> str:
        """harmful prompts (advbench); the set is left out where it is called like its side."""
        return f"{self.side} prompts" + ("" if self.set_name == self.side else f" ({self.set_name})")

    def find(self, label: str) -> Effect | None:
        """The effect of this label, if it was measured."""
        return next((effect for effect in self.effects if effect.label == label), None)

    @property
    def controls(self) -> tuple[Effect, ...]:
        """The effects of random directions of equal norm."""
        return tuple(effect for effect in self.effects if effect.label.startswith("random"))


def intervention_name(label: str, side: Side) -> str:
    """A published label in words: activation addition subtracts on harmful prompts and adds on harmless ones."""
    added = "subtracted (−1)" if side == "harmful" else "added (+1)"
    if label.startswith("random"):
        done = "ablated" if "ablation" in label else added
        return f"random {label.rsplit('_', 1)[-1]} {done}"
    return {"baseline": "plain model", "ablation": "ablated", "actadd": added}.get(label, label)


def plot_rates(sides: Sequence[SideEffects], *, model: str = "", columns: Literal[1, 2] = 2) -> go.Figure:
    """Fraction of answers that refuse and that are degenerate text, with 95% Wilson intervals."""
    rows = 1 if columns == 2 else max(1, len(sides))
    titles = [
        f"<b>{side.side} prompts</b><br>"
        + ("" if side.set_name == side.side else f"{plain(side.set_name)}, ")
        + f"n = {_n(side)}"
        for side in sides
    ]
    figure = make_subplots(
        rows, max(1, min(columns, len(sides))), subplot_titles=titles, horizontal_spacing=0.2, vertical_spacing=0.2
    )
    for index, side in enumerate(sides):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for name, color, pattern in (("refused", "#33508f", ""), ("degenerate text", "#ffffff", "/")):
            rates = [effect.refusal if name == "refused" else effect.degenerate for effect in side.effects]
            figure.add_trace(_bars(side, name, rates, color, pattern, is_first=index == 0), **place)
        figure.update_xaxes(title="fraction of answers", range=[0, 1.04], dtick=0.25, **place)
        figure.update_yaxes(autorange="reversed", automargin=True, **place)
    figure.update_layout(bargap=0.25, bargroupgap=0.08)
    figure.update_annotations(font_size=13)
    height = rows * (_BAR * max((len(side.effects) for side in sides), default=1) + 24) + (rows - 1) * 80
    return finish(
        figure,
        title="Refusals and degenerate text",
        about=" · ".join(part for part in (plain(model), "bars with 95% Wilson intervals") if part),
        height=height,
        legend_names=["refused", "degenerate text"],
        top=116,
        width=_WIDE if columns == 2 else _NARROW,
    )


def plot_losses(losses: Mapping[str, Mapping[str, LossResult]], *, model: str = "", width: int = _WIDE) -> go.Figure:
    """Change of CE loss from the plain model under each intervention, for each set of texts.

    Args:
        losses: `[label][text set]`; the label `baseline` is the plain model.
        width: the width (px) that the legend is laid out for.
    """
    base = losses["baseline"]
    figure, names = go.Figure(), []
    fills = [("#33508f", ""), ("#c9d3ea", ""), ("#ffffff", "/"), ("#ffffff", "x"), ("#ffffff", "."), ("#8a8a8a", "")]
    for index, label in enumerate(label for label in losses if label != "baseline"):
        deltas = [losses[label][name].ce_loss - base[name].ce_loss for name in base]
        names.append(intervention_name(label, "harmful"))
        color, pattern = fills[min(index, len(fills) - 1)]
        figure.add_trace(
            go.Bar(
                x=[f"{'<br>'.join(plain(name).split('_'))}<br>{base[name].n_tokens:,} tokens" for name in base],
                y=deltas,
                name=names[-1],
                marker={"color": color, "line": {"color": INK, "width": 1}, "pattern": {"shape": pattern}},
                customdata=[[losses[label][name].ce_loss, base[name].ce_loss] for name in base],
                hovertemplate=f"<b>{names[-1]}</b>, %{{x}}<br>%{{customdata[0]:.4f}} against %{{customdata[1]:.4f}}"
                "<br>change %{y:+.4f} nats per token<extra></extra>",
            )
        )
    figure.add_hline(0, line={"color": MUTED, "width": 1})
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_yaxes(title="change of CE loss (nats per token)", tickformat="+.3~f")
    about = " · ".join(part for part in (plain(model), "difference from the plain model") if part)
    lines = max(len(name.split("_")) for name in base) + 1
    return finish(
        figure,
        title="Cost in cross-entropy loss",
        about=about,
        height=320,
        legend_names=names,
        width=width,
        label_lines=lines,
    )


def _bars(side: SideEffects, name: str, rates: Sequence[Rate], color: str, pattern: str, *, is_first: bool) -> go.Bar:
    intervals = [rate.interval for rate in rates]
    return go.Bar(
        y=[intervention_name(effect.label, side.side) for effect in side.effects],
        x=[rate.value for rate in rates],
        orientation="h",
        name=name,
        legendgroup=name,
        showlegend=is_first,
        marker={"color": color, "line": {"color": INK, "width": 1}, "pattern": {"shape": pattern, "fgcolor": MUTED}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - rate.value for rate, (_, high) in zip(rates, intervals, strict=True)],
            "arrayminus": [rate.value - low for rate, (low, _) in zip(rates, intervals, strict=True)],
            "color": INK,
            "thickness": 1.3,
            "width": 4,
        },
        customdata=[[rate.count, rate.n, *interval] for rate, interval in zip(rates, intervals, strict=True)],
        hovertemplate=f"<b>%{{y}}</b><br>{name}: %{{customdata[0]}} of %{{customdata[1]}} = %{{x:.3f}}"
        "<br>95% interval %{customdata[2]:.3f} to %{customdata[3]:.3f}<extra></extra>",
    )


def _n(side: SideEffects) -> int:
    return side.effects[0].refusal.n if side.effects else 0
