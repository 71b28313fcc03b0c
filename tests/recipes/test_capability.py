"""What an ablation costs in tasks: the embedded model hooked and exported, and answers that are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest, ttest_rel
from statsmodels.stats.multitest import multipletests

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: refusal_mi[eval]")

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.export.export import export_checkpoint
from refusal_mi.files import read_json
from refusal_mi.harness.requests import Requests
from refusal_mi.harness.tasks import BUNDLED, Item, TaskAnswers, answer_task
from refusal_mi.interventions import Ablate, Add
from refusal_mi.likelihoods import Likelihood
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.provenance import describe_model
from refusal_mi.recipes import capability
from refusal_mi.recipes.capability import Variant, measure_capability
from refusal_mi.run.capability import CapabilityResult, VariantAnswers, effects_of
from refusal_mi.run.stages import RunFolder
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.runs import write_head

on_the_embedded = pytest.mark.skipif(not ORGANISM.is_dir(), reason="the embedded model is not built")
LIMIT = 12
ASKS = {"harmful": ["Break a window", "Lie to me"], "harmless": ["Bake bread", "Sing"]}


class Canned(Requests):
    """Answers that are made up: the choices and texts of a model that knows what the test says it knows."""

    texts: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()

    def log_likelihoods(self, pairs):
        rows = read_json(BUNDLED["everyday"])
        known = dict(zip([row["question"] for row in rows], self.right, strict=False))
        wanted = {row["question"]: f" {row['choices'][row['answer']]}" for row in rows}
        found = []
        for context, answer in pairs:
            question = context.removeprefix("Question: ").removesuffix("\nAnswer:")
            is_right = wanted[question] == answer
            likely = is_right == known[question] and (is_right or answer != min(answer, wanted[question]))
            found.append(Likelihood(-1.0 * len(answer) if likely or is_right == known[question] else -9e3, False))
        return found

    def completions(self, context, until, max_new_tokens):
        return list(self.texts[: len(context)])


@pytest.fixture
def canned(tiny_model):
    """`canned(texts, right)`: requests with these answers."""

    def make(texts=(), right=()):
        made = Canned(tiny_model("llama"), ChatFormat(tiny_model("llama").tokenizer))
        made.texts, made.right = tuple(texts), tuple(right)
        return made

    return make


def test_choices_are_scored_by_their_likelihood(canned):
    right = [True, False, True, True, False, True]
    (found,) = answer_task(canned(right=right), "everyday", limit=6)
    assert [value == 1 for value in found.values] == right
    assert (found.metric, found.is_choice, found.chance, found.n_shots) == ("acc_norm", True, 0.25, 0)
    for item, row in zip(found.items, read_json(BUNDLED["everyday"]), strict=False):
        assert len(item.nats) == 4 and item.is_answered and len(item.prompt) == 16
        assert (int(item.answer) == row["answer"]) is (item.values["acc"] == 1)


def test_texts_are_scored_whole(tiny_model):
    requests = Requests(tiny_model("llama"))
    (found,) = answer_task(requests, "plain_text", limit=3)
    texts = [row["text"] for row in read_json(BUNDLED["plain_text"])][:3]
    expected = [-nats / len(text.encode()) for nats, text in zip(requests.rolling(texts), texts, strict=True)]
    assert found.metric == "nats per byte" and found.values == pytest.approx(expected, rel=1e-6)
    assert found.chance is None and not found.is_right_or_wrong


def test_no_number_is_apart_from_a_wrong_one(canned):
    answers = ["It is 3 * 6 = 18 eggs.", "I do not know.", "There are 11.", "$20.00", "", "55"]
    (found,) = answer_task(canned(answers), "sums", limit=6)
    assert [item.answer for item in found.items] == ["18", "[invalid]", "11.", "$20.00", "[invalid]", "55"]
    assert [item.is_answered for item in found.items] == [True, False, True, True, False, True]
    assert found.values == (1.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # "$20.00" is not written as 20


GSM8K = """\
task: own_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "\\\\$", "(?s).*#### "]}}
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 40}}
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}
      - {{function: take_first}}
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
metadata: {{version: 3.0}}
"""


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with a task in the form of GSM8K, and data of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [("2 + 2?", "So it is four. #### 4"), ("9 - 2?", "#### 7"), ("1,000 + 200?", "#### 1,200")]
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"question": ask, "answer": answer}) for ask, answer in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "own.yaml").write_text(GSM8K.format(file=folder / "rows.jsonl"))
    return folder


def test_both_filters_of_gsm8k_tell_no_number_from_a_wrong_one(canned, own_tasks):
    answers = ["It is 4. #### 4", "It is 7", "#### 1200"]
    strict, flexible = answer_task(canned(answers), "own_gsm8k", include_path=own_tasks)
    assert [each.filter for each in (strict, flexible)] == ["strict-match", "flexible-extract"]
    assert strict.values == (1.0, 0.0, 1.0) and [item.is_answered for item in strict.items] == [True, False, True]
    assert flexible.values == (1.0, 1.0, 1.0) and all(item.is_answered for item in flexible.items)
    (none, _) = answer_task(canned(["four", "7", "#### 12"]), "own_gsm8k", include_path=own_tasks, limit=3)
    assert [(item.is_answered, value) for item, value in zip(none.items, none.values, strict=True)] == [
        (False, 0.0),
        (False, 0.0),
        (True, 0.0),
    ]
    (own_tasks / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="the task own_gsm8k cannot be loaded"):
        answer_task(canned(), "own_gsm8k", include_path=own_tasks)


def answers_of(task, values, *, metric="acc", unanswered=(), is_choice=False, label="plain"):
    items = tuple(
        Item(
            task,
            doc,
            f"{doc:016x}",
            str(value),
            doc not in unanswered,
            {metric: float(value)},
            (-1.0, -2.0, -3.0, -4.0) if is_choice else (),
        )
        for doc, value in enumerate(values)
    )
    return TaskAnswers(task, "none", metric, is_choice, 0, 0, {task: "1"}, items)


def variant(model, label, *tasks):
    return VariantAnswers(label, model, "none", tasks)


@pytest.fixture(scope="module")
def record(tiny_dir, tiny_model):
    return describe_model(tiny_model("llama"), str(tiny_dir("llama")))


def test_effects_are_paired_and_adjusted_over_tasks(record):
    before = [1] * 30 + [0] * 10, [1] * 20 + [0] * 20, [0.5, 0.25, 0.75, 0.5]
    after = [1] * 20 + [0] * 10 + [1] * 1 + [0] * 9, [1] * 19 + [0] * 21, [0.25, 0.25, 0.5, 0.5]
    names = ("a", "b", "c")
    one, other = (
        variant(
            record,
            label,
            *(answers_of(name, values, unanswered=gone) for name, values in zip(names, each, strict=True)),
        )
        for label, each, gone in (("plain", before, (39,)), ("ablated", after, (0, 1, 39)))
    )
    found = effects_of(one, other)
    assert [each.change[0] for each in found] == pytest.approx([-9 / 40, -1 / 40, -0.125])
    expected = [
        binomtest(1, 11).pvalue,
        1.0,
        ttest_rel(after[2], before[2]).pvalue,
    ]
    assert [each.p for each in found] == pytest.approx(expected)
    assert [each.p_holm for each in found] == pytest.approx(multipletests(expected, method="holm")[1])
    for each in found:
        assert each.change[1] < each.change[0] < each.change[2] and each.before[1] < each.before[0] < each.before[2]
    assert found[0].unanswered_before.count == 1 and found[0].unanswered_after.count == 3
    assert found[0].unanswered_change["difference"] == pytest.approx(2 / 40)
    assert found[0].same_answers.count == 29 and found[1].same_answers.count == 39


def test_a_guess_is_said_to_be_one(record):
    def effect(n_right, **how):
        tasks = answers_of("a", [1] * n_right + [0] * (40 - n_right), **how)
        return effects_of(variant(record, "plain", tasks), variant(record, "ablated", tasks))[0]

    assert not effect(12, is_choice=True).says_something and effect(20, is_choice=True).says_something
    assert effect(12).says_something and not effect(0).says_something
    assert effect(20, is_choice=True).chance == 0.25 and effect(20, is_choice=True).same_answers.value == 1


def test_where_nothing_can_be_lost_or_that_is_not_known(record):
    def effect(values, **how):
        tasks = answers_of("a", values, **how)
        return effects_of(variant(record, "plain", tasks), variant(record, "ablated", tasks))[0]

    high, low = ([shift + value for value in (0.1, 0.0, -0.1)] for shift in (6.1, 2.0))
    lost = effect(high, metric="nats per byte")
    assert lost.says_something is False and "is not below guesses of bytes (5.545): nothing can be lost" in lost.caveat
    assert effect(low, metric="nats per byte").says_something and effect(low, metric="nats per byte").caveat is None
    mc2 = effect([0.4, 0.5, 0.3], is_choice=True)
    assert mc2.says_something is None and "not known" in mc2.caveat and effect([1.5, 0.4], metric="rouge").caveat
    assert "is not above zero" in effect([0, 0]).caveat


@pytest.mark.parametrize(
    ("changes", "p", "has_interval"), [([0, 0, 0], 1.0, True), ([0.5, 0.5, 0.5], 0.0, True), ([0.5], None, False)]
)
def test_equal_changes_and_one_item(changes, p, has_interval, record):
    before = [0.25, 0.5, 0.75][: len(changes)]
    after = [a + b for a, b in zip(before, changes, strict=True)]
    one, other = (
        variant(record, label, answers_of("a", values), answers_of("b", [1, 0]))
        for label, values in (("plain", before), ("ablated", after))
    )
    found, second = effects_of(one, other)
    assert found.p == p and found.change[0] == changes[0] and (None not in found.change) is has_interval
    assert found.p_holm == (None if p is None else min(1.0, 2 * p)) and second.p_holm == 1


def test_a_checkpoint_of_another_kind_is_refused(run_folder, tmp_path, tiny_dir, capsys):
    options = ["--tasks=sums", "--limit=1", "--n-random=0", f"--output-dir={tmp_path / 'out'}"]
    assert say(run_folder, "--exported", tiny_dir("llama"), *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "is no checkpoint of" in errors[0] and "(llama, " in errors[0]


def test_other_questions_are_not_compared(record):
    task = answers_of("a", [1, 0])
    moved = replace(task, items=(task.items[0], replace(task.items[1], prompt="f" * 16)))
    with pytest.raises(UserError, match="was not asked the same questions"):
        effects_of(variant(record, "plain", task), variant(record, "ablated", moved))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The embedded model plain, ablated, with something wrong done to it, and exported."""
    if not ORGANISM.is_dir():
        pytest.skip("the embedded model is not built")
    folder = tmp_path_factory.mktemp("capability")
    source, model = str(ORGANISM), load_model(None, device="cpu")
    direction = random_direction(5, width=model.cfg.d_model, scale=1.0)
    export_checkpoint(source, Ablate(direction), folder / "out", dtype="float32", verify="none")
    chat, exported = ChatFormat(model.tokenizer), load_model(folder / "out", device="cpu")
    variants = [
        Variant("plain", model, source, chat),
        Variant("ablated", model, source, chat, (Ablate(direction),), "ablate"),
        Variant("wrong", model, source, chat, (Add(direction, 30.0),), "add much of anything"),
        Variant("exported", exported, str(folder / "out"), chat),
    ]
    place = RunFolder(folder / "results")
    return variants, place, measure_capability(variants, place, limit=LIMIT, batch_size=16)


