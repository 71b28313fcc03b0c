"""What the refusal score says of prompts that the model itself refused or answered."""

from collections.abc import Mapping, Sequence
from typing import Unpack

import plotly.graph_objects as go

from .style import INK, MUTED, Look, counted, finish, group_style, number, plain, subtitle

_GOLDEN = 0.6180339887
"""Multiples of it, modulo 1, fill a line evenly: neighbors in score lie apart, the same in every run."""
_SPREAD = 0.62
"""Of a row's height that its points take."""


def plot_label_scores(
    scores: Mapping[str, Sequence[float]],
    is_refused: Mapping[str, Sequence[bool]],
    *,
    zero_point: float = 0.0,
    model: str = "",
    **look: Unpack[Look],
) -> go.Figure:
    """Refusal score of every prompt, in one row for each group and outcome; heights within a row mean nothing.

    Examples:
        >>> figure = plot_label_scores({"harmful": [2.5, -4.0]}, {"harmful": [True, False]}, zero_point=-0.8)
        >>> figure.layout.xaxis.title.text
        'refusal score, log-odds (nats)'

    Args:
        scores: group of prompts -> refusal scores (nats).
        is_refused: group -> whether the model refused the prompt, by the text of its answer.
        zero_point: the score above which a prompt is best told to be refused (`refusal_mi.zero_point`).
    """
    figure, rows = go.Figure(), [(group, refused) for group in scores for refused in (True, False)]
    marks = [("0, where P = 0.5", 0.0, INK, "6px,2px")]
    if zero_point != 0:
        marks.append((f"zero point {number(zero_point)}", zero_point, INK, "solid"))
    for name, at, color, dash in marks:
        mark = {"color": color, "dash": dash, "width": 1.8}
        figure.add_trace(go.Scatter(x=[at, at], y=[-0.5, len(rows) - 0.5], mode="lines", name=name, line=mark))
    labels = []
    for row, (group, refused) in enumerate(rows):
        values = sorted(v for v, flag in zip(scores[group], is_refused[group], strict=True) if bool(flag) == refused)
        heights = [row + _SPREAD * (_GOLDEN * index % 1 - 0.5) for index in range(len(values))]
        style, name = group_style(0 if refused else 1), f"{plain(group)}, {'refused' if refused else 'answered'}"
        labels.append(f"{name}<br>n = {len(values)}")
        figure.add_trace(
            go.Scatter(
                x=values,
                y=heights,
                mode="markers",
                name=name,
                showlegend=False,
                marker={"color": style.color, "symbol": style.symbol, "size": 7},
                hovertemplate=f"{name}<br>refusal score %{{x:.2f}} nats<extra></extra>",
            )
        )
    for edge in range(2, len(rows), 2):
        figure.add_hline(edge - 0.5, line={"color": MUTED, "width": 1})
    figure.update_xaxes(title="refusal score, log-odds (nats)")
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, range=[len(rows) - 0.5, -0.5], showgrid=False)
    about = subtitle(model, counted({group: len(values) for group, values in scores.items()}), "one point a prompt")
    title = "Refusal score of prompts that the model refused and answered"
    names = [name for name, *_ in marks]
    return finish(figure, title=title, about=about, height=72 * len(rows), legend_names=names, look=look)
