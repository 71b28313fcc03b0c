"""Geometry, comparison and probes: they see a planted difference, and their controls see none."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, silhouette_score

from refusal_mi.analysis.comparison import compare_directions
from refusal_mi.analysis.geometry import direction_geometry
from refusal_mi.analysis.probes import area_under_curve, linear_probes
from refusal_mi.analysis.separation import MEASURES, SHRINKAGE, class_measures, random_folds
from refusal_mi.errors import UserError
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, HARMFUL, HARMLESS, grid_of
from tests.helpers.directions import direction_of, random_direction

# The last letter tells the classes apart, which the template's first token reads; lengths do not.
WORDS = ("aab", "aba", "baa", "bba", "bab", "abb", "aaa", "bbb")
MARKED, PLAIN = (tuple(f"{word}{letter}" for word in WORDS) for letter in "zq")


@pytest.fixture
def llama(tiny_model):
    model = tiny_model("llama")
    return model, ChatFormat(model.tokenizer)


def test_geometry_is_that_of_the_grid(llama):
    model, chat = llama
    grid = grid_of(model, chat)
    result = direction_geometry(model, chat, HARMFUL, HARMLESS, n_resamples=2)
    torch.testing.assert_close(result.norms, grid.vectors.norm(dim=-1), rtol=1e-5, atol=1e-9)
    rows = torch.nn.functional.normalize(grid.vectors.flatten(0, 1), dim=-1)
    missing = torch.tensor(grid.is_degenerate).flatten()
    expected = torch.where(missing[:, None] | missing, torch.nan, rows @ rows.T)
    torch.testing.assert_close(result.cosines, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(missing.any()) and not bool(missing.all())
    assert result.labels[grid.n_layers + 1] == f"position {grid.positions[1]}, layer 1"


def test_a_planted_difference_is_stable_and_a_shuffled_one_is_not(llama):
    model, chat = llama
    result = direction_geometry(model, chat, MARKED, PLAIN, n_resamples=20)
    first = result.positions[0]  # the first template token sees the letter before it
    row = result.positions.index(first)
    assert result.stability[row, 1:].min() > 0.8
    assert (result.stability_p05 - result.shuffled_p95)[row, 1:].min() > 0
    assert bool((result.norms > result.norms_null_p95)[row, 1:].all())


@pytest.mark.parametrize(("n_harmful", "n_harmless"), [(6, 6), (7, 4)])
def test_resamples_weigh_prompts_as_they_should(llama, n_harmful, n_harmless, monkeypatch):
    """Two classes that are one point each: every sample of them gives their difference, and every shuffle nothing."""
    model, chat = llama
    generator = torch.Generator().manual_seed(0)
    shape = (len(chat.positions), model.cfg.n_layers, 16)
    both, difference = (torch.randn(shape, generator=generator) for _ in range(2))
    streams = torch.stack([both + difference] * n_harmful + [both] * n_harmless)
    noise = torch.randn(streams.shape, generator=generator)
    results = []
    for table in (streams, streams + 0.5 * noise):
        monkeypatch.setattr("refusal_mi.analysis.geometry.template_residuals", lambda *_, table=table, **__: table)
        results.append(direction_geometry(model, chat, HARMFUL[:1] * n_harmful, HARMLESS[:1] * n_harmless))
    exact, noisy = results
    torch.testing.assert_close(exact.norms, difference.double().norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.stability_p05, torch.ones_like(exact.norms), rtol=0, atol=1e-6)
    assert exact.norms_null_p95.max() < 1e-5 * exact.norms.min(), "a shuffle keeps nothing of the classes"
    assert noisy.norms_null_p95.min() > 0.1
    assert (noisy.stability - noisy.stability_p05).min() > 1e-3, "the samples differ"


def two_classes(n=24, width=12, gap=0.0, seed=0):
    """Rows far from the origin, of which the first n are moved along one axis, their labels, and folds."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n, width, generator=generator, dtype=torch.float64) + 3
    rows[:n, 0] += gap
    return rows, torch.arange(2 * n) < n, random_folds(2 * n, generator)


