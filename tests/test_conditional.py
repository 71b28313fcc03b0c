"""Conditional steering: some rows steered, the others untouched, whatever batch, padding, cache and end they have."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from refusal_mi.conditional import Condition, Conditional, Verdicts, best_threshold, learn_threshold, separation
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.generation import Conversation, Sampling, generate
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import answers_to_score, ce_loss, next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.reading import template_residuals
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import N_LAYERS
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.tiers import first_is_fast

N_NEW = 8
PROMPTS = [*ASKS, *CHATS]


def from_layer(direction: Direction, layer: int) -> list[Ablate]:
    """An ablation of the stream that enters a layer and of all that is written from there on."""
    return [
        Ablate(direction, hook=f"blocks.{layer}.hook_resid_pre"),
        Ablate(direction, layers=range(layer, N_LAYERS)),
    ]


def projections(model, chat, direction, layer=None) -> torch.Tensor:
    """At the last token of every prompt."""
    layer = direction.layer if layer is None else layer
    streams = template_residuals(model, chat, PROMPTS, layers=[layer], n_last=1)[:, 0, 0]
    return streams.double() @ direction.unit


def half(model, chat, direction, layer=None) -> Condition:
    """A condition that about half of the prompts meet."""
    values = projections(model, chat, direction, layer).sort().values
    middle = len(values) // 2
    return Condition(direction, values[middle - 1 : middle + 1].mean().item(), layer=layer)


def texts(model, chat, interventions=(), prompts=PROMPTS, **options) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": N_NEW, **options}
    return [answer.token_ids for answer in generate(model, chat, prompts, interventions=interventions, **options)]


@pytest.mark.parametrize("family", first_is_fast(["llama", "gpt2", "gemma2", "mixtral"]))
def test_at_infinite_thresholds_it_is_unconditional_or_plain_bit_for_bit(family, tiny_model):
    model, direction = tiny_model(family), random_direction(1, scale=2.0)
    chat, other = ChatFormat(model.tokenizer), random_direction(5, layer=1)
    scored = answers_to_score(chat, [(prompt, "some words") for prompt in PROMPTS])
    cases = (
        ([Add(direction)], direction, ">"),
        (from_layer(direction, 2), direction, "<"),
        ([Add(direction, layer=4), Add(direction, positions="response")], other, ">"),
    )
    for then, along, side in cases:
        always, never = (math.inf, -math.inf) if side == "<" else (-math.inf, math.inf)
        for threshold, plain in ((always, then), (never, ())):
            same = Conditional(then, Condition(along, threshold, side))
            for prompts in (PROMPTS, PROMPTS[:1]):
                one, two = (next_token_logits(model, chat, prompts, interventions=each) for each in (same, plain))
                assert torch.equal(one, two)
                one, two = (texts(model, chat, each, prompts, max_new_tokens=4) for each in (same, plain))
                assert one == two
            losses = [ce_loss(model, chat, scored, interventions=each).ce_loss for each in (same, plain)]
            assert losses[0] == losses[1]
        logits = [next_token_logits(model, chat, PROMPTS, interventions=each) for each in (then, ())]
        assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("then", ["add", "ablate"])
def test_rows_that_meet_the_condition_are_steered_and_the_others_are_plain_in_one_batch(then, tiny_model):
    model, direction = tiny_model("llama"), random_direction(1, scale=2.0)
    chat = ChatFormat(model.tokenizer)
    change = Add(direction) if then == "add" else from_layer(direction, 2)
    for condition in (half(model, chat, direction), half(model, chat, random_direction(7, layer=1))):
        meets = condition.holds(projections(model, chat, condition.direction))
        assert 0 < meets.sum() < len(PROMPTS)
        found = next_token_logits(model, chat, PROMPTS, interventions=Conditional(change, condition))
        steered, plain = (next_token_logits(model, chat, PROMPTS, interventions=each) for each in (change, ()))
        assert torch.equal(found, torch.where(meets[:, None], steered, plain))


@pytest.mark.parametrize("family", first_is_fast(["llama", "gpt2", "gemma2"]))
def test_a_mixed_batch_is_each_prompt_alone_with_and_without_cache(family, tiny_model):
    model, direction = tiny_model(family), random_direction(1, scale=2.0)
    chat = ChatFormat(model.tokenizer)
    conditional = Conditional(Add(direction), half(model, chat, direction))
    alone = [texts(model, chat, conditional, [prompt])[0] for prompt in PROMPTS]
    assert texts(model, chat, conditional) == alone == texts(model, chat, conditional, use_kv_cache=False)
    assert texts(model, chat, conditional, list(reversed(PROMPTS))) == alone[::-1]
    meets = conditional.when.holds(projections(model, chat, direction)).tolist()
    steered, plain = texts(model, chat, Add(direction)), texts(model, chat)
    assert alone == [a if met else b for met, a, b in zip(meets, steered, plain, strict=True)]
    assert steered != plain
    greedy = texts(model, chat, conditional, sampling=Sampling(seed=0, top_k=1))
    assert greedy == alone


def per_token(condition: Condition, vector: torch.Tensor):
    """The condition that this is not: asked again at every token."""

    def change(x, hook):
        meets = condition.holds((x @ condition.direction.unit.float()).flatten()).reshape(x.shape[:2])
        return torch.where(meets[..., None], x + vector, x)

    return change


def test_the_verdict_is_kept_through_decoding_and_is_no_condition_of_every_token(tiny_model):
    model, direction = tiny_model("llama"), random_direction(1, scale=2.0)
    chat = ChatFormat(model.tokenizer)
    condition = half(model, chat, direction)

    class PerToken:
        def hooks(self, model, prompt_width=None):
            return [("blocks.2.hook_resid_pre", per_token(condition, direction.vector))]

    kept = texts(model, chat, Conditional(Add(direction), condition))
    assert texts(model, chat, PerToken()) != kept
    seen: list[torch.Tensor] = []

    class Read:
        def hooks(self, model, prompt_width=None):
            return [("blocks.2.hook_resid_pre", lambda x, hook: seen.append(x[:, -1] @ direction.unit.float()))]

    texts(model, chat, Read(), batch_size=1)
    verdicts = condition.holds(torch.cat(seen)).tolist()
    per_prompt = [verdicts[start : start + N_NEW] for start in range(0, len(verdicts), N_NEW)]
    assert any(len(set(each)) == 2 for each in per_prompt)  # a projection crosses the threshold on the way


def test_rows_that_end_do_not_hand_their_verdict_to_others(tiny_dir, monkeypatch):
    model, direction = load_model(tiny_dir("gpt2"), device="cpu"), random_direction(1, scale=2.0)
    chat = ChatFormat(model.tokenizer)
    conditional = Conditional(Add(direction), half(model, chat, direction))
    whole = texts(model, chat, conditional)
    model.original_model.generation_config.eos_token_id = [row[2] for row in whole[: len(whole) // 2]]
    found = texts(model, chat, conditional)
    assert len({len(row) for row in found}) > 1
    assert found == [texts(model, chat, conditional, [prompt])[0] for prompt in PROMPTS]
    monkeypatch.setattr(Verdicts, "keep_rows_", lambda self, rows: None)
    with pytest.raises(ValueError, match="rows of this batch"):
        texts(model, chat, conditional)


def test_words_after_the_prompt_have_no_part_in_it(tiny_model):
    model, direction = tiny_model("gpt2"), random_direction(1, scale=2.0)
    chat = ChatFormat(model.tokenizer)
    condition = half(model, chat, direction)
    meets = condition.holds(projections(model, chat, direction))
    for after in ((5, 6), (9,)):
        found, steered, plain = (
            next_token_logits(model, chat, PROMPTS, interventions=each, after=after)
            for each in (Conditional(Add(direction), condition), Add(direction), ())
        )
        assert torch.equal(found, torch.where(meets[:, None], steered, plain))
    scored = answers_to_score(chat, [(prompt, "some words") for prompt in PROMPTS])
    losses = [
        [ce_loss(model, chat, [text], interventions=each).ce_loss for text in scored]
        for each in (Conditional(Add(direction), condition), Add(direction), ())
    ]
    expected = [losses[1][row] if met else losses[2][row] for row, met in enumerate(meets)]
    assert losses[0] == expected and losses[1] != losses[2]
    together = ce_loss(model, chat, scored, interventions=Conditional(Add(direction), condition))
    assert together.ce_loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_conditions_nest_and_chats_read_them_at_every_turn(tiny_model):
    model, direction = tiny_model("gpt2"), random_direction(1, scale=2.0)
    chat, other = ChatFormat(model.tokenizer), random_direction(7, layer=1)
    first, second = half(model, chat, direction), half(model, chat, other)
    both = Conditional(Conditional(Add(direction), first), second)
    meets = first.holds(projections(model, chat, direction)) & second.holds(projections(model, chat, other))
    steered, plain = texts(model, chat, Add(direction)), texts(model, chat)
    expected = [a if met else b for met, a, b in zip(meets.tolist(), steered, plain, strict=True)]
    assert 0 < meets.sum() < len(PROMPTS) and texts(model, chat, both) == expected
    answers = generate(model, chat, PROMPTS, interventions=both, max_new_tokens=N_NEW)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        talk = Conversation(model, chat, both, max_new_tokens=N_NEW)
        assert "".join(talk.ask(prompt)) == answer.text


def test_what_cannot_be_meant_is_one_line(tiny_model):
    model, direction = tiny_model("llama"), random_direction(0)
    chat = ChatFormat(model.tokenizer)
    for then in (Ablate(direction), Add(direction, layer=1), Ablate(direction, hook="blocks.1.hook_mlp_out")):
        with pytest.raises(UserError, match=r"acts before.*blocks"):
            Conditional(then, Condition(direction, 0.0)).hooks(model)
    last = Condition(direction, 0.0, layer=N_LAYERS)
    Conditional(Add(direction, layer=N_LAYERS), last).hooks(model)
    with pytest.raises(UserError, match="acts before"):
        Conditional(Add(direction, layer=N_LAYERS - 1), last).hooks(model)
    with pytest.raises(UserError, match=r"layers 0\.\."):
        Conditional(Add(direction), Condition(direction, 0.0, layer=N_LAYERS + 1)).hooks(model)
    with pytest.raises(UserError, match="width"):
        Conditional(Add(direction), Condition(random_direction(width=7), 0.0)).hooks(model)
    with pytest.raises(UserError, match="nan"):
        Condition(direction, math.nan)
    with pytest.raises(UserError, match="residual stream is wanted"):
        Condition(Direction.of(torch.ones(4), hook_name="blocks.1.attn.hook_z"), 0.0)
    with pytest.raises(UserError, match="prompts that should not"):
        learn_threshold(model, chat, direction, ASKS, [])


def test_the_threshold_is_the_best_of_all_and_its_rates_are_counted(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    values = projections(model, chat, random_direction(3))
    order = values.argsort().tolist()
    low, high = order[: len(order) // 2], order[len(order) // 2 :]
    low[-1], high[0] = high[0], low[-1]  # one of each on the wrong side
    meet, others = [PROMPTS[row] for row in high], [PROMPTS[row] for row in low]
    direction = random_direction(3)
    labels = [1] * len(meet) + [0] * len(others)
    for side, groups in ((">", (meet, others)), ("<", (others, meet))):
        found = learn_threshold(model, chat, direction, *groups, side=side, batch_size=3)  # type: ignore[arg-type]
        assert found.condition.threshold == pytest.approx(
            learn_threshold(model, chat, direction, *groups, side=side).condition.threshold, abs=1e-5
        )
        sign = 1 if side == ">" else -1
        scores = [
            sign * projections(model, chat, direction)[PROMPTS.index(text)].item() for text in (*groups[0], *groups[1])
        ]
        auc = found.on_validation.auc.value
        assert auc == pytest.approx(roc_auc_score(labels, scores)) and 0.5 < auc < 1
        false_positives, true_positives, _ = roc_curve(labels, scores, drop_intermediate=False)
        rates = found.on_validation
        j = rates.sensitivity.value + rates.specificity.value - 1
        assert j == pytest.approx((true_positives - false_positives).max()) and j < 1
        assert separation(model, chat, found.condition, *groups) == rates
        none = Condition(direction, sign * math.inf, side)  # type: ignore[arg-type]
        assert separation(model, chat, none, *groups).sensitivity.count == 0
    with pytest.raises(UserError, match="swap the prompts or the side"):
        best_threshold([0.0, 1.0], [2.0, 3.0])
    assert best_threshold([0.0, 1.0], [2.0, 3.0], "<") == 1.5
    assert best_threshold([5.0, 9.0], [0.0, 1.0, 7.0]) == 3.0  # J = 2/3; at 8 it is 1/2
    assert best_threshold([1.0, 10.0], [0.0, 2.0]) == 6.0  # as good as 0.5, and in a wider gap
