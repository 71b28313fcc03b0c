"""The losses a second way and their gradients by finite differences; what is found, resumed and refused."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.directions import Direction, DirectionGrid, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.estimators.cones import mixed_with
from refusal_mi.estimators.descent import orthonormal
from refusal_mi.estimators.rdo import (
    RDOOptions,
    RDOTexts,
    ablation_loss,
    addition_loss,
    drawn_at,
    fit_rdo,
    loss_and_gradient,
    rdo_terms,
    retention_loss,
)
from refusal_mi.estimators.repind import independence_loss, prompt_spans
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add
from refusal_mi.judges.substring import is_refusal
from refusal_mi.measures import ScoredText, ce_loss, kl_nats, next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.reading import mean_activations
from refusal_mi.recipes.rdo import own_texts
from refusal_mi.search.sweep import sweep
from refusal_mi.text.batches import Span
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS, CHATS, ablating, dtype_of, logits
from tests.helpers.rdo import made_up_texts

START = random_direction(1)
FAST = RDOOptions(n_steps=8, learning_rate=0.05, retention=0.1)


def parts(tiny_model, family, dtype=None):
    model = tiny_model(family, dtype_of(family) if dtype is None else dtype)
    return model, ChatFormat(model.tokenizer), made_up_texts(model.tokenizer)


def losses_of(model, chat, texts, pad_id):
    """All four, by name."""
    spans = prompt_spans(chat, [span.token_ids[: span.first] for span in texts.complied], "instruction")
    others = [random_direction(7), random_direction(8)]
    return {
        "ablation": ablation_loss(model, texts.complied, pad_id),
        "addition": addition_loss(model, texts.refused, pad_id, START.layer, START.norm),
        "retention": retention_loss(model, texts.retained, pad_id),
        "retention as coded": retention_loss(model, texts.retained, pad_id, "code"),
        "independence": independence_loss(model, spans, pad_id, others),
        "independence, last": independence_loss(model, [replace(s, first=s.end - 1) for s in spans], pad_id, others),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_losses_under_differentiable_hooks_are_those_under_the_interventions(tiny_model, family):
    """`ce_loss` reads one text at a time under `Ablate` and `Add`; lengths of vectors do not matter."""
    model, chat, texts = parts(tiny_model, family)
    exact = 1e-9 if family == "gpt2" else 1e-5

    def mean_loss(spans, intervention):
        scored = [ScoredText(span.token_ids, span.first) for span in spans]
        each = [ce_loss(model, chat, [one], interventions=intervention).ce_loss for one in scored]
        return sum(each) / len(each)

    ablated = ablation_loss(model, texts.complied, chat.pad_id)
    added = addition_loss(model, texts.refused, chat.pad_id, START.layer, START.norm)
    expected = mean_loss(texts.complied, Ablate(START)), mean_loss(texts.refused, Add(START))
    for vector in (START.unit, START.vector.double() * 3):
        assert ablated(vector).item() == pytest.approx(expected[0], rel=exact)
        assert added(vector).item() == pytest.approx(expected[1], rel=exact)
    other = random_direction(2).unit
    assert abs(ablated(other).item() - expected[0]) > 1e-3 < abs(added(other).item() - expected[1])
    assert abs(mean_loss(texts.complied, ()) - expected[0]) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_forms_of_the_retention_a_second_way(tiny_model, plain_model, family):
    model, chat, texts = parts(tiny_model, family)
    hf, forms = plain_model(family, dtype_of(family)), {"paper": [], "code": []}
    for span in texts.retained:
        rows = slice(span.first - 1, span.end)
        log_p = logits(hf, span.token_ids)[rows].double().log_softmax(-1)
        with ablating(hf, START.vector):
            log_q = logits(hf, span.token_ids)[rows].double().log_softmax(-1)
        forms["paper"].append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
        forms["code"].append((log_q.exp() * (log_q - log_p)).sum(-1).sum().item())
    for form, each in forms.items():
        found = retention_loss(model, texts.retained, chat.pad_id, form)(START.unit).item()
        assert found == pytest.approx(sum(each) / len(each), rel=1e-8 if family == "gpt2" else 1e-4) and found > 1e-3
    assert sum(forms["code"]) > 2 * sum(forms["paper"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_finite_differences_in_float64(tiny_model, family):
    """gpt2 is float64 throughout; llama's norms and softmax are float32 inside, and cannot mask padding in float64."""
    model, chat, texts = parts(tiny_model, family, "float64")
    step, close = (1e-6, 1e-6) if family == "gpt2" else (1e-2, 1e-2)
    if family == "llama":
        texts = RDOTexts(texts.complied[:1], texts.refused[:1], texts.retained[:1])
    moves = torch.randn(3, len(START.unit), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for name, loss in losses_of(model, chat, texts, chat.pad_id).items():
        vector = START.unit.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(vector), vector)
        assert gradient.norm() > 1e-3, name
        assert (gradient @ START.unit).abs() < close * gradient.norm(), name  # length does not matter
        with torch.no_grad():
            for move in moves:
                ends = [loss(START.unit + sign * step * move).item() for sign in (1, -1)]
                slope = (ends[0] - ends[1]) / (2 * step)
                assert slope == pytest.approx(
                    (gradient @ move).item(), abs=close * (gradient.norm() * move.norm()).item()
                ), name


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_gradient_of_the_whole_is_that_of_the_weighted_sum_over_a_cone(tiny_model, form):
    """Weights of terms, batches of texts, mixtures and rows: two rows moved a little, in any direction."""
    model, chat, texts = parts(tiny_model, "gpt2")
    options = RDOOptions(ablation=0.7, addition=0.4, retention=0.3, retention_form=form, batch_size=2, texts_per_step=3)
    terms, spread = rdo_terms(model, chat, START, texts, options), mixed_with(1, 0)
    rows = orthonormal(torch.stack([START.unit, random_direction(3).unit]))
    (whole, *values), gradient = loss_and_gradient(terms, options, spread, rows, 1)
    assert whole == pytest.approx(0.7 * values[0] + 0.4 * values[1] + 0.3 * values[2]) and len(values) == 3
    move = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ends = [loss_and_gradient(terms, options, spread, rows + sign * 1e-6 * move, 1)[0][0] for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * move).sum().item(), rel=1e-5)
    again = loss_and_gradient(terms, replace(options, batch_size=16), spread, rows, 1)
    assert again[0] == pytest.approx([whole, *values]) and torch.allclose(again[1], gradient, atol=1e-12)
    assert loss_and_gradient(terms, options, spread, rows, 2)[0][0] != pytest.approx(whole)  # other texts and mixtures


