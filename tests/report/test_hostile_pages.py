"""What models, tokenizers, prompts and names bring is shown as text: every page of every analysis, in a browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import circuitsvis
import plotly.graph_objects as go
import pytest
import torch

from refusal_mi.analysis import KINDS
from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.comparison import compare_directions
from refusal_mi.analysis.harm import separate_harm
from refusal_mi.analysis.pca import residual_pca
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.result import figures
from refusal_mi.analysis.trace import trace_generation
from refusal_mi.figures.effects import CombinationPoint, plot_combos, plot_layer_sweep, plot_losses, plot_rates
from refusal_mi.figures.labels import plot_label_scores
from refusal_mi.figures.save import save_figures
from refusal_mi.figures.scores import plot_norms, plot_score_panels, plot_scores
from refusal_mi.figures.style import View, page
from refusal_mi.measures import ABPoint, ABSweep, LossResult
from refusal_mi.model.loading import load_model
from refusal_mi.report.page import write_report
from refusal_mi.run.answers import Effect, SideEffects
from refusal_mi.search.grid import select
from refusal_mi.stats import Rate
from refusal_mi.text.chat import ChatFormat
from tests.helpers.browser import find_chromium, open_browser
from tests.helpers.cases import HARMFUL, HARMLESS, TOKENS, analyses, grid_of
from tests.helpers.models import save_tiny
from tests.helpers.runs import make_run, make_scores

pytestmark = pytest.mark.slow

ATTACK = "<a href='https:elsewhere.example'>k<b>B<img src=x onerror=document.title='owned'><sup>z"
OWN_TAGS = {"b", "i", "br", "extra"}
"""Those of plotly that figures use themselves."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every figure of every analysis, and every other one, of a model whose every name and token is an attack."""
    model = load_model(save_tiny("llama", tmp_path_factory.mktemp("model") / ATTACK), device="cpu")
    kind = type(model.tokenizer)
    plain = kind.convert_ids_to_tokens

    def hostile(self, ids, *args, **kwargs):
        found = plain(self, ids, *args, **kwargs)
        return ATTACK + found if isinstance(found, str) else [ATTACK + token for token in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "convert_ids_to_tokens", hostile)
        made = {name: figure for analyze in analyses(model).values() for name, figure in figures(analyze()).items()}
        chat = ChatFormat(model.tokenizer)
        direction = grid_of(model, chat).direction(-1, 3)
        groups = {f"{ATTACK}1": HARMFUL, f"{ATTACK}2": HARMLESS}
        named = [
            project_residuals(model, chat, direction, groups),
            residual_pca(model, chat, direction, groups, layers=(0, 3), n_shuffles=2),
            attribute_direction(model, chat, direction, groups),
            trace_generation(model, chat, direction, groups, max_new_tokens=2),
            separate_harm(model, chat, HARMFUL, HARMLESS, groups, TOKENS, refused=[True, False] * 6),
            compare_directions({ATTACK: direction, f"{ATTACK}2": direction.random_like(0)}),
        ]
    made |= {f"named_{name}": figure for result in named for name, figure in figures(result).items()}
    del made["comparison"]  # of "r" and "random"; the named one takes its place
    return made | others()


def others() -> dict[str, go.Figure]:
    """The figures that are no analysis."""
    scores, loss = make_scores(), LossResult(1.0, 2.7, 3)
    tokens = [ATTACK] * len(scores.positions)
    effects = tuple(Effect(label, Rate(1, 4), Rate(0, 4)) for label in ("baseline", "ablation", ATTACK))
    point = CombinationPoint(ATTACK, "combination", 1, Rate(1, 4), -1.0, 0.01, 2.0, is_allowed=True, is_winner=True)
    sweep = ABSweep(ATTACK, 0.5, (ABPoint(1, 1.0, 0.6, 0.5, 0.7, 0.1, 0.0, 0.2, 8),), 8)
    return {
        "other_labels": plot_label_scores({ATTACK: [1.0, 2.0]}, {ATTACK: [True, False]}, model=ATTACK),
        "other_scores": plot_scores(scores, tokens=tokens, model=ATTACK, chosen=select(scores).best),
        "other_panels": plot_score_panels(scores, tokens=tokens, model=ATTACK),
        "other_norms": plot_norms(
            [[1.0, 2.0]] * len(tokens), scores.positions, tokens=tokens, model=ATTACK, n_prompts=3
        ),
        "other_rates": plot_rates([SideEffects("harmful", ATTACK, effects)], model=ATTACK),
        "other_losses": plot_losses({label: {ATTACK: loss} for label in ("baseline", ATTACK)}, model=ATTACK),
        "other_combos": plot_combos(
            [point, replace(point, is_winner=False)], text_set=ATTACK, kl_max=0.1, model=ATTACK
        ),
        "other_sweep": plot_layer_sweep(sweep, model=ATTACK),
    }


