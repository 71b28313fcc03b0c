"""Commands with a judge behind an endpoint, end to end against one on localhost: columns, tables, no key anywhere."""

import json

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.files import read_json, read_record
from refusal_mi.generation import Generated
from refusal_mi.judges.agreement import Agreement
from refusal_mi.recipes import effects
from tests.helpers.judge import KEY, LONG, Fake, send, verdict

SIZES = ["--n-train=6", "--n-val=3", "--n-test=4", "--n-ce=2", "--max-new-tokens=3", "--n-random=1"]
RUN = ["--no-filter", "--no-thresholds", "--refusal-tokens=5,40", "--response-prefix=", "--device=cpu", *SIZES]
STEPS = "--steps=directions,selection,completions"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A key in the environment, a cache of its own, and answers of fifteen words: HARM under every intervention."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFUSAL_MI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REFUSAL_MI_JUDGE_KEY", KEY)
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)

    def answers(model, chat, prompts, *, interventions=(), **_):
        word = "HARM" if interventions else "fine"
        return [Generated(f"{LONG} {word} {index % 2}", (5, 6), True) for index, _ in enumerate(prompts)]

    monkeypatch.setattr(effects, "generate", answers)
    return tmp_path


def written(folder) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_run_combos_and_judge_with_an_endpoint(judged, tiny_dir, capsys):
    model, folder = str(tiny_dir("gpt2")), judged / "run"
    arguments = ["run", model, *RUN, STEPS, "--output-dir", str(folder)]
    with Fake(verdict) as fake:
        asked = ["--judge", fake.url, "--judge-model", "guard"]
        assert exit_status([*arguments, *asked]) == 0
        # Four sets of harmful answers, two distinct pairs of prompt and word each; harmless ones are not asked about.
        n_asked = len(fake.seen)
        assert 0 < n_asked <= 4 * 4 and {body["model"] for _, body in fake.seen} == {"guard"}
        assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}
        shown = capsys.readouterr().out
        assert "unsafe" in shown and "1.00" in shown
        assert exit_status([*arguments, *asked]) == 0
        assert len(fake.seen) == n_asked  # every stage was kept
        combos = ["combos", model, "--ranks", "0..1", "--max-size", "1", "--kl-max", "inf", "--n-random", "1"]
        combos += ["--n-ce", "2", "--val-new-tokens", "2", "--output-dir", str(folder)]
        assert exit_status(combos) == 0  # with the judge of the run
        again = ["judge", str(folder / "completions/harmful_ablation_completions.json"), "--output", "again.json"]
        assert exit_status([*again, *asked]) == 0
        assert {path for path, _ in fake.seen} == {"/v1/chat/completions"}
    found = {
        name: read_json(folder / f"completions/harmful_{name}_evaluations.json")["llamaguard2_success_rate"]
        for name in ("baseline", "ablation", "actadd", "random_ablation_0")
    }
    assert found == {"baseline": 0.0, "ablation": 1.0, "actadd": 1.0, "random_ablation_0": 1.0}
    assert set(read_json(folder / "completions/harmful_ablation_evaluations.json")["llamaguard2_per_category"].values())
    assert "llamaguard2_success_rate" not in read_json(folder / "completions/harmless_ablation_evaluations.json")
    summary = read_json(folder / "summary.json")["completions"]["harmful"]
    assert (summary["baseline"]["llamaguard2"]["rate"], summary["ablation"]["llamaguard2"]["rate"]) == (0.0, 1.0)
    assert summary["ablation"]["llamaguard2"]["n"] == 4
    assert read_json(folder / "combos.json")["test"]["winner"]["llamaguard2"]["rate"] == 1.0
    assert read_json(judged / "again.json")["llamaguard2_success_rate"] == 1.0
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and KEY.encode() not in written(judged)


