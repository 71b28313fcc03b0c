"""What the harness asks of a model, against plain transformers and against the harness' own model of it."""

import sys

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.harness.requests import Requests, Writing, as_harness_model
from refusal_mi.interventions import Ablate, Add
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.naive import ablating, logits

PAIRS = [
    ("The cat sat on", " the mat"),
    ("", "All of it is an answer"),
    ("Question: what is ice?\nAnswer:", " frozen water"),
    ("Question: what is ice?\nAnswer:", " x"),
    ("Question: what is ice?\nAnswer: ", "y"),
    ("  ", "after spaces"),
    ("long " * 150, "and then the end"),
]
"""The last is longer than the context of 512 tokens, of one byte each."""
TEXTS = ["Short.", "A text that is longer than the context. " * 40, ""]


@pytest.fixture(params=["llama", "gpt2"])
def both(request, tiny_model, plain_model):
    """A model here, and plain HF's."""
    return tiny_model(request.param), plain_model(request.param)


def expected_pair(model, hf, context, continuation):
    """ln p of a continuation, one text at a time: encoded together, cut on the left, EOS before it where alone."""
    tokenizer = model.tokenizer
    continuation = context[len(context.rstrip()) :] + continuation
    before = tokenizer(context.rstrip())["input_ids"] or [tokenizer.eos_token_id]
    whole = [*before, *tokenizer(continuation)["input_ids"]]
    n = len(whole) - len(before)
    row = whole[-(model.cfg.n_ctx + 1) :]
    log_p = logits(hf, row[:-1]).double().log_softmax(-1)
    return sum(log_p[place - 1, row[place]].item() for place in range(len(row) - n, len(row)))


def expected_rolling(model, hf, text):
    """ln p of a whole text, in steps of the context with as much before each as fits."""
    n_ctx, ids = model.cfg.n_ctx, [model.tokenizer.eos_token_id, *model.tokenizer(text)["input_ids"]]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + n_ctx, len(ids))
        row = ids[max(0, end - n_ctx - 1) : end]
        log_p = logits(hf, row[:-1]).double().log_softmax(-1)
        total += sum(log_p[place - 1, row[place]].item() for place in range(len(row) - (end - done), len(row)))
        done = end
    return total


@pytest.mark.parametrize("size", [1, None])
def test_log_likelihoods_equal_plain_transformers(both, size):
    model, hf = both
    requests = Requests(model, batch_size=size)
    found = [each.nats for each in requests.log_likelihoods(PAIRS)]
    assert found == pytest.approx([expected_pair(model, hf, *pair) for pair in PAIRS], abs=1e-5, rel=1e-6)
    assert requests.n_cut == 1
    rolled = requests.rolling(TEXTS)
    assert rolled == pytest.approx([expected_rolling(model, hf, text) for text in TEXTS], rel=1e-6)
    assert rolled[2] == 0 and len(model.tokenizer(TEXTS[1])["input_ids"]) > 3 * model.cfg.n_ctx


def test_hooks_are_on_in_every_kind_of_request(tiny_model, plain_model):
    model, hf, direction = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64"), random_direction(3)
    plain, hooked = Requests(model), Requests(model, interventions=Ablate(direction))
    with ablating(hf, direction.vector):
        expected = [expected_pair(model, hf, *pair) for pair in PAIRS]
        rolled = [expected_rolling(model, hf, text) for text in TEXTS[:2]]
    assert [each.nats for each in hooked.log_likelihoods(PAIRS)] == pytest.approx(expected, rel=1e-6)
    assert hooked.rolling(TEXTS[:2]) == pytest.approx(rolled, rel=1e-6)
    assert abs(plain.rolling(TEXTS)[1] - rolled[1]) > 1
    strong = Requests(model, interventions=Add(direction, 40.0))
    texts = [PAIRS[0][0], PAIRS[2][0]]
    assert strong.completions(texts, (), 12) != plain.completions(texts, (), 12)


