"""No text of a model, tokenizer, template, prompt, answer or file is markup on any page, in a real browser.

Every control opens the same page as it would be if nothing were escaped.
"""

import html
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from refusal_mi.analysis import KINDS
from refusal_mi.analysis.result import analysis_module, draw_all, load_result
from refusal_mi.cli import exit_status
from refusal_mi.cli.analyze import redraw
from refusal_mi.figures.effects import plot_layer_sweep
from refusal_mi.figures.labels import plot_label_scores
from refusal_mi.figures.save import save_figures
from refusal_mi.files import write_json
from refusal_mi.measures import ABPoint, ABSweep
from refusal_mi.model.loading import load_model
from refusal_mi.notebook import say, table
from refusal_mi.report.page import write_report
from tests.helpers.cases import HARMFUL, HARMLESS, Words, analyses
from tests.helpers.hostile import (
    BELL,
    BIDI,
    FOLDER,
    HOST,
    IMAGE,
    LINK,
    MARKUP,
    MATH,
    PICTURE,
    REMOTE,
    RUN_LINK,
    SCRIPT,
    TEMPLATE_TEXT,
    TOKENS,
    foreign,
    save_hostile,
    seen,
    unescaped,
)

pytestmark = pytest.mark.slow

MODEL = FOLDER.replace(BIDI, "�")
GROUPS = (f"{RUN_LINK}{MATH}", f"<b>b</b><br>{PICTURE}{BIDI}")
DIRECTIONS = (f"<sup>s</sup>\"'{LINK}{MATH}", f"%{{x}}{REMOTE}")
CONDITIONS = (IMAGE, f"{LINK}{SCRIPT}", f"&lt;{BELL}%{{y}}")
PROMPTS = [f"{markup} {text}" for markup, text in zip(MARKUP, [*HARMFUL, *HARMLESS], strict=False)]
IN_GROUPS = tuple(name.replace(BIDI, "�") for name in GROUPS)
IN_CONDITIONS = (*CONDITIONS[:2], "&lt;�%{y}")
TAILS = tuple(f"'{token}'" for token in TOKENS[:2])
SHOWN = {
    "attribution_ranked": IN_GROUPS,
    "comparison": DIRECTIONS,
    "geometry": TAILS,
    "harm": IN_GROUPS,
    "lens_gap": TAILS,
    "logits": TAILS,
    "patching": TAILS,
    "pca": (*IN_GROUPS, PROMPTS[0], PROMPTS[6]),
    "projections": IN_GROUPS,
    "projections_map": (*IN_GROUPS, *TAILS),
    "sources": TOKENS[:2],
    "sources_tokens": TOKENS[:2],
    "token_map": (*TOKENS[:2], PROMPTS[1]),
    "trace": (*IN_GROUPS, *IN_CONDITIONS),
    "trace_single": (IN_GROUPS[0], *IN_CONDITIONS, PROMPTS[0]),
    "trace_tokens": (IN_GROUPS[0], *IN_CONDITIONS, *TOKENS[:2]),
}
"""Page -> what stands on it besides the model's name."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_hostile(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def drawn(model_dir, tmp_path_factory) -> Path:
    """A folder with every figure of every analysis, drawn from the saved result."""
    folder, model = tmp_path_factory.mktemp("analysis"), load_model(model_dir, device="cpu", dtype="float32")
    tokens = tuple(model.tokenizer.convert_tokens_to_ids(list(TOKENS[:2])))
    words = Words(PROMPTS[:6], PROMPTS[6:12], GROUPS, DIRECTIONS, CONDITIONS, tokens)
    for kind, analyze in analyses(model, words=words).items():
        analyze().save(folder / f"{kind}.json")
        redraw(folder / f"{kind}.json")
    return folder


def in_one_line(text: str) -> str:
    """Without white space: figures break lines at it."""
    return "".join(text.split())


def check(browser, path: Path, *expected: str) -> str:
    """The text of a page: none of it is markup, nothing was loaded or said to be wrong, and all of it can be read."""
    browser.open(path, width=1280)
    text = seen(browser)
    assert foreign(browser) == [] and "A LINK" not in text, path.name
    own = {path.resolve().as_uri(), path.with_name("plotly.min.js").resolve().as_uri()}
    assert set(browser.requests) <= own and browser.problems == [], path.name
    assert [each for each in expected if in_one_line(each) not in in_one_line(text)] == [], path.name
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_an_analysis_shows_text_as_text(browser, drawn, kind):
    names, model = analysis_module(kind).FIGURES, () if kind == "comparison" else (MODEL,)
    assert kind in names
    for name in names:
        check(browser, drawn / f"{name}.html", *model, *SHOWN.get(name, ()))


def test_no_dollar_of_a_figure_is_tex_where_there_is_mathjax(drawn):
    figures = draw_all(load_result(drawn / "trace.json")).figures
    plotted = {name: figure for name, figure in figures.items() if not isinstance(figure, str)}
    assert len(plotted) == 2 and not any("$" in figure.to_json() for figure in plotted.values())
    assert all("$" in unescaped(figure).to_json() for figure in plotted.values())


def test_every_expected_page_is_there(drawn):
    assert set(SHOWN) <= {path.stem for path in drawn.glob("*.html")}


@pytest.mark.parametrize("kind", ["trace"])  # whose words are not wrapped inside the markup
def test_control_a_figure_without_escapes_has_links_and_hides_text(browser, drawn, tmp_path, kind):
    figures = draw_all(load_result(drawn / f"{kind}.json")).figures
    save_figures({kind: unescaped(figures[kind])}, tmp_path)
    browser.open(tmp_path / f"{kind}.html", width=1280)
    text = seen(browser)
    assert any(each.startswith("<a ") for each in foreign(browser)) and "A LINK" in text
    assert [each for each in SHOWN[kind] if each not in text]


@pytest.mark.parametrize("name", ["sources_tokens", "trace_tokens"])
def test_control_a_view_without_escapes_runs_scripts(browser, drawn, tmp_path, name):
    text = (drawn / f"{name}.html").read_text("utf-8")
    naive = text.replace("\\u2060", "").replace("\u2060", "")
    path = tmp_path / "naive.html"
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", naive), "utf-8")
    assert naive != text and path.read_text("utf-8") != naive
    browser.open(path, width=1280)
    found = foreign(browser, wait_s=5)
    assert "A SCRIPT RAN" in found and any(each.startswith("<img") for each in found)
    assert (tmp_path / "x").resolve().as_uri() in browser.requests
    assert TOKENS[0] not in seen(browser)


def test_the_policy_of_a_view_stops_what_is_not_its_own(browser, drawn, tmp_path):
    text = (drawn / "sources_tokens.html").read_text("utf-8")
    (tmp_path / "injected.html").write_text(text.replace("<h1>", f"{REMOTE}<script>owned=1</script><h1>"), "utf-8")
    browser.open(tmp_path / "injected.html", width=1280)
    assert "A SCRIPT RAN" not in foreign(browser)
    assert sum("Content Security Policy" in problem for problem in browser.problems) >= 2


@pytest.fixture(scope="module")
def run_folder(model_dir, tmp_path_factory) -> Path:
    """A run and combinations of the hostile model on files of hostile names, with hostile answers put in."""
    folder = tmp_path_factory.mktemp("files")
    sets = [prompt_file(folder, side) for side in ("harmful", "harmless", "held out")]
    sizes = ["--n-train", "6", "--n-val", "4", "--n-test", "4", "--n-ce", "2", "--max-new-tokens", "3"]
    rule = ["--no-filter", "--no-thresholds", "--refusal-tokens", "272,5", "--device", "cpu", *sizes]
    files = ["--harmful", sets[0], "--harmless", sets[1], "--eval-set", sets[2]]
    texts = ["--text-set", sets[0], "--instruction-set", sets[1], "--system", f"{LINK} {PICTURE}{BIDI}"]
    run = folder / f"run{IMAGE}"
    where = [str(model_dir), "--output-dir", str(run)]
    assert exit_status(["run", *where, *rule, *files, *texts]) == 0
    combos = ["--ranks", "0..1", "--kl-max", "99", "--n-random", "1", "--n-ce", "2", "--val-new-tokens", "2"]
    assert exit_status(["combos", *where, *combos]) == 0
    for path in (run / "completions").glob("*.json"):
        answer(path)
    write_report(run)
    return run


def prompt_file(folder: Path, side: str) -> str:
    rows = [
        {"instruction": f"{MARKUP[number % len(MARKUP)]} {side} {number}", "category": REMOTE, "output": f"{PICTURE} a"}
        for number in range(20)
    ]
    path = folder / f"{side}{IMAGE}{BIDI}{MATH}.json"
    write_json(path, rows)
    return str(path)


def answer(path: Path) -> None:
    """Put hostile answers into a file of completions or of verdicts."""
    held = json.loads(path.read_text("utf-8"))
    for row, markup in zip(held["completions"] if isinstance(held, dict) else held, MARKUP, strict=False):
        row["response"] = f"{markup}{BIDI}{BELL} answered"
    write_json(path, held)


def test_the_report_of_a_run_shows_text_as_text(browser, run_folder):
    file = f"held out{IMAGE}�{MATH}"
    answers = [f"{markup}�␇ answered" for markup in MARKUP[:4]]
    asked = [f"{markup} held out" for markup in MARKUP]
    settings = (TEMPLATE_TEXT, REMOTE, f"{PICTURE}�")
    text = check(browser, run_folder / "report.html", MODEL, file, *TOKENS[:2], *answers, *settings)
    assert sum(each in text for each in asked) >= 4


def test_the_figures_of_a_run_show_text_as_text(browser, run_folder):
    check(browser, run_folder / "select_direction/kl_div_scores.html", MODEL, *TAILS)
    check(browser, run_folder / "combos.html", MODEL, f"harmful{IMAGE}�{MATH}")


def test_control_a_report_without_escapes_runs_scripts_and_loads_pictures(browser, run_folder, tmp_path):
    head, found, rest = (run_folder / "report.html").read_text("utf-8").partition('<script type="application/json"')
    naive = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html.unescape(head)) + found + rest
    (tmp_path / "naive.html").write_text(naive, "utf-8")
    browser.open(tmp_path / "naive.html", width=1280)
    elements = foreign(browser, wait_s=5)
    assert "A SCRIPT RAN" in elements and any(each.startswith("<img") for each in elements)
    assert any(HOST in address for address in browser.requests)


@pytest.fixture
def notebook(monkeypatch) -> list[str]:
    """What is shown as Markdown."""
    displayed: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda shown: displayed.append(shown.data))
    return displayed


def write_markdown(path: Path, markdown: str) -> Path:
    """A page of Markdown as notebooks render it, HTML in it included."""
    body = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{body}</body>', "utf-8")
    return path


NAIVE = [
    f"{markup} {PICTURE}\n[ref]: http://{HOST}/\n" for markup in (*MARKUP, *TOKENS, "`", "```\n", "*a* _b_ ~~c~~ |")
]


def test_tables_of_a_notebook_show_text_as_text(browser, notebook, tmp_path):
    table([{IMAGE: text, "*n*": 0.5} for text in NAIVE])
    text = check(browser, write_markdown(tmp_path / "table.html", notebook[0]), IMAGE, "*n*", "0.500")
    assert [each for each in NAIVE if " ".join(each.split()) not in text] == []
    assert browser.evaluate("document.querySelectorAll('td').length") == 2 * len(NAIVE)
    assert browser.evaluate("document.querySelectorAll('em, code, del, strong').length") == 0


def test_paragraphs_of_a_notebook_load_and_link_nothing(browser, notebook, tmp_path):
    for text in NAIVE:
        say(f"**bold** {text}, and in code `{text}`")
    for number, shown in enumerate(notebook):
        check(browser, write_markdown(tmp_path / f"{number}.html", shown), "bold")
    say(f"`{LINK}`, `<|im_end|>`, [0.94, 1.00]")
    assert notebook[-1].replace("\u2060", "") == f"`{LINK}`, `<|im_end|>`, [0.94, 1.00]"
    check(browser, write_markdown(tmp_path / "code.html", notebook[-1]), LINK, "<|im_end|>, [0.94, 1.00]")


def test_control_markdown_as_it_comes_loads_pictures_and_runs_scripts(browser, tmp_path):
    browser.open(write_markdown(tmp_path / "naive.html", "\n\n".join(NAIVE)), width=1280)
    found = foreign(browser, wait_s=5)
    assert "A SCRIPT RAN" in found and {f'<img src="http://{HOST}/m.png" alt="x">'} <= set(found)
    assert any(each.startswith("<a ") for each in found)
    assert f"http://{HOST}/m.png" in browser.requests


def test_figures_of_other_commands_show_text_as_text(browser, tmp_path):
    point = ABPoint(1, 1.0, 0.6, 0.5, 0.7, 0.1, 0.0, 0.2, 4)
    scores, refused = {DIRECTIONS[1]: [1.0, 2.0]}, {DIRECTIONS[1]: [True, False]}
    drawn = {
        "sweep": plot_layer_sweep(ABSweep(LINK, 0.5, (point,), 4), model=FOLDER),
        "labels": plot_label_scores(scores, refused, model=FOLDER),
    }
    save_figures(drawn, tmp_path)
    check(browser, tmp_path / "sweep.html", LINK, MODEL)
    check(browser, tmp_path / "labels.html", DIRECTIONS[1], MODEL)
