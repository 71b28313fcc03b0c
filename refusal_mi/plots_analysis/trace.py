"""The direction through an answer, before and after interventions."""

import circuitsvis
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..analysis.trace import TraceResult
from ..plots.style import finish, plain
from .pages import SIGNS, View, page, shown_tokens
from .parts import WIDTH, band, group_style, line, shortened, subtitle, zero_line

_UNIT = "⟨x, r̂⟩ (residual stream units)"
_MAX_VIEWS = 12


def plot_trace(result: TraceResult) -> go.Figure:
    """Mean ± SD of the projection at every token of the answer, one panel a group; the template's tokens come first."""
    groups = list(dict.fromkeys(result.groups))
    titles = [f"<b>{group} prompts</b> (n = {result.groups.count(group)})" for group in groups]
    figure = make_subplots(1, len(groups), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    x = [index - result.n_template + 1 for index in range(result.values.shape[-1])]
    for column, group in enumerate(groups, start=1):
        place = {"row": 1, "col": column}
        for index, condition in enumerate(result.conditions):
            mean, sd, count = result.means(condition, group)
            shown = int((count > 0).sum())
            low, high = (mean - sd)[:shown].tolist(), (mean + sd)[:shown].tolist()
            figure.add_trace(band(x[:shown], low, high, condition, group_style(index)), **place)
            hover = f"<b>{condition}</b>, token %{{x}}<br>%{{y:.3f}}, %{{customdata:.0f}} answers<extra></extra>"
            means, counts = mean[:shown].tolist(), count[:shown].tolist()
            trace = line(x[:shown], means, condition, group_style(index), customdata=counts, hovertemplate=hover)
            trace.marker.size = 5
            trace.showlegend = column == 1
            figure.add_trace(trace, **place)
        zero_line(figure, **place)
        figure.add_vline(0.5, line={"color": "#1a1a1a", "width": 1, "dash": "dot"}, **place)
    figure.update_xaxes(title="token of the answer (template tokens up to 0)")
    figure.update_yaxes(title=_UNIT, row=1, col=1)
    figure.update_annotations(font_size=13)
    about = subtitle(
        result.model_name, f"stream entering layer {result.layer}", "bands: ± 1 SD over the answers that long"
    )
    title = "The direction through the answer"
    names = list(result.conditions)
    return finish(figure, title=title, about=about, height=360, legend_names=names, width=WIDTH, top=104)


def trace_page(result: TraceResult) -> str:
    """Answers as colored tokens, every prompt under every condition, all on one scale."""
    finite = result.values[~result.values.isnan()]
    largest = max(float(finite.abs().max()), 1e-12)
    per_prompt = len(result.conditions)
    views = []
    for prompt in range(min(len(result.prompts), max(1, _MAX_VIEWS // per_prompt))):
        for index, condition in enumerate(result.conditions):
            tokens = result.tokens[index][prompt]
            values = result.values[index, prompt, : len(tokens)]
            view = circuitsvis.tokens.colored_tokens(
                shown_tokens(tokens), values, min_value=-largest, max_value=largest
            )
            views.append(View(f"{result.groups[prompt]} prompt {prompt + 1}, {condition}", view))
    about = f"{result.model_name} · {_UNIT} at layer {result.layer} · {SIGNS}, up to ±{largest:.3g}"
    return page("The direction through the answer", about, views)


def plot_trace_single(result: TraceResult) -> go.Figure:
    """The projection at every token of the first prompt's answers, with the tokens on hover."""
    figure = go.Figure()
    for index, condition in enumerate(result.conditions):
        tokens = result.tokens[index][0]
        x = [place - result.n_template + 1 for place in range(len(tokens))]
        y = result.values[index, 0, : len(tokens)].tolist()
        labels = [shortened(token) for token in shown_tokens(tokens)]
        hover = f"<b>{condition}</b>, token %{{x}} '%{{customdata}}'<br>%{{y:.3f}}<extra></extra>"
        figure.add_trace(line(x, y, condition, group_style(index), customdata=labels, hovertemplate=hover))
    zero_line(figure)
    figure.add_vline(0.5, line={"color": "#1a1a1a", "width": 1, "dash": "dot"})
    figure.update_xaxes(title="token of the answer (template tokens up to 0)")
    figure.update_yaxes(title=_UNIT)
    about = (
        subtitle(result.model_name, f"stream entering layer {result.layer}", f"prompt 1 of {len(result.prompts)}")
        + f": “{shortened(result.prompts[0])}” ({plain(result.groups[0])})"
    )
    title = "The direction through one answer"
    names = list(result.conditions)
    return finish(figure, title=title, about=about, height=340, legend_names=names, width=WIDTH)


FIGURES = {"trace": plot_trace, "trace_single": plot_trace_single, "trace_tokens": trace_page}
