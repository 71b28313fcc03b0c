"""Every figure can be read at every width: words apart and inside, numbers that contrast, one look for all."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

from refusal_mi.analysis.result import AnalysisResult
from refusal_mi.errors import UserError
from refusal_mi.figures.fit import laid_out, text_width, wrapped
from refusal_mi.figures.scores import plot_score_lines, plot_scores
from refusal_mi.figures.style import COOL, DIVERGING, INK, SEQUENTIAL, WARM, finish, group_styles, heatmap
from refusal_mi.stats import mean_interval
from tests.helpers.browser import Page, find_chromium, open_browser
from tests.helpers.cases import analyses
from tests.helpers.figures import every_figure, plot_functions, text_boxes
from tests.helpers.runs import N_LAYERS, make_scores

WIDTHS = (350, 600, 1100)


@pytest.fixture(scope="module")
def results(tiny_model) -> dict[str, AnalysisResult]:
    return {kind: make() for kind, make in analyses(tiny_model("llama")).items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium on PATH")
    with open_browser(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page


def shown(browser: Page, figures: dict[str, go.Figure], folder: Path, width: int) -> list[dict[str, Any]]:
    """The boxes of all texts of some figures, drawn below each other in one page."""
    (folder / "plotly.min.js").write_text(get_plotlyjs(), "utf-8")
    plots = "".join(
        f'<div id="{name}"></div><script>(f => Plotly.newPlot("{name}", f.data, f.layout))({figure.to_json()})</script>'
        for name, figure in figures.items()
    )
    page = folder / "page.html"
    page.write_text(f'<meta charset="utf-8"><script src="plotly.min.js"></script>{plots}', "utf-8")
    browser.open(page, width=max(width, 600))
    assert not browser.problems
    return text_boxes(browser)


def faults(boxes: list[dict[str, Any]]) -> list[str]:
    """Texts that lie on each other (by more than a pixel, or two of a line's height), or leave their figure."""
    found = []
    for index, a in enumerate(boxes):
        if a["left"] < -1 or a["top"] < -1 or a["right"] > a["width"] + 1 or a["bottom"] > a["height"] + 1:
            found.append(f"{a['figure']}: {a['text']!r} is cut")
        for b in boxes[index + 1 :]:
            across = min(a["right"], b["right"]) - max(a["left"], b["left"])
            down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            if a["figure"] == b["figure"] and across > 1 and down > 2:
                found.append(f"{a['figure']}: {a['text']!r} lies on {b['text']!r}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_words_lie_on_each_other_or_are_cut(browser, results, tmp_path, width):
    figures = every_figure(results, width=width)
    assert set(figures) == plot_functions()
    boxes = shown(browser, figures, tmp_path, width)
    assert {box["figure"] for box in boxes} == set(figures) and {box["width"] for box in boxes} == {width}
    assert faults(boxes) == []


@pytest.mark.slow
def test_a_figure_that_is_only_squeezed_is_seen(browser, tmp_path):
    figure = plot_scores(make_scores(), tokens=["some token"] * 5)
    squeezed = go.Figure(figure).update_layout(width=350)
    assert len(faults(shown(browser, {"figure": squeezed}, tmp_path, 350))) > 2
    fitting = laid_out(go.Figure(figure), width=350)
    assert faults(shown(browser, {"figure": fitting}, tmp_path, 350)) == []


def test_every_figure_takes_the_same_look(results):
    usual = every_figure(results)
    assert set(usual) == plot_functions()
    look = {"title": "A <b> title", "width": 700, "height": 2600, "font_size": 11, "template": "plotly_dark"}
    for name, figure in every_figure(results, **look).items():
        layout = figure.layout
        assert (layout.title.text, layout.width, layout.font.size) == ("A &lt;b&gt; title", 700, 11), name
        assert layout.height == pytest.approx(2600, abs=1) and layout.paper_bgcolor is None, name
        assert layout.template.layout.paper_bgcolor == "rgb(17,17,17)", name
        assert usual[name].layout.width is None and usual[name].layout.paper_bgcolor == "white", name
    assert every_figure({}, title="")["plot_rates"].layout.title.text == ""


@pytest.mark.parametrize(
    ("look", "message"),
    [({"witdh": 3}, "did you mean 'width'"), ({"height": 90}, "leaves no room"), ({"width": 0}, "above 0")],
)
def test_what_is_no_look_is_one_line(look, message):
    with pytest.raises(UserError, match=message):
        plot_scores(make_scores(), **look)


@pytest.mark.slow
def test_a_finished_figure_is_laid_out_again_as_if_it_had_been_made_so(results):
    width = 600
    made = every_figure(results, width=width)
    for name, figure in every_figure(results).items():
        if name == "plot_combos":  # places its labels for the width that it is made with
            continue
        again = laid_out(laid_out(figure, width=430), width=width)
        layouts = [json.loads(each.to_json())["layout"] for each in (again, made[name])]
        for layout in layouts:
            layout.pop("meta")
        assert layouts[0] == layouts[1], name


def test_a_figure_of_someone_else_stays_as_it_is():
    figure = go.Figure(go.Scatter(x=[1], y=[2])).update_layout(meta="mine")
    assert laid_out(go.Figure(figure), width=300) == figure


@pytest.mark.parametrize(
    "text", ["one two three four five", "<b>bold</b> words<br>and more", "x" * 90, "&lt;|im_end|&gt; a"]
)
def test_lines_are_no_wider_than_told_and_nothing_is_lost(text):
    lines = wrapped(text, 80, 13).split("<br>")
    assert len(lines) > 1 and max(text_width(line, 13) for line in lines) <= 80
    assert "".join("".join(lines).split()) == "".join(text.replace("<br>", "").split())


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of `#rrggbb` or `rgb(r, g, b)`."""
    parts = [int(color[at : at + 2], 16) for at in (1, 3, 5)] if color[0] == "#" else map(float, color[4:-1].split(","))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scale", [DIVERGING, SEQUENTIAL])
def test_numbers_contrast_with_every_cell(scale):
    colors = sample_colorscale([list(stop) for stop in scale], [index / 100 for index in range(101)])
    contrasts = [(luminance(color) + 0.05) / (luminance(INK) + 0.05) for color in colors]
    assert min(contrasts) >= 4.5
    assert luminance(colors[50 if scale is DIVERGING else 0]) == pytest.approx(1.0)
    assert (luminance("#440154") + 0.05) / (luminance(INK) + 0.05) < 4.5  # the dark end of viridis


def test_what_diverges_is_white_at_zero_and_negative_cells_are_told_apart_without_color(results):
    for name, figure in every_figure(results, width=1100).items():
        for trace in figure.data:
            if trace.type == "heatmap" and min(value for row in trace.z for value in row if value is not None) < 0:
                assert trace.zmin == -trace.zmax and [list(stop) for stop in DIVERGING] == list(
                    map(list, trace.colorscale)
                ), name
    table = every_figure(results, width=600)["plot_token_map"].data[0]
    signs = {
        (text == "−", value < -0.05 * table.zmax)
        for texts, row in zip(table.text, table.z, strict=True)
        for text, value in zip(texts, row, strict=True)
    }
    assert signs == {(True, True), (False, False)}


def test_a_table_too_dense_for_a_sign_in_each_cell_has_them_as_a_grid():
    values = torch.linspace(-1, 1, 120).repeat(40, 1)
    names = [str(index) for index in range(120)]
    figure = finish(
        go.Figure(heatmap(values, names, names[:40], "x", hover="", limits=(-1.0, 1.0))),
        title="dense",
        about="",
        height=200,
        look={"width": 350},
    )
    signs = [(row, column) for row, texts in enumerate(figure.data[0].text) for column, t in enumerate(texts) if t]
    assert all(values[place] < -0.05 for place in signs) and len(signs) >= 20
    columns = sorted({column for _, column in signs})
    step = {b - a for a, b in pairwise(columns)}
    assert len(step) == 1 and 350 / 120 * step.pop() >= 6, "as far apart as they are wide"
    wide = laid_out(go.Figure(figure), width=2600)
    assert sum(map(bool, (text for texts in wide.data[0].text for text in texts))) > len(signs)


def test_numbers_of_a_table_stand_where_they_fit(results):
    wide, narrow = (every_figure(results, width=width)["plot_projection_map"].data[0] for width in (1100, 350))
    assert wide.text[0][0] == "0.00" or "." in wide.text[0][0]
    assert narrow.text is None or not any("." in text for row in narrow.text for text in row)


@pytest.mark.parametrize(
    ("names", "colors"),
    [
        (["harmful", "harmless"], [WARM, COOL]),
        (["harmless", "harmful"], [COOL, WARM]),
        (["harmless XSTest"], [COOL]),
        (["a", "b"], [WARM, COOL]),
    ],
)
def test_harmful_is_warm_and_harmless_cool_in_any_order(names, colors):
    assert [style.color for style in group_styles(names)] == colors


def test_more_groups_have_other_colors():
    colors = [style.color for style in group_styles(["harmless", "jailbroken", "harmful", "harmful, refused"])]
    assert colors[0] == COOL and colors[2] == WARM and len(set(colors)) == 4


def test_layer_zero_is_left_or_on_top(results):
    seen = 0
    for name, figure in every_figure(results).items():
        for axis in figure.select_yaxes(lambda axis: (axis.title.text or "").startswith(("layer", "block"))):
            seen += 1
            assert axis.autorange == "reversed", name
    assert seen >= 4


def test_lines_of_several_runs_are_their_best_positions_with_intervals():
    first, second = make_scores(), make_scores(kl=0.06)
    figure = plot_score_lines({"a": first, "b<b>": second}, measure="kl")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == ["a", "b&lt;b&gt;"]
    for trace, grid in zip(lines, (first, second), strict=True):
        assert list(trace.x) == list(range(1, N_LAYERS))
        for x, y, up in zip(trace.x, trace.y, trace.error_y.array, strict=True):
            rows = [row for row in grid.rows if row.layer == x]
            best = min(rows, key=lambda row: row.bypass)
            mean, _, high = mean_interval(values_of(grid, best, 2))
            assert (y, up) == (best.kl_nats, pytest.approx(high - mean))
    with pytest.raises(UserError, match="its positions are"):
        plot_score_lines({"a": first}, position=-9)
    with pytest.raises(UserError, match="at least one"):
        plot_score_lines({})


def values_of(grid: Any, row: Any, index: int) -> list[float]:
    values = grid.per_prompt[grid.rows.index(row), index].tolist()
    return [value for value in values if not math.isnan(value)]


def test_every_candidate_has_the_interval_of_its_prompts():
    scores = make_scores()
    for trace in plot_scores(scores).data:
        if not trace.name.startswith("−"):
            continue
        for x, up, down in zip(trace.x, trace.error_y.array, trace.error_y.arrayminus, strict=True):
            row = next(each for each in scores.rows if (each.position, each.layer) == (-int(trace.name[1:]), x))
            values = values_of(scores, row, 0)
            mean, low, high = mean_interval(values) if values else (0.0, 0.0, 0.0)
            assert (up, down) == (pytest.approx(high - mean), pytest.approx(mean - low))


def test_a_heatmap_that_is_not_symmetric_does_not_diverge():
    import torch

    trace = heatmap(torch.tensor([[0.0, 1.0]]), ["a", "b"], ["c"], "share", hover="%{z}", limits=(0.0, 1.0))
    assert [list(stop) for stop in SEQUENTIAL] == list(map(list, trace.colorscale))