@pytest.mark.parametrize("width", [12, 90])
def test_the_table_of_two_classes_is_what_its_formulas_say(width):
    rows, true, folds = two_classes(width=width, gap=4.0)
    other = true.roll(12)
    found = class_measures(rows, torch.stack([true, other]), folds)
    for column, labels in enumerate((true, other)):
        plus, minus = rows[labels].mean(0), rows[~labels].mean(0)
        r, cosine = plus - minus, torch.nn.functional.cosine_similarity
        rest = r - (r @ minus) / (minus @ minus) * minus
        said = torch.empty(len(rows), dtype=torch.bool)
        for fold in folds.unique():
            x, flags = rows[folds != fold], labels[folds != fold]
            centred = x - x.mean(0)
            ridge = SHRINKAGE * centred.square().sum(-1).mean() * torch.eye(width, dtype=torch.float64)
            delta = x[flags].mean(0) - x[~flags].mean(0)
            weight = torch.linalg.solve(centred.T @ centred + ridge, delta)
            middle = (x[flags].mean(0) + x[~flags].mean(0)) @ weight / 2
            said[folds == fold] = rows[folds == fold] @ weight > middle
        expected = [plus.norm(), minus.norm(), r.norm(), cosine(plus, minus, dim=0), cosine(r, plus, dim=0)]
        expected += [cosine(r, minus, dim=0), r.norm() / max(plus.norm(), minus.norm()), rest.norm() / r.norm()]
        expected += [silhouette_score(rows.numpy(), labels.numpy())]
        expected += [balanced_accuracy_score(labels.numpy(), said.numpy())]
        torch.testing.assert_close(found[:, column], torch.tensor(list(map(float, expected)), dtype=torch.float64))
    assert found[-1, 0] > found[-1, 1] and found[-2, 0] > found[-2, 1]


def test_classes_that_do_not_differ_exceed_their_null_as_often_as_chance():
    above = {"silhouette": 0, "held-out accuracy": 0}
    for trial in range(100):
        rows, true, folds = two_classes(n=12, width=6, seed=trial)
        generator = torch.Generator().manual_seed(trial)
        shuffled = [true[torch.randperm(len(true), generator=generator)] for _ in range(39)]
        found = class_measures(rows, torch.stack([true, *shuffled]), folds)
        for name in above:
            row = found[MEASURES.index(name)]
            above[name] += bool(row[0] > row[1:].quantile(0.95))
    assert all(1 <= count <= 13 for count in above.values()), above
    rows, true, folds = two_classes(gap=4.0)
    assert class_measures(rows, true[None], folds)[-1].item() > 0.9, "and one that is there is seen"


def test_one_point_has_no_direction_and_is_told_apart_by_chance():
    rows, true, folds = two_classes()
    found = dict(zip(MEASURES, class_measures(rows[:1].expand(48, -1), true[None], folds)[:, 0].tolist(), strict=True))
    assert found["held-out accuracy"] == 0.5 and found["norm of r"] == found["signal to noise"] == 0
    assert found["purity"] != found["purity"] and found["cosine of the means"] == pytest.approx(1)


def test_the_table_sees_a_planted_difference_where_it_can_be_read(llama):
    model, chat = llama
    result = direction_geometry(model, chat, MARKED, PLAIN, n_resamples=20)
    accuracy, row = result.measures.index("held-out accuracy"), 0  # the first template token sees the letter before it
    assert (result.table[accuracy, row, 1:] > result.table_null_high[accuracy, row, 1:]).all()
    assert (result.table[accuracy, :, 0] == 0.5).all(), "the template's own token tells nothing"
    torch.testing.assert_close(result.measure("norm of r"), result.norms, rtol=1e-5, atol=1e-6)
    frame = result.to_frame("table")
    assert {"measure", "pos", "layer", "table", "table_null_low", "table_null_high"} == set(frame.columns)
    assert len(frame) == len(MEASURES) * result.norms.numel()
    with pytest.raises(UserError, match="did you mean 'silhouette'"):
        result.measure("silouette")


