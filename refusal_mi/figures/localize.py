"""Where a direction has to be removed: what each write alone does, and refusals against cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, Unpack, runtime_checkable

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from . import style as draw

_PARTS = (("hook_resid_pre", "embed"), ("hook_attn_out", "attention"), ("hook_mlp_out", "MLP"))
_LEAST_KL = 1e-6
"""Where the logarithmic axis of KL ends."""


@runtime_checkable
class Point(Protocol):
    """A removal in the figure."""

    @property
    def label(self) -> str: ...
    @property
    def refused(self) -> float: ...
    @property
    def kl_nats(self) -> float: ...


def plot_writes(
    writes: Mapping[str, tuple[float, float]], plain: float, *, model: str = "", **look: Unpack[draw.Look]
) -> go.Figure:
    """Change of the harmful prompts' refusal score, and KL, where one write alone loses the direction.

    Examples:
        >>> figure = plot_writes({"blocks.0.hook_resid_pre": (5.0, 0.001), "blocks.0.hook_attn_out": (2.0, 0.02)}, 6.0)
        >>> figure.layout.title.text
        'One write at a time'

    Args:
        writes: hook point -> mean refusal score and KL (nats).
        plain: mean refusal score of the plain model on the same prompts (nats).
    """
    blocks = [int(name.split(".")[1]) for name in writes if name.startswith("blocks.")]
    layers = [str(block) for block in range(max(blocks) + 1)]
    tables = torch.full((2, len(_PARTS), len(layers)), math.nan, dtype=torch.float64)
    for name, (score, kl) in writes.items():
        column = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        row = next(index for index, (end, _) in enumerate(_PARTS) if name.endswith(end))
        tables[0, row, column], tables[1, row, column] = score - plain, kl
    titles = ["<b>refusal score of harmful prompts</b>, change", "<b>KL of harmless prompts</b>"]
    figure = make_subplots(2, 1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.2)
    rows = [name for _, name in _PARTS]
    for index, (values, digits) in enumerate(zip(tables, (2, 3), strict=True)):
        trace = draw.heatmap(
            values,
            layers,
            rows,
            "nats",
            hover="%{y} of block %{x}<br>%{z:.4f} nats",
            digits=digits,
            limits=draw.symmetric(values[~values.isnan()]) if index == 0 else None,
            colorbar={"len": 0.45, "y": 0.79 - 0.57 * index},
        )
        figure.add_trace(trace, row=index + 1, col=1)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="block", row=2, col=1)
    figure.update_annotations(font_size=13)
    about = draw.subtitle(model, "each cell: the direction removed from this write alone")
    return draw.finish(figure, title="One write at a time", about=about, height=240, look=look)


def plot_front(
    measured: Sequence[Point],
    front: Sequence[Point],
    whole: Point,
    least: Point,
    *,
    model: str = "",
    n: int = 0,
    **look: Unpack[draw.Look],
) -> go.Figure:
    """Expected share of refusals against KL, on validation prompts: every removal, the front, the whole ablation.

    Examples:
        >>> from types import SimpleNamespace
        >>> whole = SimpleNamespace(label="all blocks", refused=0.01, kl_nats=0.2)
        >>> least = SimpleNamespace(label="blocks 2:4", refused=0.02, kl_nats=0.01)
        >>> plot_front([whole, least], [least], whole, least).layout.title.text
        'Refusals and cost of removals'
    """
    figure, ink = go.Figure(), draw.INK
    named = (
        ("measured", measured, {"mode": "markers", "marker": {"size": 6, "color": "#b5a8cc"}}),
        ("none beats it in both", front, {"mode": "lines+markers", "line": {"color": "#6a3d9a", "shape": "hv"}}),
        ("all writes", [whole], {"mode": "markers", "marker": {"size": 12, "symbol": "square", "color": ink}}),
        (
            "least intervention",
            [least],
            {
                "mode": "markers",
                "marker": {"size": 16, "symbol": "star", "color": draw.CHOSEN, "line": {"color": ink, "width": 1.2}},
            },
        ),
    )
    for name, points, drawn in named:
        figure.add_trace(
            go.Scatter(
                x=[max(point.kl_nats, _LEAST_KL) for point in points],
                y=[point.refused for point in points],
                text=[draw.plain(point.label) for point in points],
                name=name,
                hovertemplate="%{text}<br>KL %{x:.5f} nats<br>refused %{y:.3f}<extra></extra>",
                **drawn,
            )
        )
    figure.update_xaxes(title="KL of harmless prompts (nats)", type="log", dtick=1, exponentformat="e")
    figure.update_yaxes(title="harmful prompts refused, expected share", range=[-0.04, 1.04])
    about = draw.subtitle(model, f"{n} validation prompts a side")
    names = [name for name, _, _ in named]
    return draw.finish(
        figure, title="Refusals and cost of removals", about=about, height=360, legend_names=names, look=look
    )
