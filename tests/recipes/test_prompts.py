"""The prompts of a run: labelled by the model's own answers, filtered, filled up, and never from the test split."""

import json
from dataclasses import replace
from typing import get_type_hints

import pytest

from refusal_mi.analysis.dose import from_run as dose_from_run
from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.files import read_json, read_record
from refusal_mi.labels import Label
from refusal_mi.measures import refusal_scores
from refusal_mi.recipes.context import RunContext
from refusal_mi.recipes.prompts import examples, prepare
from refusal_mi.run.folder import RunInputs, RunRecord
from refusal_mi.run.options import RunOptions
from refusal_mi.run.record import LabelsRecord, PromptsRecord, RunInfo
from refusal_mi.run.stages import RunFolder

ASKED = RunOptions(n_train=20, n_val=10, n_test=8, response_prefix="", batch_size=64)
REFUSING, ANSWERING = (5, 6), (40, 7)


def asks(side: str, n: int, refused) -> list[str]:
    """Instructions that say what the fake model does with them."""
    return [f"{side} {index} {'no' if refused(index) else 'yes'}" for index in range(n)]


@pytest.fixture
def labelled(monkeypatch):
    """The instructions that were answered so far; a prompt is refused where it ends with "no"."""
    asked: list[str] = []

    def label(model, chat, instructions, *, n_tokens, batch_size):
        asked.extend(instructions)
        flags = [text.endswith("no") for text in instructions]
        return [
            Label(f"answer to {text}", REFUSING if flag else ANSWERING, flag)
            for text, flag in zip(instructions, flags, strict=True)
        ]

    monkeypatch.setattr("refusal_mi.recipes.prompts.label_prompts", label)
    return asked


@pytest.fixture
def prepared(tiny_model, tiny_dir, tmp_path, labelled):
    """Prepare a run on these instructions of both sides: lists, or three lists."""

    def made(harmful, harmless, name="run", **changes) -> PromptsRecord:
        def source(side, texts):
            parts = texts if isinstance(texts[0], list) else [texts]
            paths = [tmp_path / f"{side}{index}.json" for index, _ in enumerate(parts)]
            for path, part in zip(paths, parts, strict=True):
                path.write_text(json.dumps(part))
            return ",".join(map(str, paths))

        options = replace(ASKED, harmful=source("harmful", harmful), harmless=source("harmless", harmless), **changes)
        folder = RunFolder(tmp_path / name)
        return prepare(RunContext.start(tiny_model("gpt2"), str(tiny_dir("gpt2")), options, folder)).prompts

    return made


HARMFUL, HARMLESS = asks("harmful", 100, lambda index: index % 2), asks("harmless", 100, lambda index: index % 10 == 0)


def texts(rows) -> list[str]:
    return [row.instruction for row in rows]


def test_a_split_is_filled_until_it_keeps_what_was_asked_for(prepared):
    found = prepared(HARMFUL, HARMLESS)
    for side, word in ((found.harmful, "no"), (found.harmless, "yes")):
        assert (len(side.kept("train")), len(side.kept("val"))) == (20, 10)
        assert all(text.endswith(word) for part in ("train", "val") for text in side.kept(part))
        assert all(row.kept == row.instruction.endswith(word) for row in (*side.train, *side.val))
        tried = texts((*side.train, *side.val, *side.test))
        assert len(set(tried)) == len(tried), "a prompt serves once"
    assert len(found.harmful.train) > 30 and len(found.harmful.val) > 10, "half of them were not refused"
    assert found.refused("harmful").n == len(found.harmful.train) + len(found.harmful.val)
    assert all(row.answer == f"answer to {row.instruction}" for row in found.harmful.train)


def test_the_sample_of_every_split_is_that_of_a_run_without_a_filter(prepared):
    found, plain = (prepared(HARMFUL, HARMLESS, f"run{flag}", filter_prompts=flag) for flag in (True, False))
    for side in ("harmful", "harmless"):
        some, all_of_them = found.side(side), plain.side(side)
        assert texts(all_of_them.test) == texts(some.test)
        assert texts(some.train)[:20] == texts(all_of_them.train) and texts(some.val)[:10] == texts(all_of_them.val)
        assert len(all_of_them.kept("train")) == 20 and len(all_of_them.kept("val")) == 10, "nothing more is tried"
        assert all(row.kept and row.is_refused is not None for row in all_of_them.train)