def test_the_loss_falls_below_that_of_random_directions(tiny_model):
    model, chat, texts = parts(tiny_model, "llama")
    fit = fit_rdo(model, chat, START, texts, FAST)
    assert fit.terms == ("loss", "ablation", "addition", "retention") and fit.losses.shape[1] == 4
    least = fit.losses[fit.best_step, 0].item()
    assert least == fit.losses[:, 0].min().item() < fit.losses[0, 0].item() - 0.1
    terms = rdo_terms(model, chat, START, texts, FAST)

    def loss(direction):
        with torch.no_grad():
            return sum(term.weight * term.prepare(term.texts)(direction.unit).item() for term in terms)

    assert loss(fit.direction) == pytest.approx(least, rel=1e-4)
    assert all(loss(START.random_like(seed)) > least + 0.1 for seed in range(8))


def test_what_is_found_is_an_ordinary_direction_of_the_start_s_place(tiny_model, tmp_path):
    model, chat, texts = parts(tiny_model, "llama")
    other = random_direction(6)
    fit = fit_rdo(model, chat, START, texts, replace(FAST, n_steps=4), orthogonal_to=[other])
    found = fit.direction
    assert (found.layer, found.position, found.hook_name) == (START.layer, START.position, START.hook_name)
    assert found.norm == pytest.approx(START.norm) and found.provenance["n_steps"] == 4
    assert (found.unit @ other.unit).abs() < 1e-6 < (START.unit @ other.unit).abs()
    found.save(tmp_path / "d.pt")
    assert torch.equal(Direction.load(tmp_path / "d.pt").vector, found.vector)
    grid = DirectionGrid.of(found, chat.positions, model.cfg.n_layers)
    assert torch.equal(grid.direction(-1, START.layer).vector, found.vector)
    assert sum(flag for row in grid.is_degenerate for flag in row) == len(grid.candidates()) - 1
    (row,) = (each for each in sweep(model, chat, grid, ASKS, CHATS, (5, 6)).rows if each.kl_nats is not None)
    plain, changed = (next_token_logits(model, chat, CHATS, interventions=each) for each in ((), Ablate(found)))
    assert (row.position, row.layer) == (-1, START.layer)
    assert row.kl_nats == pytest.approx(kl_nats(plain, changed).mean().item(), rel=1e-3) and row.kl_nats > 1e-3
    with pytest.raises(UserError, match="has no place for a direction of position -1, layer 2"):
        DirectionGrid.of(found, (-3, -2), 5)