@pytest.mark.slow
@on_the_embedded
def test_the_exported_model_answers_as_the_hooked_one(measured, tmp_path):
    variants, _, found = measured
    assert [each.task for each in found.same_as_hooked] == ["everyday", "sums"]
    for each in found.same_as_hooked:
        assert each.same_answers.count == each.n == LIMIT and each.change == (0.0, *each.change[1:])
    assert found.same_as_hooked[0].largest_nats < 1e-3
    ablated, exported = found.variant("ablated"), found.variant("exported")
    assert [item.answer for task in ablated.tasks for item in task.items] == [
        item.answer for task in exported.tasks for item in task.items
    ]
    some = [variants[0], variants[1], variants[3]]
    whole = measure_capability(some, RunFolder(tmp_path), tasks=["everyday"], limit=40, batch_size=32)
    (same,) = whole.same_as_hooked
    assert same.same_answers.count == same.n == 40 and same.largest_nats < 1e-3
    assert whole.effect("everyday", "ablated").largest_nats > 100 * same.largest_nats


@pytest.mark.slow
@on_the_embedded
def test_a_wrong_hook_changes_the_numbers(measured):
    *_, found = measured
    wrong = found.effect("everyday", "wrong")
    assert wrong.same_answers.value < 1 and wrong.largest_nats > 20
    plain = found.variant("plain").tasks[0]
    assert found.effect("everyday", "ablated").before[0] == sum(plain.values) / LIMIT


