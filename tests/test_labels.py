"""Refusal tokens and the zero point of the score follow from labels, worked out a second way."""

import math
import random

import pytest
import torch

from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.labels import Label, find_refusal_tokens, label_prompts, zero_point
from refusal_mi.measures import RefusalPrefixes, kl_nats, next_token_logits, refusal_score, refusal_scores
from refusal_mi.reading import mean_activations
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS, CHATS, ablating, logits, prompt_ids, relative_error
from tests.helpers.scores import TOKENS

EYE, AS, SURE, CAN, CANNOT, SORRY = range(6)


def labels(refused, answered):
    """Labels of token rows: (ids, how many)."""
    rows = [(ids, n, True) for ids, n in refused.items()] + [(ids, n, False) for ids, n in answered.items()]
    return [Label("", ids, flag) for ids, n, flag in rows for _ in range(n)]


def test_a_token_that_begins_refusals_alone_is_enough():
    assert find_refusal_tokens(labels({(EYE, SORRY): 90, (AS, CAN): 10}, {(SURE, EYE): 100})) == ((EYE,), (AS,))


def test_a_token_of_fewer_than_5_percent_of_the_refusals_is_left_out():
    rare = labels({(EYE, SORRY): 96, (AS, CAN): 4}, {(SURE, EYE): 100})
    assert find_refusal_tokens(rare) == ((EYE,),)
    assert find_refusal_tokens([*rare, *labels({(AS, CAN): 2}, {})]) == ((EYE,), (AS,))


def test_a_token_that_begins_other_answers_too_gives_way_to_the_shortest_prefix_that_separates():
    refused = {(EYE, CANNOT, SURE): 40, (EYE, SORRY, CAN): 30, (AS, EYE): 30}
    at_limit, over = {(EYE, CAN): 17, (SURE,): 50}, {(EYE, CAN): 18, (SURE,): 50}
    assert find_refusal_tokens(labels(refused, at_limit)) == ((EYE,), (AS,)), "70 of 87 are more than 0.8"
    assert find_refusal_tokens(labels(refused, over)) == ((EYE, CANNOT), (EYE, SORRY), (AS,))


def test_nothing_is_found_where_nothing_separates_or_nothing_is_refused():
    same = {(EYE, CAN): 50}
    assert find_refusal_tokens(labels(same, same)) == ()
    assert find_refusal_tokens(labels({}, same)) == ()


def test_prefixes_obey_the_rule_on_random_answers():
    draw, longest = random.Random(0), 0
    for _ in range(200):
        rows = [tuple(draw.choices(range(3), k=draw.randrange(0, 5))) for _ in range(60)]
        flags = [draw.random() < (0.9 if row[:2] in ((0, 1), (2,)) else 0.2) for row in rows]
        found = find_refusal_tokens([Label("", row, flag) for row, flag in zip(rows, flags, strict=True)])
        longest = max([longest, *map(len, found)])
        expected = {row[:n] for row in rows for n in range(1, 5) if len(row) >= n and first(row[:n], rows, flags)}
        assert set(found) == expected
    assert longest >= 2


def test_what_was_seen_once_is_no_rule():
    """Five percent of few refusals are less than one."""
    few = labels({(EYE, SORRY): 6, (EYE, CANNOT): 1, (AS, CAN): 1}, {(SURE,): 20})
    assert find_refusal_tokens(few) == ((EYE,),)
    assert find_refusal_tokens([*few, *labels({(AS, CAN): 1}, {})]) == ((EYE,), (AS,))


def first(prefix, rows, flags):
    """Whether a prefix passes and none of its beginnings does, and all of these are frequent."""

    def passes(some):
        hits = [flag for row, flag in zip(rows, flags, strict=True) if row[: len(some)] == some]
        return sum(hits) >= max(2, 0.05 * sum(flags)), sum(hits) >= 0.8 * len(hits)

    before = [passes(prefix[:n]) for n in range(1, len(prefix))]
    return passes(prefix) == (True, True) and all(often and not precise for often, precise in before)


