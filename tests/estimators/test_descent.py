"""Descent over orthonormal rows on functions whose lowest point is known; it stops, resumes and refuses as it says."""

from itertools import pairwise

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.estimators.descent import Descent, DescentOptions, descend, orthonormal, tangent
from refusal_mi.files import read_tensors, write_tensors

WIDTH = 8
SPREAD = torch.linspace(1, 5, WIDTH, dtype=torch.float64)
BASIS = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
MATRIX = BASIS @ torch.diag(SPREAD) @ BASIS.T
OPTIONS = DescentOptions(n_steps=300, learning_rate=0.05, patience=20)


def random_rows(n, seed=0):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(rows, step):
    """Σ weight · vᵀMv with falling weights: lowest at the eigenvectors of the smallest eigenvalues, in their order."""
    weights = torch.arange(len(rows), 0, -1, dtype=torch.float64)
    each = ((rows @ MATRIX) * rows).sum(-1)
    return [(weights * each).sum().item(), *each.tolist()], 2 * weights[:, None] * (rows @ MATRIX)


@pytest.mark.parametrize("n", [1, 3])
def test_it_finds_the_lowest_rows_and_a_random_frame_is_none(n):
    found = descend(quadratic, random_rows(n), OPTIONS)
    assert (found.rows @ BASIS[:, :n]).diag().abs().min() > 0.999
    assert found.losses[found.best_step, 0] < found.losses[0, 0] and found.losses.shape[1] == n + 1
    lowest = (torch.arange(n, 0, -1) * SPREAD[:n]).sum().item()
    assert found.losses[:, 0].min().item() == pytest.approx(lowest, rel=1e-3)
    assert all(quadratic(orthonormal(random_rows(n, seed)), 0)[0][0] > 1.1 * lowest for seed in range(20))


@pytest.mark.parametrize("n", [1, 3])
def test_rows_stay_orthonormal_and_out_of_a_span(n):
    seen, others = [], random_rows(2, 9)
    descend(
        lambda rows, step: (seen.append(rows), quadratic(rows, step))[1], random_rows(n), OPTIONS, orthogonal_to=others
    )
    assert len(seen) > 20 and (seen[-1] - seen[0]).norm() > 0.1
    for rows in seen:
        assert (rows @ rows.T - torch.eye(n)).abs().max() < 1e-12 and (rows @ others.T).abs().max() < 1e-12
    assert (descend(quadratic, random_rows(n), OPTIONS).rows @ others.T).abs().max() > 0.1


def test_gram_schmidt_keeps_the_first_row_and_what_the_others_add():
    rows = random_rows(3)
    found = orthonormal(rows)
    assert torch.allclose(found[0], rows[0] / rows[0].norm()) and (found * rows).sum(-1).min() > 0
    triangle = rows @ found.T  # lower triangular: row i lies in the span of the first i
    assert triangle.triu(1).abs().max() < 1e-12 < triangle[1, 0].abs()
    for dependent in (torch.zeros(1, WIDTH), torch.cat([rows, rows.sum(0)[None]])):
        with pytest.raises(UserError, match="in the span of"):
            orthonormal(dependent)
    with pytest.raises(UserError, match="in the span of"):
        orthonormal(rows[:1], 2 * rows[:2])


def test_a_tangent_gradient_has_the_slope_of_the_retracted_function():
    """Along any move of the rows that keeps them orthonormal to first order; a move that does not has no part in it."""
    rows, gradient = orthonormal(random_rows(3)), random_rows(3, 5)
    projected = tangent(gradient, rows)
    skew = projected @ rows.T
    assert (skew + skew.T).abs().max() < 1e-12 < (gradient @ rows.T + rows @ gradient.T).abs().max()
    move = tangent(random_rows(3, 6), rows)
    assert (projected * move).sum().item() == pytest.approx((gradient * move).sum().item())
    alone = orthonormal(random_rows(1))
    g, v = gradient[0], alone[0]
    assert torch.allclose(tangent(g[None], alone)[0], g - (g @ v) * v)


def stopped_at(step):
    def evaluate(rows, now):
        if now == step:
            raise KeyboardInterrupt
        return quadratic(rows, now)

    return evaluate


