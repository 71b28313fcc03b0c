"""Refusal against cost, one point per ablated combination of directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go

from ..stats import Rate
from .style import ACCENT, INK, MUTED, finish, plain

Kind = Literal["combination", "random", "plain model"]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
_FILLS = ("#ffffff", "#33508f", "#c9d3ea", "#8a8a8a", "#1a1a1a")
_NARROW_PLOT = 700
"""Width (px) of the plot that labels are kept apart for; in a wider one they lie further apart."""


@dataclass(frozen=True)
class CombinationPoint:
    """What ablating one combination did on validation prompts."""

    label: str
    """Its ranks, such as 0-2."""
    kind: Kind
    n_directions: int
    refusal: Rate
    """Of short answers to harmful prompts."""
    bypass: float
    """Mean refusal score (nats) on harmful prompts."""
    kl_nats: float
    ce_loss: float
    """Nats per token."""
    is_allowed: bool
    """Whether its KL is within the limit."""
    is_winner: bool = False

    @property
    def group(self) -> str:
        """Its name in the legend."""
        if self.kind != "combination":
            return "random span" if self.kind == "random" else "plain model"
        size = "single direction" if self.n_directions == 1 else f"{self.n_directions} directions"
        return size if self.is_allowed else f"{size}, KL over the limit"


def plot_combos(
    points: Sequence[CombinationPoint], *, text_set: str, kl_max: float | None, model: str = ""
) -> go.Figure:
    """Refusal rate (with 95% Wilson intervals) against CE loss on plain text; the winner is ringed.

    Args:
        text_set: what the CE loss is measured on.
        kl_max: the limit that decides which combinations may win (nats); None is none.
    """
    figure = go.Figure()
    groups = list(dict.fromkeys(point.group for point in points))
    for group in groups:
        figure.add_trace(_trace(group, [point for point in points if point.group == group]))
    for winner in (point for point in points if point.is_winner):
        ring = {"color": "rgba(0,0,0,0)", "size": 21, "symbol": "circle", "line": {"color": ACCENT, "width": 2}}
        place = {"x": [winner.ce_loss], "y": [winner.refusal.value], "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(**place, mode="markers", name=f"winner, {winner.label}", marker=ring))
        groups.append(f"winner, {winner.label}")
    _label(figure, points)
    figure.update_xaxes(title=f"CE loss on {plain(text_set)} (nats per token)", tickformat=".3~f")
    figure.update_yaxes(title="fraction of validation answers that refuse", range=[-0.05, 1.07], dtick=0.25)
    n = points[0].refusal.n if points else 0
    rule = "" if kl_max is None else f"winners need KL ≤ {kl_max:g} nats"
    parts = (plain(model), f"n = {n} harmful validation prompts", "95% intervals", rule)
    return finish(
        figure,
        title="Refusal against cost, by ablated directions",
        about=" · ".join(part for part in parts if part),
        height=420,
        legend_names=groups,
        width=1080,
    )


def _trace(group: str, points: Sequence[CombinationPoint]) -> go.Scatter:
    size = min(points[0].n_directions, len(_SYMBOLS))
    symbol = {"random": "x", "plain model": "star"}.get(points[0].kind, _SYMBOLS[size - 1])
    fill = {"random": MUTED, "plain model": ACCENT}.get(points[0].kind, _FILLS[size % len(_FILLS)])
    if not points[0].is_allowed:
        symbol, fill = f"{symbol}-open", INK
    return go.Scatter(
        x=[point.ce_loss for point in points],
        y=[point.refusal.value for point in points],
        mode="markers",
        text=[point.label for point in points],
        name=group,
        marker={"symbol": symbol, "size": 11, "color": fill, "line": {"color": INK, "width": 1}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point.refusal.interval[1] - point.refusal.value for point in points],
            "arrayminus": [point.refusal.value - point.refusal.interval[0] for point in points],
            "color": "rgba(107,107,107,0.8)",
            "thickness": 1,
            "width": 4,
        },
        customdata=[[point.refusal.count, point.refusal.n, point.bypass, point.kl_nats] for point in points],
        hovertemplate=f"<b>%{{text}}</b> ({group})<br>refused: %{{customdata[0]}} of %{{customdata[1]}}"
        "<br>refusal score %{customdata[2]:.2f} nats<br>KL %{customdata[3]:.4f} nats"
        "<br>CE loss %{x:.4f} nats per token<extra></extra>",
    )


def _label(figure: go.Figure, points: Sequence[CombinationPoint]) -> None:
    """Name the allowed combinations above their intervals (below, near the top), each clear of its right neighbors."""
    if not points:
        return
    losses = [point.ce_loss for point in points]
    per_pixel = (max(losses) - min(losses)) / _NARROW_PLOT
    placed: list[tuple[float, bool, int]] = []
    named = [point for point in points if point.kind == "combination" and point.is_allowed]
    for point in sorted(named, key=lambda each: -each.ce_loss):
        is_high = point.refusal.value > 0.7
        end = point.ce_loss + per_pixel * (7 * len(point.label) + 8)
        level = 1 + max((at for x, side, at in placed if side == is_high and x <= end), default=-1)
        placed.append((point.ce_loss, is_high, level))
        shift = 9 + 14 * level
        figure.add_annotation(
            x=point.ce_loss,
            y=point.refusal.interval[0 if is_high else 1],
            text=plain(point.label),
            ax=0,
            ay=shift if is_high else -shift,
            xanchor="left",
            font={"size": 11, "color": MUTED},
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor="rgba(107,107,107,0.4)",
            borderpad=0,
        )
