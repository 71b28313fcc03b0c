"""Cross-entropy against one text at a time with plain HF."""

import math

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import LossResult, ScoredText, TextLoss, answers_to_score, ce_loss, text_losses, texts_to_score
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import PromptSet
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS, CHATS, FAMILIES, ablating, dtype_of, logits, prompt_ids, tolerance
from tests.helpers.tiers import first_is_fast

PAIRS = [(ask, answer) for ask, answer in zip(ASKS, CHATS, strict=True)]


def naive_loss(hf, rows) -> tuple[float, int]:
    """Σ −ln p(token | before) over (ids, first predicted), and how many tokens."""
    total, count = 0.0, 0
    for ids, first in rows:
        log_p = logits(hf, ids).double().log_softmax(-1)
        for position in range(first, len(ids)):
            total -= log_p[position - 1, ids[position]].item()
            count += 1
    return total / count, count


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_loss_of_answers_and_of_plain_text_equals_text_by_text(family, tiny_model, plain_model):
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    chat = ChatFormat(model.tokenizer)
    answered = [
        (
            prompt_ids(chat.tokenizer, ask) + chat.tokenizer(answer, add_special_tokens=False)["input_ids"],
            len(prompt_ids(chat.tokenizer, ask)),
        )
        for ask, answer in PAIRS
    ]
    plain = [(chat.tokenizer(text)["input_ids"], 1) for text in CHATS]
    for scored, rows in ((answers_to_score(chat, PAIRS), answered), (texts_to_score(chat, CHATS), plain)):
        assert [(list(text.token_ids), text.first) for text in scored] == rows
        expected, count = naive_loss(hf, rows)
        found = ce_loss(model, chat, scored, batch_size=3)
        assert found.n_tokens == count
        assert found.ce_loss == pytest.approx(expected, rel=tolerance(family))
        assert found.perplexity == pytest.approx(math.exp(expected), rel=10 * tolerance(family))
        assert set(found.describe()) == {"ce_loss", "perplexity", "n_tokens"}


def test_loss_under_ablation_equals_text_by_text(tiny_model, plain_model):
    model, hf = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64")
    chat, direction = ChatFormat(model.tokenizer), random_direction(4)
    scored = answers_to_score(chat, PAIRS)
    rows = [(text.token_ids, text.first) for text in scored]
    with ablating(hf, direction.vector):
        expected, _ = naive_loss(hf, rows)
    found = ce_loss(model, chat, scored, interventions=[Ablate(direction)], batch_size=2).ce_loss
    assert found == pytest.approx(expected, rel=1e-10)
    assert abs(found - naive_loss(hf, rows)[0]) > 1e-3
    assert ce_loss(model, chat, scored, interventions=[Add(direction, 0.0)]) == ce_loss(model, chat, scored)


def test_every_text_alone_and_the_interval_of_their_change(tiny_model, plain_model):
    model, hf = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64")
    chat, ablation = ChatFormat(model.tokenizer), [Ablate(random_direction(4))]
    scored = answers_to_score(chat, PAIRS)
    plain, changed = (text_losses(model, chat, scored, interventions=each, batch_size=2) for each in ((), ablation))
    for text, loss in zip(scored, plain, strict=True):
        expected, count = naive_loss(hf, [(text.token_ids, text.first)])
        assert (loss.nats / loss.n_tokens, loss.n_tokens) == (pytest.approx(expected, rel=1e-10), count)
    assert ce_loss(model, chat, scored, batch_size=2) == LossResult.of(plain) != LossResult.of(changed)
    assert LossResult.of(plain).change is None and LossResult.of(plain, plain).change == (0, 0, 0)
    assert "change" in LossResult.of(changed, plain).describe() and "change" not in LossResult.of(plain).describe()


