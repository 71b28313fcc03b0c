"""The benchmark of a model on disk fails where what the docs say of it is not so."""

import math

import pytest
import torch

from benchmarks.offload import broken_claims, difference

NAN = math.nan
SIZE = 2 * 10**9
AS_CLAIMED = {
    "by blocks": {"means_gb": 4.0, "sweep_gb": 10.0, "check_gb": 6.1, "exits_mb": (736.0, 736.0)},
    "pass by pass": {"sweep_gb": 76.0},
}


def test_scores_that_are_nan_on_one_side_are_no_difference_of_zero():
    scores = torch.tensor([1.0, NAN, 3.0])
    assert difference(scores, scores.clone()) == 0.0
    assert difference(scores, torch.tensor([1.0, NAN, 3.5])) == 0.5
    nowhere = torch.tensor([NAN, NAN, NAN])
    for one, other in ((nowhere, scores), (scores, nowhere), (nowhere, nowhere), (scores, scores[:2])):
        assert difference(one, other) == math.inf
    infinite = torch.tensor([math.inf, 1.0])
    assert difference(infinite, infinite) == math.inf


@pytest.mark.parametrize(
    "way, name, value, claim",
    [
        ("by blocks", "means_gb", 6.0, "means"),
        ("by blocks", "sweep_gb", 12.0, "sweep"),
        ("by blocks", "check_gb", 8.0, "trial"),
        ("by blocks", "exits_mb", (736.0, 1500.0), "a hook ended"),
        ("pass by pass", "sweep_gb", 12.0, "pass by pass"),
    ],
)
def test_every_claim_can_fail(way, name, value, claim):
    assert broken_claims(AS_CLAIMED, SIZE, 1e-6) == []
    (said,) = broken_claims(AS_CLAIMED | {way: AS_CLAIMED[way] | {name: value}}, SIZE, 1e-6)
    assert claim in said


def test_scores_that_differ_fail():
    for largest in (0.1, math.inf, NAN):
        (said,) = broken_claims(AS_CLAIMED, SIZE, largest)
        assert "scores differ" in said