def test_text_is_greedy_and_ends_before_the_first_stop(both):
    model, hf = both
    context = ["Say something", "And now a much longer beginning of it"]
    free = Requests(model).completions(context, (), 20)
    for text, found in zip(context, free, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        n_before = len(ids)
        while len(ids) < n_before + 20 and model.tokenizer.eos_token_id not in ids:
            ids.append(logits(hf, ids)[-1].argmax().item())
        assert found == model.tokenizer.decode(ids[n_before:], skip_special_tokens=True)
    stop = next(letter for letter in free[0][2:] if letter.isascii())  # half a character is not decoded alike
    stopped = Requests(model).completions(context, (stop, "\n\n\n"), 20)
    assert stopped == [text.split(stop)[0] for text in free] and len(stopped[0]) < len(free[0])


def test_a_context_that_leaves_no_room_is_cut_on_the_left(tiny_model):
    model = tiny_model("llama")
    requests = Requests(model)
    long = "".join(f"{n} " for n in range(400))
    cut = model.tokenizer.decode(model.tokenizer(long)["input_ids"][-(model.cfg.n_ctx - 8) :])
    assert requests.completions([long], (), 8) == Requests(model).completions([cut], (), 8)
    assert requests.n_cut == 1
    with pytest.raises(UserError, match="asks for 512 new tokens"):
        requests.completions(["x"], (), 512)


def test_how_a_task_asks_for_text():
    assert Writing.read({"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}) == Writing(
        ("\n",), 7
    )
    assert Writing.read({"until": ["a", "b"], "max_new_tokens": 9}) == Writing(("a", "b"), 9)
    assert Writing.read({}).max_new_tokens == 256
    for asked in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 2}):
        with pytest.raises(UserError, match="greedy answers only"):
            Writing.read(asked)


def test_the_chat_template_is_that_of_the_package(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer, system="Be brief.")
    ask, requests = [{"role": "user", "content": "Hi"}], Requests(model, chat)
    assert requests.rendered(ask, is_question=True) == chat.render("Hi")
    begun = [*ask, {"role": "assistant", "content": "The answer is"}]
    assert requests.rendered(begun, is_question=False) == chat.render("Hi") + "The answer is"
    with pytest.raises(UserError, match="leave out --apply-chat-template"):
        Requests(model).rendered(ask, is_question=True)


def test_without_the_harness_one_line_names_the_extra(monkeypatch, tmp_path, tiny_dir, tiny_model, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'refusal_mi\[eval\]'"):
        as_harness_model(Requests(tiny_model("llama")))
    line = ["capability", str(tiny_dir("gpt2")), "--exported", str(tiny_dir("gpt2"))]
    assert exit_status([*line, "--output-dir", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: capability needs lm-evaluation-harness") and not (tmp_path / "out").exists()


@pytest.fixture
def harness():
    """The harness' own model of Hugging Face, beside ours."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: refusal_mi[eval]")
    from lm_eval.models.huggingface import HFLM

    def make(model, hf, **options):
        own = HFLM(pretrained=hf, tokenizer=model.tokenizer, batch_size=2, device="cpu", **options)
        return as_harness_model(Requests(model, batch_size=3)), own

    return make


def asked(kind, *rows):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def test_answers_equal_those_of_the_harness_own_model(both, harness):
    ours, theirs = harness(*both)
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # theirs does not take a context of spaces
    rows = asked("loglikelihood", *pairs)
    found, expected = ours.loglikelihood(rows), theirs.loglikelihood(rows, disable_tqdm=True)
    for (nats, greedy), (their_nats, their_greedy), (_, text) in zip(found, expected, pairs, strict=True):
        assert abs(nats - their_nats) <= 1e-5 * max(1, len(text)) and greedy == their_greedy
    rows = asked("loglikelihood_rolling", *[(text,) for text in TEXTS])
    found = ours.loglikelihood_rolling(rows)
    assert found == pytest.approx(theirs.loglikelihood_rolling(rows, disable_tqdm=True), rel=1e-6)
    how = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    other = {"until": [], "max_gen_toks": 5}
    rows = asked("generate_until", *[(context, how) for context, _ in PAIRS if context.strip()], ("Say", other))
    assert ours.generate_until(rows) == theirs.generate_until(rows, disable_tqdm=True)


def test_a_wrong_hook_does_not_equal_it(both, harness):
    """The control: the comparison can fail."""
    model, hf = both
    _, theirs = harness(model, hf)
    wrong = as_harness_model(Requests(model, interventions=Add(random_direction(3), 20.0)))
    rows = asked("loglikelihood", *PAIRS[:3])
    expected = theirs.loglikelihood(rows, disable_tqdm=True)
    assert min(abs(a - b) for (a, _), (b, _) in zip(wrong.loglikelihood(rows), expected, strict=True)) > 0.1
    assert torch.is_grad_enabled()