def test_the_interval_of_a_change_is_that_of_a_ratio_of_sums():
    """300 texts of different lengths against the linear approximation; unpaired it would be ten times as wide."""
    drawn = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 50, (300,), generator=drawn)
    before = counts * (3 + torch.randn(300, generator=drawn).double())
    shift = counts * (0.1 + 0.1 * torch.randn(300, generator=drawn).double())
    plain, changed = (
        [TextLoss(*each) for each in zip(values.tolist(), counts.tolist(), strict=True)]
        for values in (before, before + shift)
    )
    value, low, high = LossResult.of(changed, plain).change
    ratio = (shift.sum() / counts.sum()).item()
    half = 1.96 * ((shift - ratio * counts) ** 2).sum().sqrt().item() / counts.sum().item()
    assert value == pytest.approx(ratio) and (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low == pytest.approx(ratio - half, abs=0.2 * half) and low > 0.05
    shuffled = [plain[index] for index in torch.randperm(300, generator=drawn).tolist()]
    _, low, high = LossResult.of(changed, shuffled).change
    assert (high - low) / 2 > 5 * half, "the control: other texts"


def test_a_response_scope_begins_at_each_rows_last_prompt_token(tiny_model):
    """Adding on the response in a padded batch is adding from there on in every text alone."""
    model = tiny_model("gpt2", "float64")
    chat, direction = ChatFormat(model.tokenizer), random_direction(4)
    scored = answers_to_score(chat, PAIRS)
    add = [Add(direction, positions="response")]
    alone = [ce_loss(model, chat, [text], interventions=add, batch_size=1) for text in scored]
    total = sum(found.ce_loss * found.n_tokens for found in alone) / sum(found.n_tokens for found in alone)
    together = ce_loss(model, chat, scored, interventions=add, batch_size=5).ce_loss
    assert together == pytest.approx(total, rel=1e-10)
    assert together != pytest.approx(ce_loss(model, chat, scored, interventions=[Add(direction)]).ce_loss, rel=1e-6)


def test_empty_answers_and_texts_are_left_out(tiny_model):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    assert answers_to_score(chat, [("Hi", "")]) == [] and texts_to_score(chat, ["", "x"]) == []
    empty, text = ScoredText((1, 2, 3), 3), ScoredText((4, 5, 6, 7), 2)
    for nothing in ([], [empty], [empty, empty]):
        with pytest.raises(UserError, match="needs at least one text with a token to predict"):
            ce_loss(model, chat, nothing)
    assert ce_loss(model, chat, [empty, text, empty]) == ce_loss(model, chat, [text])
    assert ce_loss(model, chat, [text]) != ce_loss(model, chat, [ScoredText(text.token_ids, 1)])


def test_plain_texts_are_scored_as_they_come(tiny_model):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    expected = ce_loss(model, chat, texts_to_score(chat, CHATS))
    assert ce_loss(model, chat, CHATS) == expected == ce_loss(model, chat, PromptSet.from_list(CHATS))
    assert ce_loss(model, chat, CHATS[0]) == ce_loss(model, chat, CHATS[:1]) != expected
    with pytest.raises(UserError, match="texts: number 0 is no text but int"):
        ce_loss(model, chat, [1, 2])


def test_a_loss_that_is_no_number_is_an_error(tiny_model):
    model = tiny_model("gpt2")
    broken = [("unembed.hook_out", lambda x, hook: x * math.inf)]

    class Broken:
        def hooks(self, model, prompt_width=None):
            return broken

    chat = ChatFormat(model.tokenizer)
    scored = answers_to_score(chat, PAIRS)
    assert ce_loss(model, chat, scored).ce_loss > 0
    with pytest.raises(UserError, match="not finite"):
        ce_loss(model, chat, scored, interventions=[Broken()])


def test_plain_texts_are_cut_at_the_published_length(tiny_model):
    chat = ChatFormat(tiny_model("gpt2").tokenizer)
    assert [len(text.token_ids) for text in texts_to_score(chat, ["a b " * 200, "ab"])] == [256, 2]


def test_a_uniform_model_costs_the_log_of_its_vocabulary(tiny_model):
    model = tiny_model("gpt2")
    flat = [("unembed.hook_out", lambda x, hook: torch.zeros_like(x))]

    class Flat:
        def hooks(self, model, prompt_width=None):
            return flat

    chat = ChatFormat(model.tokenizer)
    found = ce_loss(model, chat, [ScoredText((1, 2, 3, 4), 2)], interventions=[Flat()])
    assert found.ce_loss == pytest.approx(math.log(model.cfg.d_vocab), rel=1e-6) and found.n_tokens == 2


def test_a_loss_beyond_all_perplexities_is_a_number_still():
    result = LossResult.of([TextLoss(1e6, 1)], [TextLoss(0.0, 1)])
    assert (result.ce_loss, result.change[0]) == (1e6, 1e6) and 1e308 < result.perplexity < math.inf