def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    options, start = DescentOptions(n_steps=9), random_rows(2)
    whole = descend(quadratic, start, options, checkpoint=tmp_path / "whole.pt", key="k")
    part = tmp_path / "part.pt"
    for step in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            descend(stopped_at(step), start, options, checkpoint=part, key="k")
    assert descend(quadratic, start, options, checkpoint=part, key="k") == whole
    assert part.read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert descend(stopped_at(0), start, options, checkpoint=part, key="k") == whole  # nothing is left to do
    assert isinstance(whole, Descent) and len(whole.losses) == 9
    held = read_tensors(tmp_path / "whole.pt")
    write_tensors(part, {**held, "exp_avg": torch.zeros_like(held["exp_avg"])})
    further = DescentOptions(n_steps=11)
    changed, unchanged = (
        descend(quadratic, start, further, checkpoint=tmp_path / name, key="k") for name in ("part.pt", "whole.pt")
    )
    assert not torch.equal(changed.losses, unchanged.losses) and torch.equal(changed.losses[:9], unchanged.losses[:9])


def test_it_waits_reduces_and_ends():
    options = DescentOptions(n_steps=50, patience=2, n_reductions=1)
    flat = descend(lambda rows, step: ([1.0], quadratic(rows, step)[1]), random_rows(1), options)
    assert flat.stopped_early and len(flat.losses) == 1 + 2 * 2 and flat.best_step == 0
    assert torch.equal(flat.rows, orthonormal(random_rows(1)))
    falling = descend(lambda rows, step: ([-float(step)], quadratic(rows, step)[1]), random_rows(1), options)
    assert not falling.stopped_early and len(falling.losses) == 50 and falling.best_step == 49
    moved = []
    descend(lambda rows, step: (moved.append(rows[0]), ([1.0], quadratic(rows, step)[1]))[1], random_rows(1), options)
    lengths = [(after - before).norm().item() for before, after in pairwise(moved)]
    assert lengths[-1] < 0.2 * lengths[0]


def test_what_cannot_be_gone_on_from_is_one_line(tmp_path):
    path, options = tmp_path / "c.pt", DescentOptions(n_steps=3)
    descend(quadratic, random_rows(1), options, checkpoint=path, key="k")
    held = read_tensors(path)
    with pytest.raises(UserError, match="another model, other texts"):
        descend(quadratic, random_rows(1), options, checkpoint=path, key="other")
    with pytest.raises(UserError, match="3 steps far"):
        descend(quadratic, random_rows(1), DescentOptions(n_steps=2), checkpoint=path, key="k")
    for damaged, line in (
        ([torch.ones(2)], "is no checkpoint"),
        ({name: value for name, value in held.items() if name != "best"}, "is no checkpoint"),
        (held | {"rows": torch.ones(2, 3)}, "is a damaged checkpoint"),
        (held | {"losses": held["losses"][:1]}, "is a damaged checkpoint"),
        (held | {"rows": held["rows"].float()}, "is a damaged checkpoint"),
        (held | {"rows": held["rows"] * torch.nan}, "is a damaged checkpoint"),
        (held | {"counters": -held["counters"]}, "is a damaged checkpoint"),
    ):
        write_tensors(path, damaged)
        with pytest.raises(UserError, match=line) as raised:
            descend(quadratic, random_rows(1), options, checkpoint=path, key="k")
        assert "\n" not in str(raised.value)
    path.write_text("no tensors")
    with pytest.raises(UserError, match="plain tensors"):
        descend(quadratic, random_rows(1), options, checkpoint=path, key="k")


def test_numbers_that_are_none_end_it():
    for loss, factor in ((float("nan"), 1), (1.0, torch.inf)):
        with pytest.raises(UserError, match="not finite"):
            descend(lambda rows, step: ([loss], quadratic(rows, step)[1] * factor), random_rows(1))
    for wrong in ({"n_steps": 0}, {"patience": 0}, {"n_reductions": -1}, {"learning_rate": 0.0}):
        with pytest.raises(UserError, match=r"must be|needs"):
            DescentOptions(**wrong)
