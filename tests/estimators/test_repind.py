"""Representational independence a second way, and where the answer is known: of itself, of what nothing writes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from refusal_mi.errors import UserError
from refusal_mi.estimators.rdo import RDOOptions, fit_rdo
from refusal_mi.estimators.repind import dependence, fit_independent, independence_loss, layers_read, prompt_spans
from refusal_mi.export.export import orthogonalize_
from refusal_mi.model.loading import load_model
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.models import N_LAYERS, tiny_tokenizer
from tests.helpers.naive import ASKS, ablating, prompt_ids, residuals
from tests.helpers.rdo import made_up_texts

V, U = random_direction(1), random_direction(2)


def instruction(tokenizer, text):
    """Its tokens in the prompt."""
    before = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    return slice(before, before + len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def streams(hf, text, ablated=None):
    """[layer, pos, d_model] at the tokens of the instruction, of all layers below 0.9 n_layers."""
    ids = prompt_ids(tiny_tokenizer(), text)

    def read():
        found = residuals(hf, ids)[instruction(tiny_tokenizer(), text)]
        return found.double().transpose(0, 1)[: len(layers_read(N_LAYERS))]

    if ablated is None:
        return read()
    with ablating(hf, ablated.vector):
        found = read()
    return found - (found @ ablated.unit)[..., None] * ablated.unit  # HF shows a block's input before it is changed


def cosines(x, direction):
    return (x @ direction.unit) / x.norm(dim=-1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_table_a_second_way(tiny_model, plain_model, family):
    model, hf = tiny_model(family), plain_model(family)
    chat = ChatFormat(model.tokenizer)
    plain, without_v, without_u = ([streams(hf, text, each) for text in ASKS] for each in (None, V, U))
    of_u = [cosines(a, U) - cosines(b, U) for a, b in zip(without_v, plain, strict=True)]
    of_v = [cosines(a, V) - cosines(b, V) for a, b in zip(without_u, plain, strict=True)]
    spans = prompt_spans(chat, chat.encode_all(ASKS), "instruction")
    loss = independence_loss(model, spans, chat.pad_id, [U])(V.vector.double()).item()
    squares = [(a.square() + b.square()).mean().item() for a, b in zip(of_u, of_v, strict=True)]
    assert loss == pytest.approx(sum(squares) / len(ASKS), rel=1e-4)
    table = dependence(model, chat, [V, U], ASKS, batch_size=2)
    means = [sum(each.abs().mean().item() for each in changes) / len(ASKS) for changes in (of_u, of_v)]
    assert [table[0, 1].item(), table[1, 0].item()] == pytest.approx(means, rel=1e-4)
    assert table[0, 1].item() != pytest.approx(table[1, 0].item(), rel=2e-3)


def test_a_direction_depends_on_itself_by_all_of_its_cosine(tiny_model, plain_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    own = [cosines(streams(plain_model("llama"), text), V) for text in ASKS]
    spans = prompt_spans(chat, chat.encode_all(ASKS), "instruction")
    loss = independence_loss(model, spans, chat.pad_id, [V])(V.unit).item()
    assert loss == pytest.approx(2 * sum(each.square().mean().item() for each in own) / len(ASKS), rel=1e-4)
    table = dependence(model, chat, [V], ASKS)
    assert table[0, 0].item() == pytest.approx(sum(each.abs().mean().item() for each in own) / len(ASKS), rel=1e-4)


def test_what_nothing_writes_is_independent_of_everything(tiny_dir):
    """The edited model has no part along V in any stream: ablating it changes nothing, and no ablation changes it."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), attn_implementation="eager")
    orthogonalize_(hf, V)
    edited, chat = load_model(hf, tokenizer=tiny_tokenizer()), ChatFormat(tiny_tokenizer())
    across = U.vector - (U.vector.double() @ V.unit).float() * V.unit.float()
    pair = [V, direction_of(across)]
    assert dependence(edited, chat, pair, ASKS)[[0, 1], [1, 0]].max() < 1e-6
    assert dependence(load_model(tiny_dir("llama"), device="cpu"), chat, pair, ASKS)[[0, 1], [1, 0]].min() > 1e-3
    spans = prompt_spans(chat, chat.encode_all(ASKS), "instruction")
    assert independence_loss(edited, spans, chat.pad_id, pair[1:])(V.unit).item() < 1e-12


def test_tokens_and_layers_are_those_that_are_said(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    rows = chat.encode_all(ASKS)
    for text, ids, span in zip(ASKS, rows, prompt_spans(chat, rows, "instruction"), strict=True):
        assert chat.tokenizer.decode(span.token_ids[span.first : span.end]) == text and span.token_ids == tuple(ids)
    for ids, span in zip(rows, prompt_spans(chat, rows, "last"), strict=True):
        assert (span.first, span.end) == (len(ids) - 1, len(ids))
    tables = [dependence(model, chat, [V, U], ASKS, tokens=tokens) for tokens in ("instruction", "last")]
    assert not torch.allclose(*tables, rtol=0.05)
    assert [len(layers_read(n)) for n in (5, 10, 11, 32)] == [5, 9, 10, 29]
    with pytest.raises(UserError, match="no tokens of its own"):
        prompt_spans(chat, [chat.encode("")], "instruction")
    with pytest.raises(UserError, match="at least one direction"):
        dependence(model, chat, [], ASKS)


def test_padding_that_is_embedded_as_nothing_gives_no_nan(own_model):
    chat = ChatFormat(own_model.tokenizer)
    with torch.no_grad():
        own_model.original_model.get_input_embeddings().weight[chat.pad_id] = 0.0
    spans = prompt_spans(chat, chat.encode_all(ASKS), "instruction")
    assert len({len(span.token_ids) for span in spans}) > 1

    def slope(some):
        vector = V.unit.clone().requires_grad_()
        return torch.autograd.grad(independence_loss(own_model, some, chat.pad_id, [U])(vector), vector)[0]

    alone = sum(slope([span]) for span in spans) / len(spans)
    torch.testing.assert_close(slope(spans), alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())


def test_a_fit_that_asks_for_it_depends_less(tiny_model, tmp_path):
    model = tiny_model("llama")
    chat, texts = ChatFormat(model.tokenizer), made_up_texts(model.tokenizer)
    start, options = V.random_like(3), RDOOptions(n_steps=8, learning_rate=0.05, retention=0.1)
    plain = fit_rdo(model, chat, start, texts, options).direction
    asked = fit_independent(model, chat, start, texts, [V, U], options, weight=2000.0)
    assert asked.terms[-1] == "independence" and asked.losses[asked.best_step, 0] < asked.losses[0, 0]
    spans = prompt_spans(chat, chat.encode_all(ASKS), "instruction")
    loss = independence_loss(model, spans, chat.pad_id, [V, U])
    assert loss(asked.direction.unit).item() == pytest.approx(asked.losses[asked.best_step, -1].item(), rel=1e-3)
    assert loss(asked.direction.unit) < 0.7 * loss(plain.unit)
    part = RDOOptions(n_steps=2, retention=0.1)
    fit_independent(model, chat, start, texts, [V], part, checkpoint=tmp_path / "c.pt")
    with pytest.raises(UserError, match="another model, other texts"):
        fit_independent(model, chat, start, texts, [U], part, checkpoint=tmp_path / "c.pt")
    with pytest.raises(UserError, match="at least one direction to be independent of"):
        fit_independent(model, chat, start, texts, [])
