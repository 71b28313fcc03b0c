"""The traces of a figure carry the numbers of its result, and text in labels stays text."""

import math
import statistics
from dataclasses import replace

import pytest
from scipy.stats import t

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.figures.effects import plot_losses, plot_rates
from refusal_mi.figures.save import PLOTLY_FILE, save_figure, save_figures
from refusal_mi.figures.scores import plot_norms, plot_score_panels, plot_scores
from refusal_mi.figures.style import plain, series_styles, token_text
from refusal_mi.figures.text import unparsed
from refusal_mi.measures import LossResult
from refusal_mi.run.answers import Effect, SideEffects
from refusal_mi.search.grid import select
from refusal_mi.search.thresholds import NO_THRESHOLDS, CandidateScore, Thresholds
from refusal_mi.stats import Rate
from tests.helpers.browser import find_chromium
from tests.helpers.runs import N_LAYERS, N_VAL, TOKENS, make_run, make_scores

NAMES = {"bypass": "bypass", "induce": "induce", "kl": "kl_nats"}


def trace(figure, name):
    """The only trace of this name (the first, where panels repeat it)."""
    return next(trace for trace in figure.data if trace.name == name)


@pytest.mark.parametrize("measure", NAMES)
def test_a_line_is_the_scores_of_its_position_and_a_missing_score_is_a_gap(measure):
    scores = make_scores()
    figure = plot_scores(scores, measure=measure)
    for position in range(-len(TOKENS), 0):
        line = trace(figure, f"−{-position}")
        by_layer = {row.layer: getattr(row, NAMES[measure]) for row in scores.rows if row.position == position}
        assert dict(zip(line.x, line.y, strict=True)) == by_layer
        assert by_layer[0] is None and line.connectgaps is False
    assert "nats" in figure.layout.yaxis.title.text and "layer" in figure.layout.xaxis.title.text


def test_references_stand_where_they_apply():
    scores, rule = make_scores(), Thresholds(kl_max=0.05, induce_min=-1.0, prune_layers=0.25)
    figures = {measure: plot_scores(scores, measure=measure, thresholds=rule) for measure in NAMES}
    lines = {
        measure: {name: trace(figure, name).y[0] for name in ("plain model", "threshold") if name in names(figure)}
        for measure, figure in figures.items()
    }
    assert lines["bypass"] == {"plain model": scores.baseline_harmful}
    assert lines["induce"] == {"plain model": scores.baseline_harmless, "threshold": -1.0}
    assert lines["kl"] == {"threshold": 0.05}
    for figure in figures.values():
        assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(5.5, 7.5)]
    assert not plot_scores(scores, thresholds=NO_THRESHOLDS).layout.shapes


def test_a_calibrated_zero_point_is_drawn_in_place_of_a_threshold_of_means():
    scores, rule = make_scores(), Thresholds(induce_min=0.5)
    moved = replace(scores, zero_point=-1.0)
    bypass, induce = (plot_scores(moved, measure=measure, thresholds=rule) for measure in ("bypass", "induce"))
    for figure in (bypass, induce):
        assert trace(figure, "counts as refused above").y[0] == -1.0 and "threshold" not in names(figure)
    assert "counts as refused above" not in names(plot_scores(scores, thresholds=rule))


def names(figure):
    return {trace.name for trace in figure.data}


def test_open_markers_are_the_candidates_that_fail():
    scores = make_scores()
    survivors = {(row.position, row.layer) for row in select(scores).survivors}
    assert survivors and len(survivors) < len(scores.rows)
    figure = plot_scores(scores, thresholds=Thresholds())
    for position in range(-len(TOKENS), 0):
        line = trace(figure, f"−{-position}")
        filled = {(position, x) for x, symbol in zip(line.x, line.marker.symbol, strict=True) if "open" not in symbol}
        assert filled == {place for place in survivors if place[0] == position}


@pytest.mark.parametrize("index", range(3))
def test_the_star_is_the_choice_with_the_interval_of_its_prompts(index):
    scores = make_scores()
    best, measure = select(scores).best, list(NAMES)[index]
    star = trace(plot_scores(scores, measure=measure, chosen=best), "chosen, 95% interval")
    values = scores.per_prompt[scores.rows.index(best), index, :N_VAL].tolist()
    half = t.ppf(0.975, N_VAL - 1) * statistics.stdev(values) / math.sqrt(N_VAL)
    assert (star.x, star.y) == ((best.layer,), (getattr(best, NAMES[measure]),))
    assert star.error_y.array[0] == pytest.approx(half, rel=1e-6)
    assert star.error_y.arrayminus[0] == pytest.approx(half, rel=1e-6)


