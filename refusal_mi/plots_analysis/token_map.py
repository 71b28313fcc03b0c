"""One prompt, token by token and layer by layer."""

import html

import plotly.graph_objects as go

from ..analysis.token_map import TokenMapResult
from ..plots.style import finish, plain, token_text
from .parts import WIDTH, heatmap, shortened, subtitle, with_room_below


def plot_token_map(result: TokenMapResult) -> go.Figure:
    """Cosine of the stream with the direction at every token and layer; hover has the projection and the control."""
    n_tokens, n_layers = result.cosines.shape
    labels = [f"{index} {plain(token_text(token))}" for index, token in enumerate(result.tokens)]
    control = result.control_cosines.T.tolist()
    custom = [
        [[p, c] for p, c in zip(*rows, strict=True)]
        for rows in zip(result.projections.T.tolist(), control, strict=True)
    ]
    largest = max(float(result.cosines.abs().max()), 1e-12)
    hover = (
        "token %{x}<br>layer %{y}<br>cosine %{z:.4f}<br>projection %{customdata[0]:.4g}"
        "<br>random direction: cosine %{customdata[1]:.4f}"
    )
    figure = go.Figure(
        heatmap(
            result.cosines.T,
            labels,
            [str(layer) for layer in range(n_layers)],
            "cos(x, r̂)",
            hover=hover,
            custom=custom,
            limits=(-largest, largest),
        )
    )
    figure.add_vline(n_tokens - result.n_template - 0.5, line={"color": "#1a1a1a", "width": 2, "dash": "dash"})
    figure.update_xaxes(title="token (right of the dashed line: the template after the instruction)", type="category")
    figure.update_xaxes(tickangle=-90)
    figure.update_yaxes(title="layer (stream entering the block)", type="category")
    about = subtitle(result.model_name, "1 prompt") + f": “{shortened(result.prompt)}”"
    title = "The direction along one prompt"
    figure = finish(figure, title=title, about=about, height=max(260, 30 * n_layers), legend_names=[], width=WIDTH)
    return with_room_below(figure, [html.unescape(label) for label in labels])


FIGURES = {"token_map": plot_token_map}
