"""Refusal score, KL and refusal tokens against numbers by hand and plain HF."""

import math

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate
from refusal_mi.labels import discover_refusal_tokens, published_refusal_tokens
from refusal_mi.measures import kl_nats, next_token_logits, refusal_score
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import tiny_tokenizer
from tests.helpers.naive import ASKS, FAMILIES, ablating, dtype_of, logits, prompt_ids, relative_error, tolerance
from tests.helpers.scores import TOKENS, kl_by_hand, score_by_hand
from tests.helpers.tiers import first_is_fast


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_scores_and_kl_equal_plain_hf_prompt_by_prompt(family, tiny_model, plain_model):
    model, hf = tiny_model(family, dtype_of(family)), plain_model(family, dtype_of(family))
    chat, direction = ChatFormat(model.tokenizer), random_direction(3)
    plain = next_token_logits(model, chat, ASKS, batch_size=3)
    ablated = next_token_logits(model, chat, ASKS, interventions=[Ablate(direction)], batch_size=2)
    score, kl, published = refusal_score(plain, TOKENS), kl_nats(plain, ablated), kl_nats(plain, ablated, "published")
    expected_score, expected_kl, expected_published = [], [], []
    for ask in ASKS:
        ids = prompt_ids(model.tokenizer, ask)
        base = logits(hf, ids)[-1]
        with ablating(hf, direction.vector):
            changed = logits(hf, ids)[-1]
        expected_score.append(score_by_hand(base, TOKENS))
        expected_kl.append(kl_by_hand(base, changed))
        expected_published.append(kl_by_hand(base, changed, 1e-6))
    assert score.dtype == kl.dtype == torch.float64
    assert relative_error(score, torch.tensor(expected_score, dtype=torch.float64)) < tolerance(family)
    assert relative_error(kl, torch.tensor(expected_kl, dtype=torch.float64)) < 10 * tolerance(family)
    assert relative_error(published, torch.tensor(expected_published, dtype=torch.float64)) < 10 * tolerance(family)
    assert relative_error(kl, published) > 1e-5, "the control: they are two formulas"
    assert min(expected_kl) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_order_and_padding_of_a_batch_do_not_matter(family, tiny_model):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    together = next_token_logits(model, chat, ASKS)
    alone = torch.cat([next_token_logits(model, chat, [ask]) for ask in ASKS])
    assert relative_error(together, alone) < 1e-6


def test_no_prompts_are_an_error(tiny_model):
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match="at least one prompt"):
        next_token_logits(model, ChatFormat(model.tokenizer), [])


def test_the_score_saturates_as_published():
    certain = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert refusal_score(certain, [0]).tolist() == pytest.approx([18.42068, -18.42068], abs=1e-5)
    assert refusal_score(torch.zeros(1, 4), [0, 1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("formula", "expected"), [("exact", 1000.0), ("published", math.log(1 + 1e-6) - math.log(1e-6))]
)
def test_kl_is_zero_on_equal_logits_and_the_published_one_saturates(formula, expected):
    logits = torch.randn(2, 9)
    assert kl_nats(logits, logits + 3.0, formula).abs().max() < 1e-6
    apart = kl_nats(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]]), formula).item()
    assert apart == pytest.approx(expected)


def test_over_many_tokens_the_published_kl_can_be_negative_and_the_exact_one_cannot():
    """A tenth of p lies on 150,000 tokens rarer than epsilon, which q has all but left."""
    p, q = (torch.full((1, 150_001), share / 150_000, dtype=torch.float64) for share in (0.1, 0.1 / 350))
    p[0, -1], q[0, -1] = 0.9, 1 - 0.1 / 350
    exact, published = (kl_nats(p.log(), q.log(), formula).item() for formula in ("exact", "published"))
    assert exact == pytest.approx(torch.nn.functional.kl_div(q.log(), p, reduction="sum").item()) and exact > 0.49
    assert published < -0.03


@pytest.mark.parametrize("formula", ["exact", "published"])
def test_a_token_that_a_model_masks_counts_as_nothing_and_one_that_ablation_masks_as_infinite(formula):
    logits = torch.tensor([[0.3, -1.0, 0.5]])
    masked = torch.cat([logits, torch.full((1, 1), -math.inf)], dim=1)
    assert kl_nats(masked, masked + 1.0, formula).item() == pytest.approx(0, abs=1e-9)
    gone = kl_nats(masked, masked.roll(1, 1), formula).item()
    assert gone == math.inf if formula == "exact" else 1 < gone < 14
    assert kl_nats(logits * math.nan, logits, formula).isnan().all(), "broken numbers are seen"


def test_half_precision_logits_are_widened_first():
    logits = torch.randn(3, 50).bfloat16()
    assert torch.equal(refusal_score(logits, TOKENS[:1]), refusal_score(logits.double(), TOKENS[:1]))


def from_probabilities(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_refusal_tokens_are_those_more_likely_on_harmful_prompts():
    harmless = from_probabilities([[0.25, 0.25, 0.25, 0.125, 0.125]] * 2)
    harmful = from_probabilities([[0.05, 0.50, 0.10, 0.20, 0.15], [0.05, 0.40, 0.10, 0.20, 0.25]])
    assert discover_refusal_tokens(harmful, harmless) == (1, 3, 4)
    with pytest.raises(UserError, match="--refusal-tokens"):
        discover_refusal_tokens(harmless, harmless)


def test_at_most_eight_refusal_tokens():
    harmless = from_probabilities([[0.9, *[0.01] * 10]])
    harmful = from_probabilities([[0.1, *[0.09] * 10]])
    assert discover_refusal_tokens(harmful, harmless) == tuple(range(1, 9))


def test_published_tokens_count_only_where_the_tokenizer_agrees():
    class Words:
        chat_template = "x"

        def __init__(self, words):
            self.words = words

        def __len__(self):
            return 60000

        def decode(self, ids):
            return self.words.get(ids[0], "?")

    def published(model_type, words):
        return published_refusal_tokens(model_type, ChatFormat(Words(words)))

    assert published("qwen2", {40: "I", 2121: "As"}) == (40, 2121)
    assert published("qwen2", {40: "I", 2121: "No"}) is None
    assert published("llama", {306: " I"}) == (306,)
    assert published("llama", {40: "I"}) == (40,)
    assert published("llama", {59597: "I"}) == (59597,)
    assert published("gpt2", {40: "I"}) is None
    assert published_refusal_tokens("gemma", ChatFormat(tiny_tokenizer())) is None