def test_what_a_source_has_left_goes_to_the_shorter_part_until_it_ends(prepared):
    found = prepared(asks("harmful", 60, lambda index: index % 2), HARMLESS)
    side = found.harmful
    assert len(side.train) + len(side.val) == 52, "all but the test split was tried"
    kept = {part: len(side.kept(part)) for part in ("train", "val")}
    assert sum(kept.values()) < 30 and abs(kept["train"] / 20 - kept["val"] / 10) <= 0.1


def test_three_sources_fill_their_own_split_and_leave_the_test_source_alone(prepared):
    parts = [asks(f"harmful {part}", 60, lambda index: index % 2) for part in ("train", "val", "test")]
    found = prepared(parts, HARMLESS)
    assert (len(found.harmful.kept("train")), len(found.harmful.kept("val"))) == (20, 10)
    for part, source in zip(("train", "val", "test"), parts, strict=True):
        assert set(texts(getattr(found.harmful, part))) <= set(source)
    assert len(found.harmful.train) > 20 and len(found.harmful.test) == 8


def test_prompts_of_the_evaluation_set_fill_nothing(prepared, tmp_path):
    held_out = HARMFUL[::3]
    (tmp_path / "own.json").write_text(json.dumps(held_out))
    found = prepared(HARMFUL, HARMLESS, eval_set=str(tmp_path / "own.json"))
    tried = {*texts(found.harmful.train), *texts(found.harmful.val)}
    assert not set(texts(found.harmful.test)) & tried and set(texts(found.harmful.test)) <= set(held_out)


def test_harmless_prompts_of_another_set_are_reported_on_and_never_trained_on(prepared, tmp_path):
    others = [f"looks bad {index} yes" for index in range(12)]
    (tmp_path / "own.json").write_text(json.dumps([*HARMLESS, *others]))
    found = prepared(HARMFUL, HARMLESS, harmless_eval_set=str(tmp_path / "own.json"))
    test, tried = set(texts(found.harmless.test)), {*texts(found.harmless.train), *texts(found.harmless.val)}
    assert len(test) == 8 and test & set(others) and not test & tried
    plain = prepared(HARMFUL, HARMLESS, name="plain")
    assert not set(texts(plain.harmless.test)) & set(others)
    assert texts(plain.harmful.test) == texts(found.harmful.test)
    (tmp_path / "own.json").write_text(json.dumps(texts(plain.harmless.train)[:3]))
    with pytest.raises(UserError, match="every prompt of the evaluation set own is among the training"):
        prepared(HARMFUL, HARMLESS, name="again", harmless_eval_set=str(tmp_path / "own.json"))


def test_tokens_are_those_that_refusals_begin_with(prepared):
    found = prepared(HARMFUL, HARMLESS)
    assert found.prefixes == ((5,),) and found.token_ids == (5,)
    n = sum(row.is_refused for side in (found.harmful, found.harmless) for row in side.train)
    n_others = len(found.harmful.train) + len(found.harmless.train) - n
    said = f"they begin {n} of {n} refusals and 0 of {n_others} other answers to training prompts"
    assert found.refusal_tokens_origin == said
    assert prepared(HARMFUL, HARMLESS, "given", refusal_tokens=(9, 8)).prefixes == ((9,), (8,))


def test_a_model_that_hardly_ever_refuses_ends_the_run_before_the_harmless_prompts(prepared, labelled):
    rarely = asks("harmful", 100, lambda index: index % 20 == 0)
    found = prepared(rarely, HARMLESS)
    assert not found.refuses and found.prefixes == ()
    assert found.refused("harmful").interval[1] < 0.2 and found.refused("harmless") is None
    assert not any(text.startswith("harmless") for text in labelled)
    shown = examples(found)
    assert len(shown) == 2 and all(row.response == f"answer to {row.prompt}" for row in shown)
    going_on = prepared(rarely, HARMLESS, "on", filter_prompts=False, refusal_tokens=(5,))
    assert going_on.refuses and len(going_on.harmful.kept("train")) == 20, "the user knows better"