def test_comparison_of_known_directions():
    vector = torch.randn(400, generator=torch.Generator().manual_seed(0))
    base = direction_of(vector)
    turned = direction_of(-3 * vector)
    result = compare_directions({"r": base, "-3r": turned, "random": base.random_like(1)})
    assert result.cosines[0, 1].item() == pytest.approx(-1)
    assert result.norms[1].item() == pytest.approx(3 * base.norm, rel=1e-6)
    assert result.null_p95 == pytest.approx(1.96 / 400**0.5, rel=0.1)
    assert abs(result.cosines[0, 2].item()) < 2 * result.null_p95
    with pytest.raises(UserError, match="at least 2"):
        compare_directions({"r": base})


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_at_chance_at_layer_0_of_the_template(tiny_model, family):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    direction = grid_of(model, chat).direction(-1, 3)
    result = linear_probes(model, chat, MARKED[:4], PLAIN[:4], direction, positions=(-5,), n_folds=2, n_shuffles=1)
    assert bool(result.auc.isfinite().all())
    assert bool((result.auc[:, 0, 0] == 0.5).all()) and bool(result.cosines[:, 0, 0].isnan().all())
    assert bool((result.null_low[:, 0, 0] == 0.5).all()) and bool((result.null_high[:, 0, 0] == 0.5).all())
    assert result.auc[:, 0, 1:].max() > 0.9


def test_the_probe_of_means_is_the_direction_it_was_made_from(llama):
    model, chat = llama
    direction = grid_of(model, chat).direction(-2, 4)
    result = linear_probes(model, chat, HARMFUL, HARMLESS, direction, positions=(-2,), n_folds=2, n_shuffles=1)
    assert result.cosines[0, 0, 4].item() == pytest.approx(1, abs=1e-5)
    assert abs(result.cosines[0, 0, 2].item()) < 0.999


def test_area_under_curve_is_scikit_learns_with_ties():
    scores = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0])
    labels = torch.tensor([False, True, False, True, False, True, True])
    ours = area_under_curve(scores[labels], scores[~labels])
    assert ours == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))
    assert area_under_curve(torch.zeros(3), torch.zeros(2)) == 0.5


def test_fitting_in_the_span_of_the_rows_is_fitting_everywhere(llama, monkeypatch):
    """Read off the cosines with directions, of which the last is the coordinate that is the same everywhere."""
    model, chat = llama
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 80, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 5, 80)
    features[:, 3] = 7.0  # the same for every prompt
    table = features[:, None, None].expand(-1, len(chat.positions), -1, -1)
    monkeypatch.setattr("refusal_mi.analysis.probes.template_residuals", lambda *_, **__: table)
    labels = torch.arange(30) < 15
    spread = features.std(0, correction=0)
    spread[3] = 1
    standardized = (features - features.mean(0)) / spread
    direct = torch.from_numpy(LogisticRegression(tol=1e-8).fit(standardized.numpy(), labels.numpy()).coef_[0]) / spread
    constant = torch.zeros(80)
    constant[3] = 1.0
    size = {"positions": (-1,), "n_folds": 2, "n_shuffles": 0}
    for direction in (*(random_direction(seed, width=80) for seed in range(3)), direction_of(constant)):
        found = linear_probes(model, chat, HARMFUL[:1] * 15, HARMLESS[:1] * 15, direction, **size)
        cosine = torch.nn.functional.cosine_similarity(direction.unit, direct, dim=0).item()
        assert direction.unit[3] == 1 or abs(cosine) > 0.02
        assert found.cosines[1].item() == pytest.approx(cosine, abs=1e-3)
    assert found.cosines[1].item() == 0


def test_too_few_prompts_for_the_folds(llama):
    model, chat = llama
    direction = grid_of(model, chat).direction(-1, 3)
    with pytest.raises(UserError, match="5 folds need as many prompts"):
        linear_probes(model, chat, HARMFUL[:3], HARMLESS, direction)
