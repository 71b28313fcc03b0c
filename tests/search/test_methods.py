"""Costs at equal refusal: known curves cross at known places, drawn prompts give known intervals."""

import numpy as np
import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate
from refusal_mi.measures import kl_nats, next_token_logits, refusal_scores
from refusal_mi.model.points import write_hooks
from refusal_mi.search.methods import STRENGTHS, TOLERATED, Curve, crossing_ends, match, match_draws, overlap
from refusal_mi.search.removals import RemovalScorer
from refusal_mi.text.chat import ChatFormat
from tests.helpers.models import D_MODEL, N_LAYERS
from tests.helpers.naive import ASKS

AT = (0.0, *STRENGTHS)
N = 60


def planted(falls_at, cost, n=N, spread=0.0, seed=0, at=AT):
    """Prompts are refused up to strengths around `falls_at`; KL is cost · strength², times a prompt's own factor."""
    rng = np.random.default_rng(seed)
    ends = falls_at + spread * rng.standard_normal(n)
    refused = torch.tensor([[float(strength < end) for end in ends] for strength in at], dtype=torch.float64)
    factors = torch.from_numpy(rng.lognormal(0, 0.5, n))
    return Curve(at, refused, cost * torch.tensor(at, dtype=torch.float64)[:, None] ** 2 * factors)


def test_a_known_curve_crosses_where_it_should():
    reference = planted(0.5, 0.01)
    found = match(reference, reference)
    # all refused at .4, none at .6: the share falls to TOLERATED at .4 + .2 (1 - TOLERATED); √KL is linear in strength
    expected = 0.4 + 0.2 * (1 - TOLERATED)
    assert found.strength == pytest.approx(expected) and found.ratio == (1.0, 1.0, 1.0)
    factors = reference.kl[-1] / (0.01 * AT[-1] ** 2)
    assert found.kl_nats == pytest.approx((0.01 * expected**2 * factors).mean().item())


def test_twice_the_cost_at_equal_strength_is_a_ratio_of_two_and_so_is_a_later_fall():
    reference = planted(0.5, 0.01)
    dear = Curve(AT, reference.refused, 2 * reference.kl)
    assert match(dear, reference).ratio == pytest.approx((2, 2, 2))
    late = match(Curve(AT, planted(0.9, 0.01).refused, reference.kl), reference)
    at = 0.8 + 0.2 * (1 - TOLERATED), 0.4 + 0.2 * (1 - TOLERATED)
    assert late.strength == pytest.approx(at[0]) and late.ratio[0] == pytest.approx((at[0] / at[1]) ** 2)
    assert match(planted(9.0, 0.01), reference).strength is None, "what never stops refusals has no cost"
    assert match(planted(9.0, 0.01), reference).ratio == (None, None, None)


def test_the_cost_over_another_is_matched_where_the_reference_says():
    reference, other = planted(0.5, 0.01), planted(0.9, 0.01)
    half = Curve(AT, other.refused, 0.5 * other.kl)
    assert match(half, other, reference).ratio == pytest.approx((0.5, 0.5, 0.5))
    assert match(half, reference).ratio[0] > 1, "the control: over the reference, which stops them earlier, it is dear"


