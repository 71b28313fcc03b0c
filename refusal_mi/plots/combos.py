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
    figure.update_xaxes(title=f"CE loss on {plain(text_set)} (nats per token)", tickformat=".3~f")
    figure.update_yaxes(title="fraction of validation answers that refuse", range=[-0.05, 1.07], dtick=0.25)
    n = points[0].refusal.n if points else 0
    rule = "" if kl_max is None else f"winners need KL ≤ {kl_max:g} nats"
    parts = (plain(model), f"n = {n} harmful validation prompts", rule)
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
    # The others crowd around the same loss; hover names them.
    shown = points[0].kind == "combination" and points[0].is_allowed
    return go.Scatter(
        x=[point.ce_loss for point in points],
        y=[point.refusal.value for point in points],
        mode="markers+text" if shown else "markers",
        text=[point.label for point in points],
        textposition=["top center", "bottom center"] * (len(points) // 2) + ["top center"] * (len(points) % 2),
        textfont={"size": 11, "color": MUTED},
        name=group,
        marker={"symbol": symbol, "size": 11, "color": fill, "line": {"color": INK, "width": 1}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point.refusal.interval[1] - point.refusal.value for point in points],
            "arrayminus": [point.refusal.value - point.refusal.interval[0] for point in points],
            "color": "rgba(107,107,107,0.45)",
            "thickness": 1,
            "width": 0,
        },
        customdata=[[point.refusal.count, point.refusal.n, point.bypass, point.kl_nats] for point in points],
        hovertemplate=f"<b>%{{text}}</b> ({group})<br>refused: %{{customdata[0]}} of %{{customdata[1]}}"
        "<br>refusal score %{customdata[2]:.2f} nats<br>KL %{customdata[3]:.4f} nats"
        "<br>CE loss %{x:.4f} nats per token<extra></extra>",
    )
