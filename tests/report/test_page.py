"""A report says what the files say, runs nothing foreign, and can be read at every width."""

import html
import json
import re
import shlex
import shutil

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.files import write_json
from refusal_mi.report.answers import MAX_BYTES_PER_SIDE, MAX_CHARACTERS
from refusal_mi.report.page import write_report
from refusal_mi.report.verdict import bindings, judge_run
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.options import RunOptions, command_line
from refusal_mi.search.grid import select
from refusal_mi.search.thresholds import NO_THRESHOLDS, Thresholds
from tests.helpers.runs import TOKENS, make_run, make_scores, write_span

TEN_MB = 10_000_000
UNFINISHED = {
    "directions": "No direction was chosen.",
    "selection": "A direction was chosen by its scores",
    "completions": "CE loss was not measured",
}


def words(page: str) -> str:
    """The text of a page without its scripts, style and tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def own_part(page: str) -> str:
    """The page without plotly, whose source is full of addresses that it does not load."""
    return re.sub(r"<script>/\*\*\s*\* plotly.js.*?</script>", "", page, flags=re.DOTALL)


def test_the_answer_stands_first_with_its_numbers(tmp_path):
    text = words(write_report(make_run(tmp_path)).read_text())
    best = select(make_scores()).best
    answer, _, rest = text.partition("Scores by layer")
    for expected in ("0.97 → 0.03", "random direction 0.95", "0.00 → 0.95", "+0.012", "norm is 3.25"):
        assert expected in answer
    assert "from 0.97 [0.87, 1.00] to 0.03 [0.00, 0.13]" in answer
    assert f"blocks.{best.layer}.hook_resid_pre" in answer and f"{best.kl_nats:.3g} nats of KL" in answer
    assert "One direction mediates refusal" in answer
    for heading in ("Effect on answers", "Completions", "CE loss", "Prompts and template", "Reproduce"):
        assert heading in rest
    assert "harmful train 16 14" in rest  # prompts, and those that were kept


def test_it_is_one_small_file_that_loads_nothing(tmp_path):
    path = write_report(make_run(tmp_path))
    page = path.read_text()
    assert path.stat().st_size < TEN_MB
    own = own_part(page)
    assert len(own) < len(page) / 4  # plotly was there, once
    assert not re.search(r"(src|href|url|action|import)\s*[=(]\s*[\"']?\s*(https?:)?//", own, flags=re.IGNORECASE)
    assert "default-src 'none'" in html.unescape(own)
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.slow
def test_a_large_run_stays_under_ten_megabytes_and_says_what_is_left_out(tmp_path):
    run = make_run(tmp_path, n_test=150, response=" & <more words>" * 1000)
    path = write_report(run)
    assert len((run / "completions/harmful_baseline_completions.json").read_bytes()) > MAX_BYTES_PER_SIDE
    assert path.stat().st_size < TEN_MB
    text = words(path.read_text())
    assert "more prompts are left out" in text and "more characters]" in text
    longest = max(len(cell) for cell in re.findall(r'class="text" dir="auto">(.*?)</p>', path.read_text()))
    assert longest < 6 * MAX_CHARACTERS


def test_markup_in_prompts_and_answers_is_text(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"</script><!--"
    page = write_report(make_run(tmp_path, n_test=3, prompt=attack, response=attack)).read_text()
    assert "<script>alert" not in page and "<img" not in own_part(page)
    assert html.escape("<script>alert(1)</script>") in page
    blocks = re.findall(r"<script[^>]*>", page)
    assert blocks == ['<script type="application/json" id="figures">', "<script>", "<script>"]


@pytest.mark.parametrize("reached", UNFINISHED)
@pytest.mark.parametrize("summarized", [True, False])
def test_an_unfinished_run_shows_what_is_there(tmp_path, reached, summarized):
    text = words(write_report(make_run(tmp_path, n_test=3, reached=reached, summarized=summarized)).read_text())
    assert UNFINISHED[reached] in text
    assert ("An unfinished run" in text) == (not summarized)
    assert ("The best" in text) == (reached != "directions")
    assert ("request number 0" in text) == (reached == "completions")


def test_files_of_an_earlier_run_are_not_shown(tmp_path):
    make_run(tmp_path, n_test=3)
    make_run(tmp_path, reached="selection")  # the same folder; completions and losses of the first run still lie there
    record = RunRecord.load(tmp_path)
    assert list(tmp_path.glob("completions/*")) and not record.sides and not record.losses
    assert "request number" not in words(write_report(tmp_path).read_text())


def test_without_a_survivor_it_names_the_threshold_that_binds(tmp_path):
    rule = Thresholds(kl_max=1e-4)
    run = make_run(tmp_path, thresholds=rule)
    record = RunRecord.load(run)
    rescued = len(select(make_scores(), Thresholds(kl_max=None)).survivors)
    assert rescued > 0 and not record.selection.survivors
    counts = {name: (failed, without) for name, _, failed, without in bindings(record.scores, record.selection)}
    above = sum(row.kl_nats is not None and row.kl_nats > 1e-4 for row in make_scores().rows)
    assert counts["KL on harmless prompts"] == (above, rescued)
    text = words(write_report(run).read_text())
    assert f"Without the threshold on the KL on harmless prompts, {rescued} would survive." in text
    assert "--kl-max" in text and "Without a chosen direction there is nothing to ablate" in text


def test_a_quick_run_says_so(tmp_path):
    assert "A quick run." in words(write_report(make_run(tmp_path / "quick", n_test=3, quick=True)).read_text())
    assert "A quick run." not in words(write_report(make_run(tmp_path / "full", n_test=3)).read_text())


def test_only_the_report_of_the_embedded_model_says_that_its_direction_is_planted(tmp_path):
    pages = {}
    for name, source in (("own", "example/chat-model"), ("embedded", "elsewhere/refusal_mi/organism/model")):
        run = make_run(tmp_path / name, n_test=3)
        record = json.loads((run / "run.json").read_text())
        record["model"]["source"] = source
        write_json(run / "run.json", record)
        pages[name] = words(write_report(run).read_text())
    head, _, rest = pages["embedded"].partition("Scores by layer")
    assert head.count("planted by training") == 1 and "no evidence of how language models refuse" in head
    assert "planted" not in rest and "planted" not in pages["own"]


VERDICTS = {
    "One direction mediates refusal": {},
    "takes part in refusal": {("harmful", "ablation"): (0.4, 0.0)},
    "Ablating one direction stops refusals": {("harmless", "actadd"): (0.02, 0.0)},
    "Adding one direction causes refusals": {("harmful", "ablation"): (0.95, 0.0)},
    "many of the changed answers are degenerate": {("harmful", "ablation"): (0.0, 0.5)},
    "not shown to mediate": {("harmful", "ablation"): (0.9, 0.0), ("harmless", "actadd"): (0.05, 0.0)},
}


@pytest.mark.parametrize("headline", VERDICTS)
def test_the_verdict_follows_the_numbers(tmp_path, headline):
    assert headline in judge_run(RunRecord.load(make_run(tmp_path, changes=VERDICTS[headline]))).headline


def test_an_effect_that_a_random_direction_has_too_is_not_claimed(tmp_path):
    changes = {("harmful", "random_ablation_0"): (0.05, 0.0), ("harmless", "random_actadd_0"): (0.9, 0.0)}
    verdict = judge_run(RunRecord.load(make_run(tmp_path, changes=changes)))
    assert "not shown to mediate" in verdict.headline
    assert sum("not shown to be specific" in sentence for sentence in verdict.sentences) == 2


def test_the_same_prompts_are_paired(tmp_path):
    """18 of 32 refused before and 8 of these after is an effect; the same rates with 8 newly refused ones is chance."""
    baseline = (18 / 32, 0.0)
    changes = {("harmful", "baseline"): baseline, ("harmful", "random_ablation_0"): baseline}
    changes |= {("harmful", "ablation"): (8 / 32, 0.0), ("harmless", "actadd"): (0.0, 0.0)}
    run = make_run(tmp_path, n_test=32, changes=changes)
    verdict = judge_run(RunRecord.load(run))
    assert verdict.headline.startswith("Ablating one direction stops refusals")
    said = " ".join(verdict.sentences)
    assert "Ablating a random direction gives" in said, "its norm does not matter"
    assert "Adding a random direction of equal norm gives" in said
    assert "(−0.31 [−0.46, −0.13], p = 0.002)" in " ".join(verdict.sentences)
    change = json.loads((run / "summary.json").read_text())["completions"]["harmful"]["ablation"]["change_of_refusal"]
    assert change["only_before"] == 10 and change["only_after"] == 0 and change["p"] < 0.01

    path = run / "completions/harmful_ablation_evaluations.json"
    record = json.loads(path.read_text())
    flags = [row["is_jailbreak_substring_matching"] for row in record["completions"]]
    for row, flag in zip(record["completions"], reversed(flags), strict=True):
        row["is_jailbreak_substring_matching"] = flag
    path.write_text(json.dumps(record))
    verdict = judge_run(RunRecord.load(run))
    assert "not shown to mediate" in verdict.headline
    assert "p = 0.076)" in " ".join(verdict.sentences)


def test_an_effect_must_differ_from_every_control(tmp_path):
    """One control that does nearly as much is enough; what is compared is the same prompts."""
    run = make_run(tmp_path, changes={("harmful", "random_ablation_0"): (0.9, 0.0)})
    assert "One direction mediates" in judge_run(RunRecord.load(run)).headline
    summary = json.loads((run / "summary.json").read_text())
    for kind in ("completions", "evaluations"):
        near = (run / f"completions/harmful_ablation_{kind}.json").read_text()
        (run / f"completions/harmful_random_ablation_1_{kind}.json").write_text(near)
    sides = summary["completions"]["harmful"]
    sides["random_ablation_1"] = sides["ablation"]
    write_json(run / "summary.json", summary)
    assert "Adding one direction causes refusals" in judge_run(RunRecord.load(run)).headline


def make_combination(run, label="2-0", multi="span"):
    """The ablation of a run as that of a combination inside it: `run/2-0/`."""
    write_span(run / label, [2, 0], multi, [3.25, 4.5])
    write_json(run / label / "directions_metadata.json", [{"pos": -1, "layer": 4}, {"pos": -2, "layer": 5}])
    for kind in ("completions", "loss_evals"):
        for path in (*run.glob(f"{kind}/*ablation*"),):
            (run / label / kind).mkdir(exist_ok=True)
            path.rename(run / label / kind / path.name)
    return run / label


def test_a_combination_has_a_report_of_its_own(tmp_path):
    folder = make_combination(make_run(tmp_path, n_test=40), multi="sequential")
    path = write_report(folder)
    assert path == folder / "report.html"
    text = words(path.read_text())
    assert "Refusal directions 2-0 of example/chat-model" in text
    assert "Ablating the directions of ranks 2 and 0 stops refusals." in text
    assert "Ablating them takes the refusal rate on 40 held-out harmful prompts from 0.97 [0.87, 1.00] to 0.03" in text
    assert "a random span of equal rank gives 0.95" in text and "on 40 held-out harmless prompts from 0.00" in text
    assert "one after the other, 2 dimensions) at the input of every block and every write" in text
    assert "rank 2 (position −1, layer 4, norm 3.25)" in text
    assert "added (+1)" not in text and "changes the CE loss by +0.012" in text
    assert "request number 39" in text and "--directions 2-0" in text and "--multi sequential" in text
    record = RunRecord.load(folder)
    assert list(record.losses) == ["baseline", "ablation", "random_ablation_0"]
    assert "at once, 2 dimensions) at every write" in words(
        write_report(make_combination(folder.parent, "0-2")).read_text()
    )
    shutil.rmtree(folder / "completions")
    assert "was not tested on answers" in words(write_report(folder).read_text())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        RunOptions(),
        RunOptions(
            harmful="a b.json",
            n_val=7,
            filter_prompts=False,
            system="it's <short>",
            template_kwargs={"thinking": False},
            refusal_tokens=(40, 2121),
            thresholds=NO_THRESHOLDS,
            max_new_tokens=9,
            steps=("directions", "selection"),
            batch_size=4,
        ),
        RunOptions(thresholds=Thresholds(kl_max=None, induce_min=None)),
        RunOptions(thresholds=Thresholds(kl_max=0.5), quick=True, max_new_tokens=32, n_train=32).shortened(),
    ],
)
def test_the_command_repeats_the_options(tmp_path, monkeypatch, options):
    run = RunRecord.load(make_run(tmp_path, n_test=3)).run
    caught = []

    def stop(_model, _source, given, *_rest, **_more):
        caught.append(given)
        raise UserError("far enough")

    monkeypatch.setattr("refusal_mi.recipes.arditi.run", stop)
    monkeypatch.setattr("refusal_mi.model.loading.quiet_load", lambda *_, **__: None)
    arguments = shlex.split(command_line(run.model, options).replace("\\\n", " "))
    assert arguments[:3] == ["refusal-mi", "run", "example/chat-model"]
    assert exit_status([*arguments[1:], "--output-dir", str(tmp_path / "out")]) == 2
    assert caught == [options]


@pytest.mark.slow
def test_a_real_run_ends_in_a_report_and_the_published_plots(tiny_dir, tmp_path):
    arguments = [
        "run", str(tiny_dir("llama")), "--no-filter", "--refusal-tokens", "5,7", "--n-train", "8", "--n-val", "4",
        "--n-test", "3", "--n-ce", "2", "--max-new-tokens", "4", "--output-dir", str(tmp_path),
    ]  # fmt: skip
    assert exit_status([*arguments, "--kl-max", "0"]) == 1
    assert "No candidate direction survives" in words((tmp_path / "report.html").read_text())
    for stem in ("ablation_scores", "actadd_scores", "kl_div_scores"):
        assert "Plotly.newPlot" in (tmp_path / f"select_direction/{stem}.html").read_text()
    assert exit_status([*arguments, "--no-thresholds"]) == 0
    text = words((tmp_path / "report.html").read_text())
    assert "No threshold was in force" in text and "harmless_custom_completions" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_without_network_draws_it_at_every_width(browser, tmp_path, width):
    attack = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    path = write_report(make_run(tmp_path, n_test=20, prompt=attack, response=attack))
    browser.open(path, width=width)
    assert browser.problems == []
    assert browser.requests == [path.resolve().as_uri()]
    assert browser.evaluate("document.title") == "Refusal direction of example/chat-model"
    plots = "[...document.querySelectorAll('[data-figure]')].map(d => d.querySelectorAll('.main-svg').length > 0)"
    assert browser.evaluate(plots) == [True] * 3
    assert browser.evaluate("document.querySelectorAll('[data-figure=scores] .scatterlayer .trace').length") > 15
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("innerWidth") == width
    tables = "[...document.querySelectorAll('.scroll')].map(t => [t.scrollWidth > t.clientWidth + 1, "
    tables += "getComputedStyle(t, '::before').content.includes('scroll to the right')])"
    hints = browser.evaluate(tables)
    assert all(is_wider == has_hint for is_wider, has_hint in hints)
    assert any(is_wider for is_wider, _ in hints) == (width == 390)
    legend = "[...document.querySelectorAll('[data-figure=scores] .legendtext')].map(t => t.textContent).join(' ')"
    assert TOKENS[0] in browser.evaluate(legend)  # the token is drawn as text, not dropped as a tag


@pytest.mark.slow
def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, tmp_path):
    path = write_report(make_run(tmp_path, n_test=3))
    injected = path.read_text().replace("<main>", "<main><script>document.title='owned'</script>")
    path.write_text(injected)
    browser.open(path, width=1280)
    assert browser.evaluate("document.title") != "owned"
    assert any("Content Security Policy" in problem for problem in browser.problems)


@pytest.mark.slow
def test_the_filters_filter(browser, tmp_path):
    path = write_report(make_run(tmp_path, n_test=40))
    browser.open(path, width=1280)
    section = "document.querySelector('#completions-harmful')"
    shown = f"[...{section}.querySelectorAll('.row')].filter(r => !r.hidden).length"
    count = f"{section}.querySelector('.count').textContent"

    def choose(name: str, value: str) -> None:
        field = f"{section}.querySelector('[data-filter={name}]')"
        browser.evaluate(f"{field}.value = {value!r}, {field}.dispatchEvent(new Event('input'))")

    assert browser.evaluate(count) == "12 shown of 40"
    browser.evaluate(f"{section}.querySelector('.more').click()")
    assert browser.evaluate(shown) == 40
    choose("verdict", "refused")
    choose("column", "ablation")
    assert browser.evaluate(shown) == 1  # 0.02 of 40
    choose("verdict", "degenerate")
    choose("column", "any")
    assert browser.evaluate(shown) == 1
    choose("verdict", "any")
    choose("text", "REQUEST NUMBER 7")
    assert browser.evaluate(count) == "1 shown of 1 that match, 40 in all"
    assert browser.problems == []


def test_a_run_that_was_killed_at_the_start_shows_nothing_of_the_one_before(tmp_path):
    make_run(tmp_path, n_test=3)
    assert RunRecord.load(tmp_path).sides
    summary = tmp_path / "summary.json"
    head = {key: json.loads(summary.read_text())[key] for key in ("model", "quick", "refusal_tokens", "n_prompts")}
    summary.write_text(json.dumps(head | {"status": "unfinished"}))
    record = RunRecord.load(tmp_path)
    assert record.status == "unfinished" and record.scores is None and not record.sides and not record.losses
    assert "An unfinished run" in words(write_report(tmp_path).read_text())
