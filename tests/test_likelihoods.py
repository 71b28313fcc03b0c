"""Log-likelihoods of continuations against one text at a time with plain HF."""

import doctest

import pytest
import torch

from refusal_mi import likelihoods
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.likelihoods import log_likelihoods, windows
from refusal_mi.measures import ScoredText
from tests.helpers.directions import random_direction
from tests.helpers.naive import FAMILIES, ablating, dtype_of, logits, tolerance
from tests.helpers.tiers import first_is_fast

TEXTS = [
    ScoredText(tuple(b"The cat sat on the mat."), 8),
    ScoredText(tuple(b"Hi there"), 1),
    ScoredText(tuple(b"What is two plus three? five, of course, and never any other number"), 40),
    ScoredText(tuple(b"yes or no: a"), 11),
    ScoredText(tuple(b"yes or no: b"), 11),
    ScoredText(tuple(b"yes or no: b"), 5),
]
"""Unlike lengths and numbers of tokens; the last three run the same row, of which the last has another prompt."""


def alone(hf, text: ScoredText) -> tuple[float, bool]:
    """Σ ln p(token | before), and whether each is the likeliest."""
    read = logits(hf, list(text.token_ids)).double()
    log_p = read.log_softmax(-1)
    places = range(text.first, len(text.token_ids))
    nats = sum(log_p[place - 1, text.token_ids[place]].item() for place in places)
    return nats, all(read[place - 1].argmax().item() == text.token_ids[place] for place in places)


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_each_equals_the_text_alone_whatever_lies_beside_it(family, tiny_model, plain_model):
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    expected = [alone(hf, text) for text in TEXTS]
    for size in (1, 4, 32):
        found = log_likelihoods(model, TEXTS, 0, batch_size=size)
        assert [each.nats for each in found] == pytest.approx([nats for nats, _ in expected], rel=tolerance(family))
        assert [each.is_greedy for each in found] == [greedy for _, greedy in expected]
    assert len({round(nats, 6) for nats, _ in expected}) == len(TEXTS)


def test_the_likeliest_continuation_is_greedy_and_no_other(tiny_model, plain_model):
    model, hf = tiny_model("llama"), plain_model("llama")
    ids = list(b"Say it")
    for _ in range(3):
        ids.append(logits(hf, ids)[-1].argmax().item())
    texts = [ScoredText(tuple(ids), 6), ScoredText((*ids[:-1], (ids[-1] + 1) % 200), 6)]
    assert [each.is_greedy for each in log_likelihoods(model, texts, 0)] == [True, False]


def test_texts_that_differ_in_the_last_token_alone_are_one_row(tiny_model, monkeypatch):
    rows, read = [], likelihoods.batches

    def counted(model, given, *arguments, **options):
        rows.extend(given)
        return read(model, given, *arguments, **options)

    monkeypatch.setattr(likelihoods, "batches", counted)
    log_likelihoods(tiny_model("llama"), TEXTS, 0)
    assert len(rows) == len(TEXTS) - 1


def test_hooks_act_on_all_of_it(tiny_model, plain_model):
    model, hf, direction = tiny_model("gpt2", "float64"), plain_model("gpt2", "float64"), random_direction(4)
    plain = [each.nats for each in log_likelihoods(model, TEXTS, 0)]
    with ablating(hf, direction.vector):
        expected = [alone(hf, text)[0] for text in TEXTS]
    found = [each.nats for each in log_likelihoods(model, TEXTS, 0, interventions=Ablate(direction), batch_size=3)]
    assert found == pytest.approx(expected, rel=1e-10)
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain, found, strict=True))
    assert [each.nats for each in log_likelihoods(model, TEXTS, 0)] == plain


def test_the_prompt_of_a_hook_is_what_stands_before_the_continuation(tiny_model):
    """Of the answer's tokens, the first is written by the prompt's last position, the others by the answer's own."""
    model, add = tiny_model("gpt2"), random_direction(2)
    one, several = ScoredText(tuple(b"Tell me x"), 8), ScoredText(tuple(b"Tell me xyz"), 8)

    def read(text, positions):
        steps = [Add(add, 4.0, positions=positions)] if positions else []
        return log_likelihoods(model, [text, TEXTS[2]], 0, interventions=steps)[0].nats

    assert read(one, "prompt") == pytest.approx(read(one, "all"), abs=1e-5)
    assert abs(read(several, "prompt") - read(several, "all")) > 1e-3
    assert abs(read(one, "response") - read(one, None)) > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 12])
@pytest.mark.parametrize("n_ctx", [1, 2, 3, 4])
def test_windows_predict_every_token_once_with_all_the_context_that_fits(n, n_ctx):
    ids = list(range(1, n + 1))
    pieces = windows(ids, 0, n_ctx)
    assert [token for piece in pieces for token in piece.token_ids[piece.first :]] == ids
    whole = [0, *ids]
    for piece in pieces:
        end = whole.index(piece.token_ids[-1]) + 1
        assert list(piece.token_ids) == whole[max(0, end - n_ctx - 1) : end] and piece.first >= 1
    assert windows([], 0, n_ctx) == []
    assert not doctest.testmod(likelihoods, extraglobs={"windows": windows}).failed


def test_what_cannot_be_read(tiny_model, monkeypatch):
    model = tiny_model("llama")
    for text in (ScoredText((1, 2), 2), ScoredText((1, 2), 0)):
        with pytest.raises(ValueError, match="at least one token to predict, and one before it"):
            log_likelihoods(model, [text], 0)
    longest = ScoredText(tuple([1] * (model.cfg.n_ctx + 1)), 5)
    assert log_likelihoods(model, [longest], 0)[0].nats < 0 and log_likelihoods(model, [], 0) == []
    with pytest.raises(UserError, match="more than the model's context"):
        log_likelihoods(model, [ScoredText((*longest.token_ids, 1), 5)], 0)
    monkeypatch.setattr(likelihoods, "read_out", lambda _, stream: torch.full((*stream.shape[:-1], 300), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        log_likelihoods(model, TEXTS, 0)