def strings(value) -> list[str]:
    """Every text of a figure."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in strings(each)]


def foreign(figure: go.Figure) -> set[str]:
    """Tags that no figure has of its own."""
    return {tag for text in strings(json.loads(figure.to_json())) for tag in re.findall(r"<(\w+)", text)} - OWN_TAGS


def test_no_figure_takes_markup_from_a_name_a_token_or_a_prompt(drawn):
    assert {kind for kind in KINDS if not any(name.removeprefix("named_").startswith(kind) for name in drawn)} == set()
    plots = {name: figure for name, figure in drawn.items() if isinstance(figure, go.Figure)}
    assert {name: foreign(figure) for name, figure in plots.items() if foreign(figure)} == {}
    assert all("&lt;a href" in figure.to_json() for name, figure in plots.items()), "the control: they do show it"
    assert foreign(go.Figure(go.Scatter(y=[1], name=ATTACK))) == {"a", "img", "sup"}


SEEN = """(() => {
    const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode())
        if (!walker.currentNode.parentElement.closest('script, style')) texts.push(walker.currentNode.data);
    return {
        title: document.title,
        links: [...document.querySelectorAll('a')].filter(a => /elsewhere/.test(a.outerHTML)).length,
        pictures: document.querySelectorAll('img, iframe, object').length,
        text: texts.join(''),
    };
})()"""


def write_raw(folder: Path) -> list[str]:
    """Pages as they would be without care: a link in a figure, a token that is markup, a name in the page."""
    save_figures({"raw_figure": go.Figure(go.Scatter(y=[1, 2], name=ATTACK, showlegend=True))}, folder)
    view = circuitsvis.tokens.colored_tokens([ATTACK, "two"], torch.tensor([1.0, -1.0]))
    (folder / "raw_tokens.html").write_text(page("tokens", "", [View("", view)]), encoding="utf-8")
    (folder / "raw_page.html").write_text(f"<!doctype html><title>t</title><body>{ATTACK}", encoding="utf-8")
    return ["raw_figure", "raw_tokens", "raw_page"]


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH")
def test_in_a_browser_nothing_of_it_acts_and_all_of_it_is_read(drawn, tmp_path):
    plots = {name: figure for name, figure in drawn.items() if isinstance(figure, go.Figure)}
    save_figures(plots, tmp_path)
    views = {name: text for name, text in drawn.items() if isinstance(text, str)}
    assert set(views) >= {"sources_tokens", "attention_patterns", "trace_tokens"}
    for name, text in views.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    write_report(make_run(tmp_path / "run", n_test=3, prompt=ATTACK, response=ATTACK))
    executable = find_chromium()
    assert executable is not None
    seen, raw = {}, {}
    with open_browser(executable, tmp_path / "profile") as tab:
        for name in [*plots, *views, "run/report"]:
            tab.open(tmp_path / f"{name}.html", width=1100)
            seen[name] = tab.evaluate(SEEN)
            assert all(request.startswith(tmp_path.as_uri()) for request in tab.requests), name
        for name in write_raw(tmp_path):
            tab.open(tmp_path / f"{name}.html", width=1100)
            raw[name] = tab.evaluate(SEEN)
    literal = "<b>B<img src=x"
    for name, found in seen.items():
        assert found["title"] != "owned" and (found["links"], found["pictures"]) == (0, 0), name
    assert [name for name, found in seen.items() if literal not in found["text"]] == []
    assert raw["raw_figure"]["links"] > 0 and literal not in raw["raw_figure"]["text"]
    assert literal not in raw["raw_tokens"]["text"]
    assert raw["raw_page"]["title"] == "owned" and raw["raw_page"]["pictures"] == 1
