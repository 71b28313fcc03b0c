"""Cones chosen by thresholds: each mixture's scores a second way, which pass, and which cone is taken."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.estimators.cones import Cone
from refusal_mi.estimators.descent import orthonormal
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import kl_nats, next_token_logits, refusal_scores
from refusal_mi.search.cones import ScoredCone, score_cone, select_cone
from refusal_mi.search.thresholds import CandidateScore, Thresholds
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.naive import ASKS, CHATS

TOKENS = (5, 40)


def cone_of(n):
    rows = orthonormal(torch.stack([random_direction(seed).vector for seed in range(n)]))
    return Cone(tuple(direction_of((row * 5).float()) for row in rows))


def scored(bypass, kl, induce, *, layer=2):
    """A cone of two with the bypass and KL of three mixtures and the induce of its directions."""
    cone = cone_of(2)
    mixtures = tuple(cone.sample(3))
    of_mixtures = tuple(CandidateScore(-1, layer, b, 1.0, k) for b, k in zip(bypass, kl, strict=True))
    of_directions = tuple(CandidateScore(-1, layer, 0.0, each, 0.01) for each in induce)
    return ScoredCone(cone, mixtures, of_directions, of_mixtures, 10)


def test_the_scores_are_those_of_each_mixture_alone(tiny_model):
    model = tiny_model("llama")
    chat, cone = ChatFormat(model.tokenizer), cone_of(2)
    found = score_cone(model, chat, cone, ASKS[:4], CHATS[:3], TOKENS, n_mixtures=3)
    assert found.mixtures == tuple(cone.sample(3, seed=42)) and len(found.of_directions) == 2
    plain = next_token_logits(model, chat, CHATS[:3])
    rows = zip((*cone.directions, *found.mixtures), (*found.of_directions, *found.of_mixtures), strict=True)
    for direction, row in rows:
        ablated = next_token_logits(model, chat, CHATS[:3], interventions=Ablate(direction))
        added = refusal_scores(model, chat, CHATS[:3], TOKENS, interventions=Add(direction))
        bypass = refusal_scores(model, chat, ASKS[:4], TOKENS, interventions=Ablate(direction)).mean()
        assert row.bypass == pytest.approx(bypass.item(), abs=1e-4)
        assert row.kl_nats == pytest.approx(kl_nats(plain, ablated).mean().item(), rel=1e-3, abs=1e-6)
        assert (row.induce, row.median_induce) == pytest.approx((added.mean().item(), added.median().item()))
    assert len({round(row.bypass, 5) for row in found.of_mixtures}) == 3, "the control: mixtures differ"
    assert found.mean_bypass == pytest.approx(sum(row.bypass for row in found.of_mixtures) / 3)
    with pytest.raises(UserError, match="at least one mixture, not 0"):
        score_cone(model, chat, cone, ASKS[:4], CHATS[:3], TOKENS, n_mixtures=0)


def test_the_mixtures_that_pass_are_those_that_a_search_would_keep():
    found = scored((-3.0, -5.0, -4.0), (0.1, 0.2, 0.05), (1.0, 1.0))
    assert found.passing() == (found.mixtures[2], found.mixtures[0]), "the best first; equality passes"
    assert found.passing(Thresholds(kl_max=None)) == tuple(found.mixtures[i] for i in (1, 2, 0))
    late = scored((-3.0, -5.0, -4.0), (0.0, 0.0, 0.0), (1.0, 1.0), layer=8)
    assert late.passing() == () and len(late.passing(Thresholds(prune_layers=None))) == 3
    dull = replace(found, of_mixtures=tuple(replace(row, induce=-1.0) for row in found.of_mixtures))
    assert dull.passing() == () and len(dull.passing(Thresholds(induce_min=-2.0))) == 2


def test_the_cone_is_the_one_of_the_least_mean_bypass_among_those_that_keep_the_rules():
    good, better = scored((-3.0, -3.0, -3.0), (0.0,) * 3, (1.0, 0.0)), scored((-9.0, 0.0, -3.0), (0.0,) * 3, (1.0, 1.0))
    costly = scored((-9.0, -9.0, -9.0), (0.0, 0.2, 0.0), (1.0, 1.0))
    one_dull = scored((-9.0, -9.0, -9.0), (0.0,) * 3, (1.0, -0.1))
    every = [good, costly, better, one_dull]
    assert select_cone(every) is better
    assert select_cone(every, Thresholds(kl_max=None)) is costly, "the control: without its rule it wins"
    assert select_cone(every, Thresholds(induce_min=None)) is one_dull
    assert costly.fails() == ("kl",) and one_dull.fails() == ("induce",) and good.fails() == ()
    with pytest.raises(UserError, match="no cone passes: all 2 fail by induce, kl"):
        select_cone([costly, one_dull])