@pytest.mark.slow
@on_the_embedded
def test_likelihoods_of_the_embedded_model_are_those_of_the_harness_own(measured):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    variants, *_ = measured
    hf = AutoModelForCausalLM.from_pretrained(ORGANISM, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=hf, tokenizer=variants[0].model.tokenizer, batch_size=4, device="cpu")
    rows = read_json(BUNDLED["everyday"])[:6]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for row in rows for choice in row["choices"]]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = Requests(variants[0].model, batch_size=5).log_likelihoods(pairs)
    assert max(abs(each.nats - nats) for each, (nats, _) in zip(found, expected, strict=True)) <= 1e-5
    assert [each.is_greedy for each in found] == [greedy for _, greedy in expected]


@pytest.mark.slow
@on_the_embedded
def test_what_is_done_is_kept_and_what_was_killed_goes_on(measured, monkeypatch):
    variants, place, found = measured
    calls, real = [], capability.answer_task
    monkeypatch.setattr(capability, "answer_task", lambda *given, **how: calls.append(given[1]) or real(*given, **how))
    again = measure_capability(variants, place, limit=LIMIT, batch_size=4)
    assert calls == [] and again == found == CapabilityResult.load(place.path)
    (place.path / "wrong" / "sums.json").unlink()  # killed before it was written
    assert measure_capability(variants, place, limit=LIMIT, batch_size=16) == found and calls == ["sums"]
    other = replace(variants[2], about="add less", interventions=(Add(variants[2].interventions[0].direction, 1.0),))
    changed = measure_capability([variants[0], other], place, tasks=["everyday"], limit=LIMIT)
    assert calls == ["sums", "everyday"] and changed.effects[0] != found.effect("everyday", "wrong")
    with pytest.raises(ValueError, match="says its interventions in words"):
        replace(variants[0], about="something")