def screened_out(scores, n=4):
    """The grid of a search that measured only the last position in full, the others' first prompts, and not layer 7."""
    rows, per_prompt = [], scores.per_prompt.clone()
    for index, row in enumerate(scores.rows):
        if row.position < -1 or row.layer == 7:
            n_known = 0 if row.layer == 7 else n
            per_prompt[index, :, n_known:] = math.nan
            per_prompt[index, 2] = math.nan  # KL is not measured of those that are out before
            row = CandidateScore(row.position, row.layer, None, None, None, "screened out for induce: ...")
        rows.append(row)
    return replace(scores, rows=tuple(rows), per_prompt=per_prompt)


@pytest.mark.parametrize("index", range(2))
def test_candidates_that_were_screened_out_are_faint_with_what_was_measured(index):
    scores, measure = screened_out(make_scores()), list(NAMES)[index]
    figure = plot_scores(scores, measure=measure, thresholds=Thresholds())
    for position in range(-len(TOKENS), 0):
        exact = [each for each in figure.data if each.name == f"−{-position}" and each.opacity is None]
        faint = [each for each in figure.data if each.name == f"−{-position}" and each.opacity is not None]
        assert len(exact) == 1 and exact[0].showlegend
        if position == -1:
            assert not faint and [y is None for y in exact[0].y] == [True, *[False] * 6, True]
            continue
        through, points = faint
        assert set(exact[0].y) == {None} and through.x == points.x == tuple(range(1, 7)) and not points.showlegend
        assert points.line.color == exact[0].line.color and points.legendgroup == exact[0].legendgroup
        assert exact[0].marker.symbol[1] == points.marker.symbol
        for x, y, up, custom in zip(points.x, points.y, points.error_y.array, points.customdata, strict=True):
            row = next(i for i, each in enumerate(scores.rows) if (each.position, each.layer) == (position, x))
            values = scores.per_prompt[row, index, :4].tolist()
            assert y == pytest.approx(statistics.mean(values)) and custom[2] == 4
            assert up == pytest.approx(t.ppf(0.975, 3) * statistics.stdev(values) / 2, rel=1e-6)
    assert trace(figure, "screened, n = 4").showlegend


def test_faint_stands_in_the_legend_once_and_only_where_something_is():
    panels = plot_score_panels(screened_out(make_scores()), thresholds=Thresholds())
    assert [each.name for each in panels.data if each.showlegend].count("screened, n = 4") == 1
    shown = [each.name for each in panels.data if each.showlegend]
    assert len(shown) == len(set(shown)) == len(TOKENS) + 3
    assert not any(each.opacity for each in plot_score_panels(make_scores()).data)
    assert not any(each.opacity for each in plot_scores(screened_out(make_scores()), measure="kl").data)


def test_panels_hold_the_three_plots_with_one_legend():
    scores = make_scores()
    single = [plot_scores(scores, measure=measure, thresholds=Thresholds()) for measure in NAMES]
    panels = plot_score_panels(scores, thresholds=Thresholds())
    together = [(trace.name, trace.y) for figure in single for trace in figure.data]
    assert [(trace.name, trace.y) for trace in panels.data] == together
    shown = [trace.name for trace in panels.data if trace.showlegend]
    assert len(shown) == len(set(shown)) and set(shown) == names(panels)
    assert [panels.layout.yaxis.title.text, panels.layout.yaxis3.type] == [
        single[0].layout.yaxis.title.text,
        "log",
    ]


def test_model_and_n_are_named():
    about = plot_scores(make_scores(), measure="kl", model="a <b>model").layout.title.subtitle.text
    assert about == f"a &lt;b&gt;model · n = {N_VAL} harmless prompts"


def test_lines_differ_without_color():
    styles = series_styles(42)
    assert len({(style.dash, style.symbol) for style in styles}) == 42


def test_tokens_are_shown_as_text():
    figure = plot_scores(make_scores(), tokens=TOKENS)
    assert "−3 '&lt;|im_start|&gt;'" in names(figure)  # plotly would drop an unescaped tag
    assert "−4 ⏎" in names(figure) and "−1 ⏎" in names(figure)
    assert token_text("Ġa▁b\x07") == " a b\\x07"
    assert token_text("\u202ea") == "\\u202ea"
    assert plain("<a href='x'>&") == "&lt;a href='x'&gt;&amp;"
    assert plain("$x$ %{y} 5%\u202e") == "&#36;x&#36; &#37;{y} 5%�"
    assert unparsed("<b>a</b> &lt; <|end|> a & b < c") == "<\u2060b>a<\u2060/b> &\u2060lt; <|end|> a & b < c"


def test_bars_are_the_rates_with_their_wilson_intervals():
    side = SideEffects("harmful", "set", (Effect("baseline", Rate(9, 10), Rate(1, 10)),))
    refused, degenerate = plot_rates([side]).data
    assert (refused.x, degenerate.x) == ((0.9,), (0.1,))
    low, high = 0.5958, 0.9821  # Wilson's formula worked out by hand for 9 of 10
    assert refused.x[0] - refused.error_x.arrayminus[0] == pytest.approx(low, abs=1e-4)
    assert refused.x[0] + refused.error_x.array[0] == pytest.approx(high, abs=1e-4)


