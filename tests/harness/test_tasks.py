"""Tasks in a folder of one's own: which items they ask, and what is read of the answers."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: refusal_mi[eval]")

from refusal_mi.directions import Direction
from refusal_mi.harness.requests import Requests
from refusal_mi.harness.tasks import answer_choices, answer_task, task_inputs
from refusal_mi.interventions import Add
from refusal_mi.likelihoods import Likelihood


class Canned(Requests):
    """Answers that are made up: the same text to everything, and ln p of every choice."""

    text: str = ""
    nats = None

    def log_likelihoods(self, pairs):
        return [Likelihood(self.nats.get(f"{before}|{after.strip()}", -9.0), False) for before, after in pairs]

    def completions(self, context, until, max_new_tokens):
        return [self.text] * len(context)


@pytest.fixture
def canned(tiny_model):
    def make(text="", nats=()):
        made = Canned(tiny_model("llama"))
        made.text, made.nats = text, dict(nats)
        return made

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`folder(yaml, rows, python)`: a folder with a task; FILE in the YAML is the data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(text, rows, python=None):
        where = tmp_path / "tasks"
        where.mkdir()
        (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (where / "own.yaml").write_text(text.replace("FILE", str(where / "rows.jsonl")))
        if python is not None:
            (where / "utils.py").write_text(python)
        return where

    return make


WRITES = """\
task: own_writes
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
generation_kwargs: {until: ["Q"], do_sample: false, max_gen_toks: 8}
"""
DRAWS = """
import random, numpy as np, torch

def draw(docs):
    return docs.select([*random.sample(range(40), 3), *np.random.choice(40, 3), *torch.randperm(40)[:3].tolist()])
"""


def test_every_model_is_asked_the_same_items_of_a_task_that_draws_them(canned, folder):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(40)]
    own = folder(WRITES + "process_docs: !function utils.draw\n", rows, DRAWS)
    model, asked = canned("7"), []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        (found,) = answer_task(model, "own_writes", include_path=own)
        asked.append([item.prompt for item in found.items])
        after = np.random.rand(), torch.rand(()).item()  # Python's are drawn by the runtime type checker too
        np.random.seed(seed), torch.manual_seed(seed)
        assert after == (np.random.rand(), torch.rand(()).item()), "states are left as they were"
    assert asked[0] == asked[1] and len(set(asked[0])) > 5


NUMBERS = """\
filter_list:
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
"""


@pytest.mark.parametrize(
    ("text", "is_answered"), [("I do not know...", False), ("$, maybe,.", False), ("It is 7", True)]
)
def test_dots_are_no_number(text, is_answered, canned, folder):
    own = folder(WRITES + NUMBERS, [{"question": "7?", "answer": "7"}])
    (found,) = answer_task(canned(text), "own_writes", include_path=own)
    (bundled,) = answer_task(canned(text), "sums", limit=1)
    assert found.items[0].is_answered is bundled.items[0].is_answered is is_answered
    assert bundled.items[0].answer == ("7" if is_answered else "[invalid]")
    (raw,) = answer_task(canned("..."), "own_writes", include_path=own)
    assert not raw.items[0].is_answered


def test_a_text_without_a_filter_may_be_dots(canned, folder):
    own = folder(WRITES, [{"question": "7?", "answer": "..."}])
    (found,) = answer_task(canned("..."), "own_writes", include_path=own)
    assert found.items[0].is_answered and found.values == (1.0,)


CHOOSES = """\
task: own_chooses
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q"
doc_to_choice: ["ab", "abcdefgh", "cccc"]
doc_to_target: 1
metric_list: [METRICS]
"""
LN_P = {"Q|ab": -2.0, "Q|abcdefgh": -4.0, "Q|cccc": -3.0, "|ab": -1.0, "|abcdefgh": -5.0, "|cccc": -6.0}


@pytest.mark.parametrize(
    ("metric", "choice"), [("acc", "0"), ("acc_norm", "1"), ("acc_bytes", "1"), ("acc_mutual_info", "2")]
)
def test_the_choice_is_that_of_the_metric(metric, choice, canned, folder):
    own = folder(CHOOSES.replace("METRICS", f"{{metric: {metric}}}"), [{"text": "a"}])
    (found,) = answer_task(canned(nats=LN_P), "own_chooses", include_path=own)
    (item,) = found.items
    assert (found.metric, item.answer, item.nats) == (metric, choice, (-2.0, -4.0, -3.0))
    assert (item.answer == "1") is (found.values == (1.0,)) and found.chance == pytest.approx(1 / 3)


def test_what_python_writes_beside_a_task_is_no_part_of_it(folder):
    own = folder(WRITES, [{"question": "7?", "answer": "7"}], DRAWS)
    before = task_inputs("own_writes", own)
    assert set(before["task_files"]) == {"own.yaml", "rows.jsonl", "utils.py"}
    (own / "__pycache__").mkdir()
    (own / "__pycache__" / "utils.cpython-312.pyc").write_bytes(b"1")
    assert task_inputs("own_writes", own) == before
    (own / "utils.py").write_text(DRAWS + "# another")
    assert task_inputs("own_writes", own) != before


def test_the_bundled_choices_need_no_harness(tiny_model):
    """Every item as the harness reads it; a model that is changed answers otherwise, and both see that."""
    model = tiny_model("llama")
    drawn = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    steps = Add(Direction.of(9 * drawn, layer=1))
    found = []
    for interventions in ((), steps):
        (expected,) = answer_task(Requests(model, None, interventions), "everyday")
        found.append(answer_choices(Requests(model, None, interventions)))
        assert [replace(item, nats=()) for item in found[-1].items] == [
            replace(item, nats=()) for item in expected.items
        ]
        for mine, theirs in zip(found[-1].items, expected.items, strict=True):
            assert mine.nats == pytest.approx(theirs.nats, abs=1e-4)
        assert replace(found[-1], items=()) == replace(expected, items=())
    assert found[0].values != found[1].values and len(found[0].items) == 80
    assert [item.doc for item in answer_choices(Requests(model), 3).items] == [0, 1, 2]