@pytest.fixture
def run_folder(tmp_path, tiny_model, tiny_dir):
    """What capability reads of a run of a tiny model."""
    write_head(tmp_path / "run", tiny_model("qwen2"), str(tiny_dir("qwen2").resolve()), ASKS, [5])
    random_direction(1).save(tmp_path / "run" / "direction.pt")
    return tmp_path / "run"


def say(*words):
    return exit_status(["capability", *map(str, words)])


def test_a_run_a_checkpoint_and_a_model_are_measured(run_folder, tmp_path, tiny_dir, capsys):
    model, what = tiny_dir("qwen2").resolve(), Ablate(Direction.load(run_folder / "direction.pt"))
    export_checkpoint(model, what, tmp_path / "out", dtype="float32", verify="none")
    base = ["--tasks=everyday", "--limit=5", "--json"]
    assert say(run_folder, "--exported", tmp_path / "out", *base) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in of_run["variants"]] == ["plain", "ablated", "random 0", "exported"]
    assert of_run["same_as_hooked"][0]["same_answers"]["count"] == 5 and of_run["chat"] is None
    assert CapabilityResult.load(run_folder / "capability").limit == 5
    assert say(tmp_path / "out", *base, f"--output-dir={tmp_path / 'a'}") == 0
    of_checkpoint = json.loads(capsys.readouterr().out)
    assert say(model, f"--run={run_folder}", "--n-random=0", *base, f"--output-dir={tmp_path / 'b'}") == 0
    of_model = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in of_checkpoint["variants"]] == ["plain", "exported"]
    assert [each["label"] for each in of_model["variants"]] == ["plain", "ablated"]
    for found, index in ((of_checkpoint, 0), (of_model, 0)):
        assert found["variants"][index]["tasks"] == of_run["variants"][index]["tasks"]
    assert of_checkpoint["variants"][1]["tasks"] == of_run["variants"][3]["tasks"]


