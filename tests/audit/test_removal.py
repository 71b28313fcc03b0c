"""What is a removal, of one tensor: its change is tied to what it writes, which no other change is."""

import math

import pytest
import torch

from refusal_mi.audit.removal import MIN_FIT, WriterPair, find_removal, sums_along
from tests.helpers.audit import columns_kept, low_rank, projection, quantized, rows_kept

D_MODEL, N_INPUTS = 96, 160


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(k, seed=1):
    return torch.linalg.qr(draw(D_MODEL, k, seed=seed)).Q.T


def turn(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


MATRIX = draw(D_MODEL, N_INPUTS) * (1 + draw(D_MODEL, 1, seed=7).abs())
"""Coordinates of the stream are written with different sizes, as in models."""
UNIT = basis(1)


def found(new, old=MATRIX, axis=0, **more):
    return find_removal(WriterPair(old, new, axis, **more))


@pytest.mark.parametrize("strength", (0.1, 0.3, 1.0, 1.5, 2.0))
@pytest.mark.parametrize("axis", (0, 1))
def test_a_direction_and_how_much_of_it_was_removed(strength, axis):
    new = projection(UNIT, strength)(MATRIX)
    removal = found(new if axis == 0 else new.T.contiguous(), MATRIX if axis == 0 else MATRIX.T.contiguous(), axis)
    assert removal.strengths == pytest.approx([strength], abs=1e-6)
    assert abs((removal.directions[0] @ UNIT[0]).item()) == pytest.approx(1, abs=1e-9)
    assert removal.explained == pytest.approx(1, abs=1e-9) and removal.shares[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("k", (2, 3, 5))
def test_a_span_is_as_many_directions(k):
    removal = found(projection(basis(k), 0.7)(MATRIX))
    assert removal.strengths == pytest.approx([0.7] * k, abs=1e-6)
    assert torch.linalg.svdvals(removal.directions @ basis(k).T).min() > 1 - 1e-9


def test_directions_may_be_removed_to_different_degrees():
    one, two = basis(2)
    removal = found(projection(one[None], 1.0)(projection(two[None], 0.4)(MATRIX)))
    assert sorted(removal.strengths) == pytest.approx([0.4, 1.0], abs=1e-6)


@pytest.mark.parametrize("change", (rows_kept, columns_kept))
def test_norms_that_were_kept_hide_nothing(change):
    removal = found(change(UNIT[0])(MATRIX))
    assert abs((removal.directions[0] @ UNIT[0]).item()) > 0.999
    assert removal.strengths[0] == pytest.approx(1, abs=0.03) and len(removal.strengths) == 1
    plain = abs((torch.linalg.svd(rows_kept(UNIT[0])(MATRIX) - MATRIX).U[:, 0] @ UNIT[0]).item())
    assert plain < 0.99  # what the leading singular vector alone would have said


def test_behind_a_norm_the_stream_lost_it_and_not_the_rows():
    gain = 1 + 0.5 * draw(D_MODEL, seed=3)
    left = (UNIT / gain).T
    new = MATRIX - left @ ((UNIT * gain) @ MATRIX)
    removal = found(new, gain=gain, suspect_gain=gain)
    assert removal.frame == "gain" and abs((removal.directions[0] @ UNIT[0]).item()) > 1 - 1e-9
    assert sums_along(WriterPair(MATRIX, new, 0, gain, gain), UNIT, "gain").along().left < 1e-6
    assert not found(new).strengths  # without the gain it is no removal


OTHERS = {
    "low rank": low_rank(1),
    "low rank, large": low_rank(1, 2.0),
    "low rank 4": low_rank(4),
    "towards one direction": lambda matrix: matrix + UNIT.T @ draw(1, N_INPUTS, seed=5),
    "noise": lambda matrix: matrix + 0.01 * draw(D_MODEL, N_INPUTS, seed=5),
    "8 bits": quantized(8),
    "4 bits": quantized(4),
    "2 bits": quantized(2),
    "half as large": lambda matrix: 0.5 * matrix,
    "a tenth smaller, with noise": lambda matrix: 0.9 * matrix + 0.01 * draw(D_MODEL, N_INPUTS, seed=5),
    "amplified": projection(UNIT, -0.8),
    "shuffled inputs": lambda matrix: projection(UNIT)(matrix) + UNIT.T @ (UNIT @ matrix).flip(1),
    "turned": lambda matrix: matrix + (turn(math.pi / 2) @ basis(2) - basis(2)).T @ (basis(2) @ matrix),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_changes_are_no_removal(name):
    removal = found(OTHERS[name](MATRIX))
    assert removal.strengths == () and len(removal.directions) == 0 and removal.explained == 0
    assert removal.fit < MIN_FIT - 0.2


def test_what_is_small_and_is_rounded_to_zero_was_not_removed():
    """Along these coordinates all is gone, and in proportion; but it is no more than rounding changes elsewhere."""
    matrix = 3 * draw(96, 4000)
    matrix[:16] = 0.49 * draw(16, 4000, seed=4).sign()
    removal = found(matrix.round(), matrix)
    assert removal.strengths == ()
    assert not matrix[:16].round().any(), "along these nothing is left"
    assert found(torch.cat([torch.zeros_like(matrix[:2]), matrix[2:]]), matrix).strengths, "the control: no rounding"


@pytest.mark.parametrize("name", ("low rank", "low rank 4", "noise", "8 bits", "4 bits"))
def test_a_removal_is_found_under_another_change(name):
    removal = found(OTHERS[name](projection(UNIT)(MATRIX)))
    assert len(removal.strengths) == 1 and removal.strengths[0] == pytest.approx(1, abs=0.05)
    assert abs((removal.directions[0] @ UNIT[0]).item()) > 0.99 and removal.explained < 0.999


def test_what_is_left_and_what_happened_elsewhere():
    pair = WriterPair(MATRIX, 0.8 * projection(UNIT, 0.5)(MATRIX), 0)
    along = sums_along(pair, UNIT).along()
    assert along.left == pytest.approx(0.4) and along.strength == pytest.approx(0.6)
    assert along.elsewhere == pytest.approx(0.2) and along.is_removal
    other = sums_along(pair, projection(UNIT)(draw(D_MODEL, 1, seed=9)).T / 9).along()
    assert other.strength == pytest.approx(0.2) and not other.is_removal


def test_equal_tensors_and_rows_that_were_zero():
    assert found(MATRIX.clone()).shares == ()
    along = sums_along(
        WriterPair(torch.zeros(4, 8), torch.ones(4, 8), 0), torch.eye(4, dtype=torch.float64)[:1]
    ).along()
    assert (along.strength, along.left) == (0.0, 1.0) and math.isfinite(along.share)