def test_the_zero_point_separates_best_and_is_zero_where_zero_does():
    draw = random.Random(1)
    moved = 0
    for _ in range(100):
        shift = draw.choice([-4.0, 0.0, 3.0])
        flags = [draw.random() < 0.4 for _ in range(60)]
        if len(set(flags)) < 2:
            continue
        scores = torch.tensor([draw.gauss(2.0 if flag else -2.0, 1.5) + shift for flag in flags])
        found = zero_point(scores, flags)
        assert found is not None
        tried = [balanced(scores, flags, edge) for edge in [*scores.tolist(), min(scores.tolist()) - 1.0]]
        assert balanced(scores, flags, found) == pytest.approx(max(tried))
        assert (found == 0.0) == (balanced(scores, flags, 0.0) == pytest.approx(max(tried)))
        moved += found != 0.0
    assert moved > 30


def balanced(scores, flags, threshold):
    """Mean of the two rates of right answers, counted one by one."""
    pairs = list(zip(scores.tolist(), flags, strict=True))
    hits = [[(score > threshold) == flag for score, flag in pairs if flag == kind] for kind in (True, False)]
    return sum(sum(kind) / len(kind) for kind in hits) / 2


@pytest.mark.parametrize("flags", [[True] * 4, [False] * 4])
def test_there_is_no_zero_point_of_one_kind_alone(flags):
    assert zero_point(torch.tensor([3.0, 4.0, 5.0, 6.0]), flags) is None


def test_scores_that_say_nothing_have_no_zero_point():
    draw, flags = random.Random(2), [index % 2 == 0 for index in range(80)]
    found = [zero_point(torch.tensor([draw.gauss(3.0, 1.0) for _ in flags]), flags) for _ in range(100)]
    assert sum(zero is not None for zero in found) <= 5, "1% in theory"
    ordered = torch.arange(80.0)
    assert zero_point(ordered, [index >= 30 for index in range(80)]) == 29.5
    assert zero_point(ordered, [index < 30 for index in range(80)]) is None, "refused are those of higher scores"
    assert zero_point(torch.ones(80), flags) is None


def test_prefixes_of_one_token_score_as_the_tokens_do_bit_for_bit():
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for tokens in ([1, 5], [(1,), (5,)]):
        assert torch.equal(RefusalPrefixes.of(tokens).score(logits[None]), refusal_score(logits, [1, 5]))


@pytest.mark.parametrize("tokens", [[1, 1], [(1,), (1, 2)], [()]])
def test_prefixes_that_contain_each_other_are_refused(tokens):
    with pytest.raises(UserError, match="refusal tokens must differ"):
        RefusalPrefixes.of(tokens)


def test_a_score_of_no_token_is_refused():
    with pytest.raises(UserError, match="does this model refuse"):
        RefusalPrefixes.of(())


PREFIXES = ((TOKENS[0],), (7, 11), (7, 12), (7, 13, 14))


def by_hand(hf, ids):
    """Log-odds of beginning with one of the prefixes, token by token in plain HF."""
    p = 0.0
    for prefix in PREFIXES:
        each = 1.0
        for n, token in enumerate(prefix):
            each *= logits(hf, [*ids, *prefix[:n]])[-1].double().softmax(-1)[token].item()
        p += each
    return math.log(p + 1e-8) - math.log(1 - p + 1e-8)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_prefixes_are_products_of_probabilities_in_plain_hf(family, tiny_model, plain_model):
    model, hf, direction = tiny_model(family), plain_model(family), random_direction(3)
    chat = ChatFormat(model.tokenizer)
    rows = [prompt_ids(model.tokenizer, ask) for ask in ASKS]
    expected = [by_hand(hf, ids) for ids in rows]
    with ablating(hf, direction.vector):
        ablated = [by_hand(hf, ids) for ids in rows]
    found = refusal_scores(model, chat, ASKS, PREFIXES, batch_size=2)
    assert relative_error(found, torch.tensor(expected)) < 1e-6
    found = refusal_scores(model, chat, ASKS, PREFIXES, interventions=[Ablate(direction)], batch_size=3)
    assert relative_error(found, torch.tensor(ablated)) < 1e-6
    assert relative_error(torch.tensor(expected), torch.tensor(ablated)) > 1e-3
    read = next_token_logits(model, chat, ASKS)
    assert relative_error(refusal_scores(model, chat, ASKS, PREFIXES, first=read), torch.tensor(expected)) < 1e-6
    first_only = refusal_scores(model, chat, ASKS, [TOKENS[0], 7])
    assert relative_error(first_only, torch.tensor(expected)) > 1e-3


