"""Each estimator against a second way of computing it, on rows whose truth is planted."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from refusal_mi.errors import UserError
from refusal_mi.estimators import linear, location, pools
from refusal_mi.estimators.samples import along, at_one_place

WIDTH = 12


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def planted(n=60, width=WIDTH, *, seed=0, gap=4.0, noise=None):
    """Two classes, `gap` apart along the first coordinate; `noise` is the standard deviation of each coordinate."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.ones(width) if noise is None else torch.as_tensor(noise)
    harmful, harmless = torch.randn(2, n, width, generator=generator, dtype=torch.float64) * spread
    harmful[:, 0] += gap
    return harmful, harmless


def mean_difference(harmful, harmless):
    return harmful.mean(0) - harmless.mean(0)


def test_the_geometric_median_minimises_the_distances_and_a_mean_does_not():
    rows, _ = planted(20, 4)
    rows[0] = 1000.0

    def distances(point):
        return (rows - torch.as_tensor(point)).norm(dim=-1).sum().item()

    found = location.geometric_median(rows)
    best = minimize(
        distances,
        rows.median(0).values.numpy(),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 20000},
    )
    assert distances(found) <= best.fun + 1e-6
    assert distances(rows.mean(0)) > distances(found) + 1


def test_the_median_of_rows_that_lie_on_one_of_them_is_that_row():
    """Where a step lands on a row its distance is 0; of most weight, the row is the median."""
    rows = torch.tensor([[0.0, 0], [0, 0], [0, 0], [3, 0], [0, 5]], dtype=torch.float64)
    assert torch.allclose(location.geometric_median(rows), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert torch.allclose(location.geometric_median(cross), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    one_sided = torch.tensor([[0.0], [1], [2], [3], [50]], dtype=torch.float64)
    assert location.geometric_median(one_sided).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("robust", [location.median_difference, location.winsorised_difference])
def test_one_prompt_far_out_turns_the_means_and_not_the_robust_estimators(robust):
    harmful, harmless = planted(60)
    truth = torch.eye(WIDTH, dtype=torch.float64)[0]
    for estimator in (mean_difference, robust):
        assert cosine(estimator(harmful, harmless), truth) > 0.95
    harmful[3, 5] = 1e4
    assert cosine(mean_difference(harmful, harmless), truth) < 0.1
    assert cosine(robust(harmful, harmless), truth) > 0.9


def test_a_winsorised_mean_is_scipys_and_at_quantile_1_the_mean():
    from scipy.stats.mstats import winsorize

    rows, _ = planted(41)
    expected = np.asarray(winsorize(rows.numpy(), limits=(0.1, 0.1), axis=0)).mean(0)
    assert np.allclose(location.winsorised_mean(rows, 0.9).numpy(), expected)
    assert torch.equal(location.winsorised_mean(rows, 1.0), rows.mean(0))
    assert not torch.allclose(location.winsorised_mean(rows, 0.9), rows.mean(0), atol=1e-3)
    for quantile in (0.5, 0.0, 1.1):
        with pytest.raises(UserError, match="quantile"):
            location.winsorised_mean(rows, quantile)


def test_clipping_holds_down_what_is_large_in_every_prompt():
    harmful, harmless = planted(30, 1000)
    for rows in (harmful, harmless):
        rows[:, 7] += 1000
    assert location.clipped_mean(harmful)[7] < 10 < 900 < location.winsorised_mean(harmful)[7]
    limits = harmful.abs().quantile(0.995, dim=1)
    one_by_one = torch.stack([row.clamp(-limit, limit) for row, limit in zip(harmful, limits, strict=True)])
    assert torch.allclose(location.clipped_mean(harmful), one_by_one.mean(0))


def test_a_projected_difference_has_nothing_of_the_harmless_mean():
    harmful, harmless = (rows.mean(0) for rows in planted())
    found, plain = location.projected_difference(harmful, harmless), harmful - harmless
    assert abs(cosine(plain, harmless)) > 1e-3 and abs(cosine(found, harmless)) < 1e-12
    assert torch.allclose(found + (plain @ harmless) / (harmless @ harmless) * harmless, plain)
    zero = torch.zeros_like(harmless)
    assert torch.equal(location.projected_difference(harmful, zero), harmful)


def test_the_component_of_all_differences_is_that_of_every_pair_written_out():
    harmful, harmless = planted(15)
    every = (harmful[:, None] - harmless[None]).flatten(0, 1)
    _, vectors = torch.linalg.eigh(every.T @ every / len(every))
    assert abs(cosine(linear.pca_of_differences(harmful, harmless), vectors[:, -1])) == pytest.approx(1)
    assert abs(cosine(linear.pca_of_differences(harmful, harmless[:9]), vectors[:, -1])) < 1 - 1e-6


def test_centred_pairs_lose_the_difference_of_means_and_others_find_it():
    harmful, harmless = planted(60)
    truth = torch.eye(WIDTH, dtype=torch.float64)[0]
    assert abs(cosine(linear.pca_of_pairs(harmful, harmless), truth)) > 0.95
    assert abs(cosine(linear.pca_of_pairs(harmful, harmless, centred=True), truth)) < 0.7
    with pytest.raises(UserError, match="as many prompts on each side"):
        linear.pca_of_pairs(harmful, harmless[:-1])


def test_lda_is_the_closed_form_and_sklearns():
    harmful, harmless = planted(60, noise=[1.0, 5.0] * 6)
    within = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    difference = mean_difference(harmful, harmless)
    covariance = within.T @ within / len(within)
    plain = linear.lda(harmful, harmless, shrinkage=0.0)
    assert torch.allclose(plain, torch.linalg.solve(covariance, difference), rtol=1e-9)
    labels = [1] * 60 + [0] * 60
    fitted = LinearDiscriminantAnalysis(solver="lsqr").fit(torch.cat([harmful, harmless]).numpy(), labels)
    assert cosine(plain, torch.from_numpy(fitted.coef_[0])) == pytest.approx(1)
    half = 0.5 * covariance + 0.5 * covariance.trace() / WIDTH * torch.eye(WIDTH)
    assert torch.allclose(linear.lda(harmful, harmless, shrinkage=0.5), torch.linalg.solve(half, difference))
    assert torch.allclose(cosine_of(linear.lda(harmful, harmless, shrinkage=1.0), difference), torch.ones(()).double())
    assert cosine(plain, difference) < 0.99


def cosine_of(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


@pytest.mark.parametrize(("n", "width"), [(10, 200), (60, 12)])
def test_shrinkage_is_sklearns_and_needs_no_matrix_of_the_width(n, width):
    harmful, harmless = planted(n, width, noise=torch.linspace(0.5, 3, width))
    within = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    covariance, gamma = sklearn_ledoit_wolf(within.numpy(), assume_centered=True)
    assert linear.ledoit_wolf(within) == pytest.approx(gamma, rel=1e-9) and 0 < gamma < 1
    expected = torch.linalg.solve(torch.from_numpy(covariance), mean_difference(harmful, harmless))
    assert torch.allclose(linear.lda(harmful, harmless), expected, rtol=1e-8)


def test_without_shrinkage_the_pseudo_inverse_is_taken_where_prompts_are_few():
    harmful, harmless = planted(5, 30)
    within = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    expected = torch.linalg.pinv(within.T @ within / 10, rtol=1e-10) @ mean_difference(harmful, harmless)
    assert torch.allclose(linear.lda(harmful, harmless, shrinkage=0.0), expected, rtol=1e-6)


def accuracy(direction, harmful, harmless, middle):
    right = ((harmful - middle) @ direction > 0).sum() + ((harmless - middle) @ direction < 0).sum()
    return (right / (len(harmful) + len(harmless))).item()


@pytest.mark.parametrize("estimator", [linear.logistic, linear.lda])
def test_what_separates_held_out_prompts_is_found_and_shuffled_labels_find_nothing(estimator):
    """A nuisance of large spread lies across the difference: the means point along it, the classifiers do not."""
    noise = torch.ones(WIDTH)
    noise[1] = 30.0
    train, test = planted(80, noise=noise, seed=1), planted(200, noise=noise, seed=2)
    middle = (train[0].mean(0) + train[1].mean(0)) / 2

    def held_out(harmful, harmless):
        return accuracy(estimator(harmful, harmless), *test, middle)

    assert held_out(*train) > 0.93 > accuracy(mean_difference(*train), *test, middle)
    pooled, generator = torch.cat(train), torch.Generator().manual_seed(0)
    null = [held_out(*pooled[torch.randperm(160, generator=generator)].split(80)) for _ in range(20)]
    assert max(null) < 0.93 and abs(sum(null) / 20 - 0.5) < 0.2


def test_peeled_directions_are_orthogonal_and_each_is_the_probe_of_what_is_left():
    harmful, harmless = planted(60, gap=6.0)
    harmful[:, 1] += 3.0
    found = pools.peel(harmful, harmless, 3)
    units = torch.nn.functional.normalize(found, dim=-1)
    assert torch.allclose(units @ units.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert cosine(found[0], linear.logistic(harmful, harmless)) == pytest.approx(1)
    assert torch.equal(pools.peeled(harmful, harmless, number=2), found[1])
    left = [rows - (rows @ units[0])[:, None] * units[0] for rows in (harmful, harmless)]
    second = linear.logistic(*left)
    assert cosine(found[1], second - (second @ units[0]) * units[0]) == pytest.approx(1)
    assert abs(cosine(found[1], linear.logistic(harmful, harmless))) < 1e-9
    assert (found @ mean_difference(harmful, harmless) > 0).all()


def test_peeling_the_difference_of_means_leaves_no_second_one():
    harmful, harmless = planted()
    found = pools.peel(harmful, harmless, 3, function=mean_difference)
    assert torch.allclose(found[0], mean_difference(harmful, harmless)) and not found[1:].any()


@pytest.mark.parametrize("width", [3, 200])
def test_clusters_are_those_that_were_planted_and_weigh_up_to_the_means(width):
    harmful, harmless = planted(60, width)
    truth = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    harmful[:, 1] += torch.tensor([0.0, 40, 80])[truth]
    assert torch.equal(pools.clusters(harmful, 3), truth)
    found = pools.cluster_differences(harmful, harmless, 3)
    assert torch.allclose(found[1], harmful[30:50].mean(0) - harmless.mean(0))
    weighted = torch.tensor([30, 20, 10], dtype=torch.float64) / 60 @ found
    assert torch.allclose(weighted, mean_difference(harmful, harmless))
    assert torch.equal(pools.cluster_difference(harmful, harmless, number=3, n_clusters=3), found[2])
    with pytest.raises(UserError, match="as many prompts"):
        pools.clusters(harmful[:2], 3)


def test_coefficient_1_moves_one_mean_onto_the_other_along_the_direction():
    harmful, harmless = planted()
    for function in (linear.lda, lambda a, b: -3 * linear.lda(a, b)):
        vector = at_one_place(function, harmful, harmless)
        assert vector @ harmless.mean(0) + vector @ vector == pytest.approx((vector @ harmful.mean(0)).item())
        assert cosine(vector, mean_difference(harmful, harmless)) > 0
    assert torch.allclose(at_one_place(mean_difference, harmful, harmless), mean_difference(harmful, harmless))


def test_no_direction_where_means_agree_or_the_vector_is_across():
    harmful, _ = planted()
    assert not at_one_place(linear.lda, harmful, harmful.flip(0)).any()
    first, second = torch.eye(3, dtype=torch.float64)[:2]
    assert not along(first, second).any() and not along(torch.zeros(3).double(), second).any()
    assert torch.equal(along(-2 * first, first + second), first)