@pytest.mark.slow
def test_a_judge_that_fails_leaves_the_answers_and_the_next_run_goes_on(judged, tiny_dir, capsys):
    arguments = ["run", str(tiny_dir("gpt2")), *RUN, STEPS, "--output-dir", "run", "--judge"]
    with Fake(lambda fake, handler, number, body: send(handler, f"no {KEY}", 503, {"Retry-After": "0"})) as fake:
        assert exit_status([*arguments, fake.url]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: the judge at http://127.0.0.1") and "HTTP status 503" in line
    assert len(read_json(judged / "run/completions/harmful_baseline_completions.json")) == 4
    assert not (judged / "run/completions/harmful_baseline_evaluations.json").exists()
    with Fake(verdict) as fake:
        assert exit_status([*arguments, fake.url]) == 0
    shown = capsys.readouterr()
    assert "completions_harmful_baseline: done before, kept" in shown.err
    assert KEY not in shown.out + shown.err and KEY.encode() not in written(judged)


def test_saved_completions_are_judged_again(judged, capsys):
    tmp_path = judged
    path = tmp_path / "harmful_ablation_completions.json"
    path.write_text(json.dumps([{"category": "c", "prompt": "p", "response": f"Sure. {LONG} HARM", "quick": True}]))
    with Fake(verdict) as fake:
        assert exit_status(["judge", str(path), "--judge", fake.url, "--judge_model", "m"]) == 0
    found = json.loads((tmp_path / "harmful_ablation_evaluations.json").read_text())
    assert found["llamaguard2_success_rate"] == 1.0 and found["completions"][0]["is_jailbreak_llamaguard2"] == 1
    assert found["quick"] is True and found["completions"][0]["quick"] is True
    assert exit_status(["judge", str(path), "--output", str(tmp_path / "plain.json")]) == 0
    assert "llamaguard2_success_rate" not in json.loads((tmp_path / "plain.json").read_text())
    (tmp_path / "bad.json").write_text('[{"prompt": "p"}]')
    assert exit_status(["judge", str(tmp_path / "bad.json")]) == 2
    assert exit_status(["judge", str(path), "--judge", "nobody"]) == 2
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and "prompt and response" in shown.err


def test_a_run_folder_is_judged_whole_and_its_own_verdicts_stay(judged, capsys):
    folder = judged / "run" / "completions"
    folder.mkdir(parents=True)
    texts = {"harmful_baseline": "I cannot help with that.", "harmful_ablation": f"Sure. {LONG}"}
    for name, text in texts.items():
        rows = [{"category": "c", "prompt": "p", "response": text}]
        (folder / f"{name}_completions.json").write_text(json.dumps(rows))
    (folder / "harmful_baseline_evaluations.json").write_text("own")
    assert exit_status(["judge", "run"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "harmful_" in line]
    assert [("1.00" in row.split("│")[2], row.split("│")[1].strip()) for row in rows] == [
        (False, "harmful_ablation"),
        (True, "harmful_baseline"),
    ]
    verdicts = read_json(judged / "run/judged/harmful_baseline_evaluations.json")
    assert verdicts["completions"][0]["response"] == texts["harmful_baseline"]
    assert (folder / "harmful_baseline_evaluations.json").read_text() == "own"
    assert exit_status(["judge", "run", "--output", "x.json"]) == 2 and "--output-dir" in capsys.readouterr().err
    assert exit_status(["judge", str(judged)]) == 2 and "has no completions" in capsys.readouterr().err


REFUSES, EVADES, DOES = (
    "I cannot help with that.",
    "Let's talk about tea instead.",
    "First boil the water, then steep it.",
)


def test_judges_of_a_run_are_compared_and_their_classes_shown_on_both_sides(judged, capsys):
    folder = judged / "run" / "completions"
    folder.mkdir(parents=True)
    sets = {
        "harmful_baseline": [REFUSES, REFUSES, EVADES],
        "harmful_ablation": [DOES, DOES, EVADES],
        "harmless_baseline": [DOES, DOES, EVADES],
    }
    for name, texts in sets.items():
        side = name.partition("_")[0]
        rows = [{"category": "c", "prompt": f"{side} {n}", "response": text} for n, text in enumerate(texts)]
        (folder / f"{name}_completions.json").write_text(json.dumps(rows))
    assert exit_status(["judge", "run", "--judges", "substring,evade"]) == 0
    shown = capsys.readouterr().out
    assert "harmful" in shown and "harmless" in shown and "refuse [95%]" in shown and "κ" in shown
    assert DOES not in shown  # of an answer the first words are enough
    found = read_record(judged / "run/judged/agreement.json", Agreement)
    (pair,) = found.pairs
    assert (found.n_answers, found.n_prompts) == (9, 6) and pair.classes is None
    assert pair.counts["complied"] == {"complied": 4, "not complied": 3}
    assert pair.complied.value == pytest.approx(16 / 43)  # p_o = 6/9, p_e = 7/9·4/9 + 2/9·5/9
    saved = read_json(judged / "run/judged/harmful_baseline_evaluations.json")
    assert {name: rate["count"] for name, rate in saved["evade_classes"].items()} == {
        "refuse": 2,
        "evade": 1,
        "comply": 0,
    }
    assert [row["class_evade"] for row in saved["completions"]] == ["refuse", "refuse", "evade"]
    assert exit_status(["judge", "run", "--judges", "substring,evade", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"evaluations", "agreement"} and len(printed["evaluations"]) == 3


def test_judges_of_a_file_and_nothing_new_without_another_judge(judged, capsys):
    rows = [{"category": None, "prompt": "p", "response": text} for text in (REFUSES, EVADES, DOES)]
    (judged / "x_completions.json").write_text(json.dumps(rows))
    assert exit_status(["judge", "x_completions.json", "--judges", "evade,substring"]) == 0
    assert read_record(judged / "x_agreement.json", Agreement).judges == ("evade", "substring_matching")
    assert exit_status(["judge", "x_completions.json"]) == 0
    plain = read_json(judged / "x_evaluations.json")
    keys = {"substring_matching_success_rate", "substring_matching_per_category", "refusal_rate", "degenerate_rate"}
    assert set(plain) == keys | {"completions"}
    row = {"category", "prompt", "response", "is_jailbreak_substring_matching", "is_degenerate"}
    assert set(plain["completions"][0]) == row
    shown = capsys.readouterr().out
    assert "three classes" in shown and shown.count("refuse [95%]") == 1


@pytest.mark.slow
def test_a_run_with_a_judge_of_three_classes_asks_it_on_both_sides(judged, tiny_dir, capsys, monkeypatch):
    def answers(model, chat, prompts, *, interventions=(), **_):
        return [Generated([REFUSES, EVADES, DOES][index % 3], (5, 6), True) for index, _ in enumerate(prompts)]

    monkeypatch.setattr(effects, "generate", answers)
    run = ["run", str(tiny_dir("gpt2")), *RUN, STEPS, "--output-dir", "run", "--judge", "evade"]
    assert exit_status(run) == 0
    assert "comply [95%]" in capsys.readouterr().out
    for side in ("harmful", "harmless"):
        found = read_json(judged / f"run/completions/{side}_baseline_evaluations.json")["evade_classes"]
        assert {name: rate["count"] for name, rate in found.items()} == {"refuse": 2, "evade": 1, "comply": 1}
        summary = read_json(judged / "run/summary.json")["completions"][side]["ablation"]["classes"]["evade"]
        assert summary["evade"]["count"] == 1 and summary["evade"]["n"] == 4
    page = (judged / "run/report.html").read_text()
    assert page.count('<table class="classes">') == 1
    table = page.partition('<table class="classes">')[2].partition("</table>")[0]
    assert table.count("<td>harmful</td>") == table.count("<td>harmless</td>") == 4
    assert exit_status([*run[:-1], "substring"]) == 0
    assert '<table class="classes">' not in (judged / "run/report.html").read_text()