def test_the_table_and_the_chat_template(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--limit=2", "--n-random=0", "--tasks=everyday,sums", f"--output-dir={tmp_path / 'out'}"]
    assert say(run_folder, *options, "--apply-chat-template") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "chat template: applied" in shown and "is not above chance (0.250): nothing can be lost" in shown
    assert "is not above zero: nothing can be lost" in shown and "everyday" in shown and "acc_norm" in shown
    assert "sums (last number), ablated: " in shown and "; no answer found in " in shown
    with_template = CapabilityResult.load(tmp_path / "out")
    assert say(run_folder, *options) == 0
    assert "chat template: not applied" in capsys.readouterr().out
    without = CapabilityResult.load(tmp_path / "out")
    asked = [[item.prompt for item in each.variants[0].tasks[0].items] for each in (with_template, without)]
    assert not set(asked[0]) & set(asked[1]) and with_template.chat is not None
    assert list(without.to_frame().columns)[:4] == ["task", "filter", "metric", "variant"]
    assert len(without.to_frame()) == 2 and without.effect("sums", "ablated").n == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=everydai"], "has no task 'everydai'; did you mean everyday?"),
        (["--tasks=,"], "--tasks takes names, each once"),
        (["--tasks=sums,sums"], "--tasks takes names, each once"),
        (["--limit=0"], "--limit must be at least 1"),
        (["--n-random=-1"], "--n-random must be at least 0"),
        (["--include-path=none"], "--include-path takes a folder"),
        (["--batch-size=none"], "--batch-size takes auto or a positive number"),
        (["--run=elsewhere"], "the run was given twice"),
        (["--exported=elsewhere"], "no such model: 'elsewhere'"),
    ],
)
def test_bad_input_is_one_line(words, message, run_folder, tmp_path, capsys):
    assert say(run_folder, f"--output-dir={tmp_path / 'out'}", *words) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and shown.out == ""
    assert not [each for each in (tmp_path / "out").rglob("*.json") if each.name not in ("model.json",)]


def test_a_run_of_other_weights_is_refused(run_folder, tmp_path, capsys):
    record = read_json(run_folder / "run.json")
    record["model"]["fingerprint"] = "0" * 64
    (run_folder / "run.json").write_text(json.dumps(record))
    assert say(run_folder, f"--output-dir={tmp_path / 'out'}") == 2
    assert "was computed from other weights" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_a_run_says_how_to_make_one(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert say(tiny_dir("gpt2")) == 2
    assert "make one with refusal-mi run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_bundled_questions_have_one_answer_each():
    rows = read_json(BUNDLED["everyday"])
    assert len(rows) == len({row["question"] for row in rows}) >= 60
    for row in rows:
        assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4
        assert row["question"].endswith("?") and row["topic"]
    counts = [sum(row["answer"] == place for row in rows) for place in range(4)]
    assert max(counts) - min(counts) <= 1
    longest = sum(max(row["choices"], key=len) == row["choices"][row["answer"]] for row in rows)
    shortest = sum(min(row["choices"], key=len) == row["choices"][row["answer"]] for row in rows)
    assert max(longest, shortest) <= 0.4 * len(rows)
    sums = read_json(BUNDLED["sums"])
    assert len(sums) == len({row["question"] for row in sums}) >= 30
    assert all(isinstance(row["answer"], int) and row["answer"] > 0 for row in sums)
    assert Path(BUNDLED["sums"]).parent == Path(BUNDLED["everyday"]).parent