def test_a_model_that_refuses_some_needs_more_prompts(prepared):
    some = asks("harmful", 40, lambda index: index % 4 == 0)
    with pytest.raises(
        UserError, match=r"only \d of \d+ harmful train .* 0\.\d\d \[.* --n-train or --harmful.*--no-filter"
    ):
        prepared(some, HARMLESS)
    assert prepared([*some, *asks("more", 100, lambda index: index % 4 == 0)], HARMLESS).refuses


def test_labels_are_made_once_for_all_seeds_of_a_folder(prepared, labelled, tmp_path):
    first = prepared(HARMFUL, HARMLESS)
    there = read_record(tmp_path / "run" / "labels.json", LabelsRecord)
    assert [row.instruction for row in there.rows] == labelled and len(set(labelled)) == len(labelled)
    n_before = len(labelled)
    second = prepared(HARMFUL, HARMLESS, seed=7)
    assert texts(second.harmful.train) != texts(first.harmful.train)
    again = labelled[n_before:]
    assert again and not set(again) & set(labelled[:n_before])
    prepared(HARMFUL, HARMLESS, label_tokens=4)
    assert set(labelled[n_before + len(again) :]) >= set(texts(first.harmful.train)), "other answers, other labels"


def test_an_interrupted_labelling_goes_on_to_the_same_record(prepared, labelled, tmp_path, monkeypatch):
    whole = prepared(HARMFUL, HARMLESS, "whole")
    from refusal_mi.recipes import prompts

    label, calls = prompts.label_prompts, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return label(*arguments, **options)

    monkeypatch.setattr(prompts, "label_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(HARMFUL, HARMLESS, "cut")
    n_saved = len(read_json(tmp_path / "cut" / "labels.json")["rows"])
    assert n_saved >= 30
    assert prepared(HARMFUL, HARMLESS, "cut") == whole
    for name in ("labels.json", "prompts.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_published_calibration_labels_nothing(prepared, labelled):
    found = prepared(HARMFUL, HARMLESS, calibration="published", filter_prompts=False, refusal_tokens=(5, 40))
    assert labelled == [] and found.zero_point_nats is None and found.refused("harmful") is None
    with pytest.raises(UserError, match="by the score of its first token"):
        prepared(HARMFUL, HARMLESS, "filtered", calibration="published", refusal_tokens=(5, 40))


def test_the_command_line_says_that_a_model_does_not_refuse_and_ends_with_status_1(
    tiny_dir, tmp_path, labelled, capsys
):
    for side in ("harmful", "harmless"):
        (tmp_path / f"{side}.json").write_text(json.dumps(asks(side, 60, lambda index: False)))
    sets = [f"--{side}={tmp_path / side}.json" for side in ("harmful", "harmless")]
    sizes = ["--n-train=20", "--n-val=10", "--n-test=8", "--response-prefix=", f"--output-dir={tmp_path / 'run'}"]
    assert exit_status(["run", str(tiny_dir("gpt2")), *sets, *sizes]) == 1
    shown = capsys.readouterr().out
    assert "does not refuse" in shown and "0.00 [0.00, 0.11]" in shown and shown.count("answer to harmful") == 2
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "does not refuse" and len(summary["examples"]) == 2
    assert not (tmp_path / "run" / "select_direction").exists()
    assert "does not refuse" in (tmp_path / "run" / "report.html").read_text()
    assert exit_status(["combos", str(tiny_dir("gpt2")), f"--output-dir={tmp_path / 'run'}"]) == 1
    assert "does not refuse" in capsys.readouterr().out


@pytest.fixture
def both_begin_alike(monkeypatch):
    """A model whose first token is the same in refusals and in other answers: the second one tells."""

    def label(model, chat, instructions, *, n_tokens, batch_size):
        flags = [text.endswith("no") for text in instructions]
        return [Label("an answer", (40, 5) if flag else (40, 7), flag) for flag in flags]

    monkeypatch.setattr("refusal_mi.recipes.prompts.label_prompts", label)


def test_a_run_whose_refusals_need_several_tokens(both_begin_alike, tiny_dir, tiny_model, tmp_path, capsys):
    for side, texts_of in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        (tmp_path / f"{side}.json").write_text(json.dumps(texts_of))
    sets = [f"--{side}={tmp_path / side}.json" for side in ("harmful", "harmless")]
    sizes = ["--n-train=20", "--n-val=8", "--n-test=4", "--n-ce=2", "--max-new-tokens=3", "--response-prefix="]
    folder, model = tmp_path / "run", str(tiny_dir("gpt2"))
    arguments = [*sets, *sizes, "--no-thresholds", f"--output-dir={folder}"]
    assert exit_status(["run", model, *arguments]) == 0
    record = RunRecord.load(folder)
    assert record.prompts.prefixes == ((40, 5),) and record.summary.refusal_tokens[0].ids == (40, 5)
    assert read_json(folder / "direction_metadata.json")["refusal_tokens"][0]["then"] == [5]
    rows, chat = record.prompts.harmful.val, RunInputs(tiny_model("gpt2"), folder).chat
    expected = refusal_scores(tiny_model("gpt2"), chat, texts(rows), [(40, 5)]).tolist()
    assert [row.refusal_score for row in rows] == pytest.approx(expected, rel=1e-5)
    kept = [score for score, row in zip(expected, rows, strict=True) if row.kept]
    assert record.scores.baseline_harmful == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert exit_status(["combos", model, f"--output-dir={folder}", "--n-random=0", "--ranks=0,1"]) == 0
    baseline = read_json(folder / "combos" / "baseline.json")
    assert baseline["bypass"] == pytest.approx(record.scores.baseline_harmful, rel=1e-5)
    dose = dose_from_run(replace(RunInputs(tiny_model("gpt2"), folder), max_prompts=4))
    assert dose.provenance["settings"]["refusal_tokens"] == [(40, 5)]
    capsys.readouterr()
    assert "40 5" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("saved", "calibration"), [({"n_train": 5}, "published"), ({"calibration": "labels"}, "labels")]
)
def test_a_run_of_before_the_labels_is_a_published_one(saved, calibration, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(saved))
    kind = get_type_hints(RunInfo, include_extras=True)["options"]
    assert read_record(tmp_path / "options.json", kind).calibration == calibration


def test_harmless_prompts_that_are_answered_with_nothing_are_not_kept(prepared, monkeypatch):
    from refusal_mi.recipes import prompts

    label = prompts.label_prompts

    def silent(*arguments, **options):
        found = label(*arguments, **options)
        return [replace(each, answer="") if each.answer.endswith("7 yes") else each for each in found]

    monkeypatch.setattr(prompts, "label_prompts", silent)
    kept = prepared(HARMFUL, HARMLESS).harmless
    assert len(kept.kept("train")) == 20 and not any(text.endswith("7 yes") for text in kept.kept("train"))


def test_a_source_that_is_nearly_all_refused_is_not_tried_to_its_end(prepared, labelled, monkeypatch):
    monkeypatch.setattr("refusal_mi.recipes.prompts.MOST_TRIED", 2)
    with pytest.raises(UserError, match="harmless train prompts are answered"):
        prepared(HARMFUL, asks("harmless", 400, lambda index: index % 40 > 0))
    assert sum(text.startswith("harmless") for text in labelled) == 30 + 2 * 30


def test_what_the_phrases_cannot_read_is_recorded_and_said_where_too_few_are_kept(prepared):
    def english(n, refused):
        return asks("what is the weather of the day in a town", n, lambda _: refused)

    def chinese(n, refused):
        return asks("请告诉我今天天气怎么样", n, lambda _: refused)

    assert prepared(english(60, True), english(60, False)).judge_caution is None
    found = prepared(chinese(60, True), chinese(60, False), name="other")
    assert found.judge_caution.startswith("most prompts")
    with pytest.raises(UserError, match=r"--no-filter \(most prompts .* another script"):
        prepared(chinese(60, True), chinese(60, True), name="few")