def test_loss_bars_are_differences_from_the_plain_model():
    losses = {
        "baseline": {"text": LossResult(2.0, 7.4, 1000), "chat": LossResult(1.0, 2.7, 50)},
        "ablation": {"text": LossResult(2.25, 9.5, 1000), "chat": LossResult(0.5, 1.6, 50)},
    }
    (bars,) = plot_losses(losses).data
    assert bars.y == (0.25, -0.5)
    assert "1,000 tokens" in bars.x[0]


def test_norms_are_drawn_by_position():
    figure = plot_norms([[0.0, 1.0], [0.0, 2.0]], [-2, -1], n_prompts=8)
    assert [line.y for line in figure.data] == [(0.0, 1.0), (0.0, 2.0)]


def test_the_name_of_a_file_may_be_a_text_and_says_the_format(tmp_path, monkeypatch):
    figure = plot_norms([[0.0, 1.0]], [-1])
    save_figure(figure, str(tmp_path / "a.html"))
    save_figures({"b": figure}, str(tmp_path))
    assert (tmp_path / "a.html").is_file() and (tmp_path / "b.html").is_file()
    with pytest.raises(UserError, match=r"written as \.html, \.png, \.svg, \.pdf, not a\.jpgg"):
        save_figure(figure, "a.jpgg")


def test_saved_pages_share_one_plotly_and_run_no_foreign_script(tmp_path):
    figure = plot_scores(make_scores(), model="</script><script>alert(1)</script>")
    files = save_figures({"a": figure, "b": figure}, tmp_path)
    assert files == ["a.html", "b.html", PLOTLY_FILE]
    page = (tmp_path / "a.html").read_text()
    assert f'src="{PLOTLY_FILE}"' in page and len(page) < 100_000
    assert "<script>alert" not in page
    assert (tmp_path / "b.html").read_text() == page


@pytest.mark.parametrize("what", ["scores", "bypass", "induce", "kl", "rates", "loss"])
def test_plot_redraws_a_run(tmp_path, what, capsys):
    run = make_run(tmp_path / "run", n_test=4)
    assert exit_status(["plot", str(run), "--what", what, "--output", str(tmp_path / "f.html")]) == 0
    assert "Plotly.newPlot" in (tmp_path / "f.html").read_text()


def test_a_figure_of_a_run_lies_in_it_or_where_it_is_told(tmp_path, capsys):
    run = make_run(tmp_path / "run", n_test=4)
    before = {path.name for path in run.iterdir()}
    assert exit_status(["plot", str(run), "--figure", "kl"]) == 0
    assert "Plotly.newPlot" in (run / "kl.html").read_text()
    assert {path.name for path in run.iterdir()} - before == {"kl.html"}
    assert exit_status(["plot", str(run), "--output-dir", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "scores.html").is_file() and not (run / "scores.html").exists()


def test_plot_says_in_one_line_what_is_missing(tmp_path, capsys):
    run = make_run(tmp_path / "run", reached="directions")
    cases = [
        ([str(run), "--output", str(tmp_path / "f.html")], "no scores"),
        ([str(run), "--what", "rates", "--output", str(tmp_path / "f.html")], "no judged completions"),
        ([str(run), "--what", "loss", "--output", str(tmp_path / "f.html")], "no CE losses"),
        ([str(run), "--output", str(tmp_path / "f.jpeg")], "ending in .html"),
        ([str(tmp_path), "--output", str(tmp_path / "f.html")], "not a run folder"),
    ]
    for arguments, message in cases:
        assert exit_status(["plot", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "f.html").exists()


def test_an_image_without_a_browser_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda *_, **__: None, raising=False)
    with pytest.raises(UserError, match="apt-get install chromium"):
        save_figure(plot_norms([[0.0, 1.0]], [-1]), tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()


def test_an_image_without_kaleido_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    with pytest.raises(UserError, match="pip install"):
        save_figure(plot_norms([[0.0, 1.0]], [-1]), tmp_path / "f.svg")


@pytest.mark.slow
def test_an_svg_holds_the_labels(tmp_path):
    pytest.importorskip("kaleido")
    if find_chromium() is None:
        pytest.skip("no chromium on PATH")
    save_figure(plot_scores(make_scores(), model="some model"), tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert text.startswith("<svg") and "some model" in text and "source layer" in text and 'width="1200"' in text
    for width in (350, 1080):
        save_figure(plot_scores(make_scores()), tmp_path / "f.svg", width=width)
        assert f'width="{width}"' in (tmp_path / "f.svg").read_text()
    assert N_LAYERS == 8