def test_an_addition_to_the_prompt_alone_leaves_the_prefix_alone(tiny_model, plain_model):
    """In a scored prefix, too, "prompt" means the prompt: at the prefix's own tokens nothing is added."""
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction(3, scale=5.0)
    scores = {
        positions: refusal_scores(
            model, chat, ASKS, [(7, 11)], interventions=[Add(direction, positions=positions, layer=1)]
        )
        for positions in ("all", "prompt")
    }
    p = [torch.ones(len(ASKS), dtype=torch.float64)]
    for after, token in (((), 7), ((7,), 11)):
        one = [
            next_token_logits(
                model, chat, [ask], interventions=[Add(direction, positions="prompt", layer=1)], after=after
            )
            for ask in ASKS
        ]
        p.append(torch.cat(one).double().softmax(-1)[:, token])
    expected = (p[1] * p[2] + 1e-8).log() - (1 - p[1] * p[2] + 1e-8).log()
    assert relative_error(scores["prompt"], expected) < 1e-6
    assert relative_error(scores["all"], expected) > 1e-3


@pytest.mark.parametrize("share_work", [True, False])
def test_a_sweep_with_prefixes_scores_as_one_prompt_at_a_time(share_work, tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    grid = difference_in_means(*(mean_activations(model, chat, asks) for asks in (ASKS, CHATS)))
    scores = sweep(model, chat, grid, ASKS, CHATS, PREFIXES, share_work=share_work)
    plain = next_token_logits(model, chat, CHATS)
    assert scores.baseline_harmful == pytest.approx(refusal_scores(model, chat, ASKS, PREFIXES).mean().item(), rel=1e-5)
    differ = 0
    for row in scores.rows[:: len(scores.rows) // 6]:
        if row.bypass is None:
            continue
        direction = grid.direction(row.position, row.layer)
        ablated, added = [Ablate(direction)], [Add(direction)]
        bypass = refusal_scores(model, chat, ASKS, PREFIXES, interventions=ablated).mean().item()
        induce = refusal_scores(model, chat, CHATS, PREFIXES, interventions=added).mean().item()
        kl = kl_nats(plain, next_token_logits(model, chat, CHATS, interventions=ablated)).mean().item()
        assert (row.bypass, row.induce) == pytest.approx((bypass, induce), rel=1e-5)
        assert row.kl_nats == pytest.approx(kl, rel=1e-3, abs=1e-7)
        differ += abs(bypass - scores.baseline_harmful) > 1e-4
    assert differ


def test_a_label_is_the_beginning_of_the_greedy_answer_judged_by_text(tiny_model, monkeypatch):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    found = label_prompts(model, chat, ASKS, n_tokens=4)
    assert all(len(label.token_ids) <= 4 and not label.is_refused for label in found)
    logits = next_token_logits(model, chat, ASKS)
    assert [label.token_ids[0] for label in found] == logits.argmax(-1).tolist()
    assert relative_error(torch.stack([label.first_logits for label in found]), logits) < 1e-5
    monkeypatch.setattr("refusal_mi.labels.is_refusal", lambda text: text == found[0].answer)
    again = label_prompts(model, chat, ASKS, n_tokens=4)
    assert [label.is_refused for label in again] == [label.answer == found[0].answer for label in found]