def test_a_fit_that_was_ended_goes_on_bit_for_bit(tiny_model, tmp_path):
    model, chat, texts = parts(tiny_model, "llama")
    options = replace(FAST, texts_per_step=2, n_steps=6)
    whole = fit_rdo(model, chat, START, texts, options)
    path = tmp_path / "fit.pt"
    fit_rdo(model, chat, START, texts, replace(options, n_steps=3), checkpoint=path)
    with torch.no_grad():
        assert fit_rdo(model, chat, START, texts, options, checkpoint=path) == whole
    assert fit_rdo(model, chat, START, texts, replace(options, seed=1)).losses[1, 0] != whole.losses[1, 0]
    fewer = replace(texts, refused=texts.refused[1:])
    for start, given, other in (
        (START.random_like(0), texts, options),
        (START, fewer, options),
        (START, texts, replace(options, addition=0.3)),
    ):
        with pytest.raises(UserError, match="another model, other texts"):
            fit_rdo(model, chat, start, given, other, checkpoint=path)


def test_every_text_is_read_as_often_and_in_a_new_order():
    drawn = [drawn_at(step, 7, 3, 0) for step in range(14)]
    flat = [index for each in drawn for index in each]
    epochs = [flat[first : first + 7] for first in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert drawn_at(5, 7, 3, 0) == drawn[5] != drawn_at(5, 7, 3, 1) and drawn_at(9, 4, 16, 0) == [0, 1, 2, 3]


def test_mistakes_are_one_line(tiny_model):
    model, chat, texts = parts(tiny_model, "llama")
    with pytest.raises(UserError, match="the addition loss has no texts"):
        fit_rdo(model, chat, START, replace(texts, refused=()))
    fit_rdo(model, chat, START, replace(texts, refused=()), replace(FAST, addition=0.0, n_steps=1))
    with pytest.raises(UserError, match="context of 512"):
        fit_rdo(model, chat, START, replace(texts, complied=(Span((5,) * 600, 1, 600),)))
    for wrong in ({"ablation": -1.0}, {"ablation": 0.0, "addition": 0.0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=r"weights|at least 1"):
            RDOOptions(**wrong)
    with pytest.raises(UserError, match="a prompt of at least one token"):
        RDOTexts((Span((1, 2), 0, 2),), (), ())


@pytest.fixture(scope="module")
def embedded():
    model = load_model()
    chat = ChatFormat(model.tokenizer)
    harmful, harmless = (load_prompts(f"organism_{side}_train").instructions[:48] for side in ("harmful", "harmless"))
    grid = difference_in_means(*(mean_activations(model, chat, side) for side in (harmful, harmless)))
    return model, chat, grid.direction(-1, 3), harmful, harmless


@pytest.mark.slow
def test_the_embedded_model_s_own_texts_are_what_it_answers_under_the_direction(embedded):
    model, chat, direction, harmful, harmless = embedded
    texts = own_texts(model, chat, direction, harmful[:4], harmless[:4], n_tokens=12)

    def answers(spans):
        return [(span.token_ids[: span.first], chat.tokenizer.decode(span.token_ids[span.first :])) for span in spans]

    def expected(prompts, n, **how):
        made = generate(model, chat, prompts, max_new_tokens=n, **how)
        rows = (tuple(ids) for ids in chat.encode_all(prompts))
        return [(ids, chat.tokenizer.decode(answer.token_ids)) for ids, answer in zip(rows, made, strict=True)]

    assert answers(texts.complied) == expected(harmful[:4], 12, interventions=Ablate(direction))
    assert answers(texts.retained) == expected(harmless[:4], 11)
    whole = expected(harmless[:4], 12, interventions=Add(direction))
    for (prompt, refusal), (same, longer) in zip(answers(texts.refused), whole, strict=True):
        assert prompt == same and longer.startswith(refusal) and is_refusal(refusal) and refusal.count(".") <= 1
    shorter = [len(cut) < len(text) for (_, cut), (_, text) in zip(answers(texts.refused), whole, strict=True)]
    assert any(shorter)
    assert not any(is_refusal(text) for _, text in answers(texts.complied))
    with pytest.raises(UserError, match=r"of 4 answers to harmless prompts, added, none refuses"):
        own_texts(model, chat, direction.random_like(0), harmless[:4], harmless[:4], n_tokens=12)


@pytest.mark.slow
def test_on_the_embedded_model_it_costs_less_than_the_difference_of_means_and_stops_as_much(embedded):
    model, chat, direction, harmful, harmless = embedded
    texts = own_texts(model, chat, direction, harmful[:16], harmless[:16])
    options = RDOOptions(retention_form="code", n_steps=8, learning_rate=0.03)
    found = fit_rdo(model, chat, direction, texts, options).direction
    plain = next_token_logits(model, chat, harmless[16:])

    def kl(one):
        return kl_nats(plain, next_token_logits(model, chat, harmless[16:], interventions=Ablate(one))).mean()

    def refused(one):
        answers = generate(model, chat, harmful[16:], interventions=Ablate(one), max_new_tokens=16, batch_size=32)
        return sum(is_refusal(answer.text) for answer in answers) / len(answers)

    assert refused(found) == refused(direction) == 0 and refused(direction.random_like(0)) > 0.9
    assert kl(found) < 0.7 * kl(direction)