def test_a_method_that_leaves_more_is_compared_where_the_other_leaves_as_many():
    reference = planted(0.5, 0.01)
    halfway = Curve(AT, reference.refused.clone(), 0.25 * reference.kl)
    halfway.refused[:, : N // 2] = 1.0  # it never stops these, and the others between .4 and .6
    found = match(halfway, reference)
    assert (found.refused, found.strength) == pytest.approx((0.5, 0.6))
    value, low, high = found.ratio
    assert value == pytest.approx(0.25 * (0.6 / 0.5) ** 2) and low < value < high < 0.5
    assert match(reference, reference).refused == TOLERATED, "the control: what stops as many is compared there"
    late = Curve(AT, reference.refused.clone(), reference.kl)
    late.refused[AT.index(1.0), : N // 3] = 1.0  # as few at .6, and at 1.2, but not at 1
    assert match(late, reference).refused == TOLERATED, "what reaches it at some strength is compared there"
    hardly = Curve(AT, torch.ones_like(reference.refused), reference.kl)
    hardly.refused[-3:, 0] = 0.0
    assert match(hardly, reference).ratio == (None, None, None), "one prompt less is not a removal"


def test_where_a_share_falls_is_bracketed():
    assert crossing_ends(planted(0.5, 0.01), 0.05) == (0.4, 0.6) and crossing_ends(planted(9.0, 0.01), 0.05) is None
    fine = (0.0, 0.2, 0.4, 0.475, 0.5, 0.525, 0.6, 0.8, 1.0, 1.2)
    coarse, exact = planted(0.51, 0.01), planted(0.51, 0.01, at=fine)
    found = [match(each, each).strength for each in (coarse, exact)]
    assert abs(found[1] - 0.51) < 0.015 < 0.07 < abs(found[0] - 0.51), "the control: strengths far apart are wrong"


def test_a_model_that_refuses_nothing_has_nothing_to_match():
    silent = planted(-1.0, 0.01)
    assert silent.target.item() == 0 and crossing_ends(silent, 0.0) is None
    found = match(silent, silent)
    assert (found.strength, found.kl_nats, found.ratio) == (None, None, (None, None, None))
    refusing = planted(0.5, 0.01)
    assert match(silent, refusing).strength is None, "nor has one beside a model that does"
    assert match(refusing, refusing).strength is not None, "the control"


def test_sides_of_different_numbers_are_cut_alike():
    whole = planted(0.5, 0.01)
    uneven = Curve(AT, whole.refused, whole.kl[:, :40])
    found = match(Curve(AT, whole.refused, 2 * whole.kl[:, :40]), uneven)
    assert found.ratio == pytest.approx((2, 2, 2)) and found.kl_nats == pytest.approx(2 * match(uneven, uneven).kl_nats)


def test_the_reference_that_leaves_some_is_matched_there():
    half = planted(0.5, 0.01)
    half.refused[:, : N // 2] = 1.0  # it never stops these
    assert half.target.item() == 0.5
    assert match(planted(0.5, 0.01), half).strength == pytest.approx(0.5)


def test_intervals_of_the_ratio_hold_the_truth():
    """Two methods of the same cost and strengths, drawn anew: 95% of the intervals hold 1, and fewer hold 1.5."""
    draws = [match(planted(0.5, 0.01, 40, 0.1, s), planted(0.5, 0.01, 40, 0.1, 1000 + s)).ratio for s in range(60)]
    held = [sum(low <= truth <= high for _, low, high in draws) / len(draws) for truth in (1.0, 1.5)]
    assert held[0] >= 0.85 and held[1] < held[0] - 0.2


def varied(cost, seed):
    """A method of this cost against one of cost 1, found from one draw; refusals end at about the same strengths."""
    other = planted(0.5, 0.01, 40, 0.1, seed)
    return Curve(AT, other.refused, cost * other.kl * (1 + 0.05 * torch.rand(40, dtype=torch.float64))), other, other


def test_over_draws_there_is_every_ratio_and_the_interval_of_the_first():
    torch.manual_seed(0)
    triples = [varied(cost, 7) for cost in (1.0, 0.5, 2.0)]
    found = match_draws(triples)
    assert found.ratios == tuple(match(*each).ratio[0] for each in triples)
    value, low, high = found.one_fit
    assert value == found.ratios[0] and low < value < high and value**2 == pytest.approx(low * high)
    logs = np.log(found.ratios)
    assert found.sd_draws == pytest.approx(np.sqrt(((logs[1:] - logs[0]) ** 2).mean()))
    assert match_draws(triples) == found, "seeded"
    few = match_draws(triples[:2])
    assert few.ratios == found.ratios[:2] and few.one_fit == (value, None, None) and few.sd_draws is not None
    assert match_draws([*triples[:2], None]).one_fit == (value, None, None), "a draw without directions"
    never = (planted(9.0, 0.01, 40), *triples[0][1:])
    missing = match_draws([triples[0], triples[1], never])
    assert missing.ratios == (*found.ratios[:2], None) and missing.one_fit == (value, None, None)


def test_a_cost_of_nothing_has_no_ratio():
    some = planted(0.5, 0.01)
    free = Curve(AT, some.refused, 0 * some.kl)
    for method, other in ((free, some), (some, free), (free, free)):
        assert match(method, other).ratio == (None, None, None) == match(method, other, n_resamples=0).ratio
        assert match_draws([(method, other, other)] * 3).ratios == (None, None, None)
    assert match(some, some).ratio[0] == 1, "the control"


def test_an_interval_of_one_fit_does_not_narrow_with_draws_that_differ():
    torch.manual_seed(0)
    alike, unlike = ([varied(cost, 7) for cost in costs] for costs in ((1.0,) * 5, (1.0, 0.4, 0.7, 1.4, 2.5)))
    many = match_draws([*unlike, *unlike[1:], *unlike[1:], *unlike[1:]])
    found = match_draws(alike), match_draws(unlike), many
    narrow, wide, more = (np.log(each.one_fit[2] / each.one_fit[1]) for each in found)
    of_prompts = match(*alike[0]).ratio
    assert narrow < 3 * np.log(of_prompts[2] / of_prompts[1]), "draws that agree leave the interval over prompts"
    sd = np.sqrt((np.log([0.4, 0.7, 1.4, 2.5]) ** 2).mean())
    assert wide > 5 * narrow and more > 2 * 1.96 * sd * 0.95, "16 draws of that spread say no more of one fit"


def test_an_interval_of_one_fit_holds_the_truth():
    """Both kinds of prompts vary; limits over held-out ones, and percentiles of the mean, are too narrow."""
    rng, trials = np.random.default_rng(0), 200
    for n_draws in (3, 5):
        held = []
        for _ in range(trials):
            first, drawn = 0.26 * rng.standard_normal(), 0.26 * rng.standard_normal(n_draws - 1)
            own = torch.from_numpy(rng.lognormal(0, 0.3, 40)) / np.exp(0.3**2 / 2)
            triples = [flat(0.01 * np.exp(first + each), own) for each in (0, *drawn)]
            found = match_draws(triples, n_resamples=99)
            logs = np.log(found.ratios)
            means = logs[rng.integers(0, n_draws, (99, n_draws))].mean(1)
            spans = [np.log(found.one_fit[1:]), logs[0] + 1.96 * found.se_prompts * np.array([-1, 1])]
            held.append([low <= 0 <= high for low, high in (*spans, np.quantile(means, [0.025, 0.975]))])
        both, alone, percentiles = np.mean(held, axis=0)
        assert both >= 0.9 and max(alone, percentiles) < 0.75, (n_draws, both, alone, percentiles)


def flat(cost, factors):
    """A method whose prompts all stop, at this KL times their factors, over one of cost .01."""
    n = len(factors)
    refused = torch.stack([torch.ones(n), torch.zeros(n)]).double()
    kl = torch.stack([torch.zeros(n), torch.ones(n)]).double()
    other = Curve((0.0, 1.0), refused, 0.01 * kl)
    return Curve((0.0, 1.0), refused, cost * kl * factors), other, other


def test_overlap_of_spans():
    basis = torch.linalg.qr(
        torch.randn(D_MODEL, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q.T
    assert overlap(basis[:2], basis[:4]) == pytest.approx(1) and overlap(basis[:2], basis[2:6]) == pytest.approx(0)
    turned = torch.stack([basis[0], basis[1] * 0.6 + basis[2] * 0.8])
    assert overlap(turned, basis[:2]) == pytest.approx((1 + 0.36) / 2)


def test_a_span_is_removed_as_its_ablation_removes_it(tiny_model):
    model = tiny_model("llama")
    chat, tokens, names = ChatFormat(model.tokenizer), [5, 9], write_hooks(N_LAYERS)
    drawn = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(D_MODEL, k, generator=drawn, dtype=torch.float64)).Q.T for k in (3, 1, 2)]
    scorer = RemovalScorer(model, chat, ASKS, ASKS, tokens)
    strengths = (1.0, 0.4, 0.7)
    weights = [dict.fromkeys(names, strength) for strength in strengths]
    scores, kl = (read(bases, weights, range(len(ASKS))) for read in (scorer.score, scorer.kl))
    plain = next_token_logits(model, chat, ASKS)
    for basis, strength, score, cost in zip(bases, strengths, scores, kl, strict=True):
        ablation = Ablate(basis, strength)
        expected = refusal_scores(model, chat, ASKS, tokens, interventions=ablation)
        assert torch.allclose(score, expected.double(), atol=1e-4)
        changed = next_token_logits(model, chat, ASKS, interventions=ablation)
        assert torch.allclose(cost, kl_nats(plain, changed), atol=1e-5)
    one = scorer.kl([bases[0][:1]], weights[:1], range(len(ASKS)))[0]
    assert (one - kl[0]).abs().max() > 1e-4, "the control: its first direction alone is another removal"


def test_a_curve_that_is_none_is_refused():
    good = planted(0.5, 0.01)
    with pytest.raises(UserError, match="rise from 0"):
        Curve(AT[1:], good.refused[1:], good.kl[1:])
    with pytest.raises(UserError, match="need as many rows"):
        Curve(AT, good.refused[1:], good.kl[1:])
