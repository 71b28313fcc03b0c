"""LEACE and affine interventions: nothing linear is left of the class; means land on means."""

import pytest
import torch
from concept_erasure import LeaceFitter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from refusal_mi.directions import ActivationMeans, Direction
from refusal_mi.errors import UserError
from refusal_mi.estimators.erasure import fit_eraser
from refusal_mi.estimators.linear import lda
from refusal_mi.estimators.samples import ActivationSamples, at_one_place
from refusal_mi.interventions import Ablate, Affine, Leace, all_hooks
from refusal_mi.model.points import resid_hook
from refusal_mi.model.running import last_logits, running
from refusal_mi.reading import sample_activations, template_residuals
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.models import D_MODEL, N_LAYERS
from tests.helpers.naive import ASKS

WIDTH = 10


def classes(n=(80, 50), width=WIDTH, seed=0):
    """Two classes with a common covariance that is far from a sphere, and a difference across its axes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    harmful, harmless = (torch.randn(size, width, generator=generator, dtype=torch.float64) @ mixing for size in n)
    return harmful + torch.linspace(0, 2, width), harmless + 5


def cross_covariance(harmful, harmless):
    rows, labels = torch.cat([harmful, harmless]), torch.tensor([1.0] * len(harmful) + [0.0] * len(harmless)).double()
    return (rows - rows.mean(0)).T @ (labels - labels.mean()) / len(rows)


def orthogonal(harmful, harmless):
    """The projection along the difference of means, which LEACE improves upon."""
    unit = torch.nn.functional.normalize(harmful.mean(0) - harmless.mean(0), dim=0)
    return [rows - (rows @ unit)[:, None] * unit for rows in (harmful, harmless)]


def cross_entropy(harmful, harmless):
    """The least loss of a logistic regression with next to no penalty, in nats a prompt."""
    rows, labels = torch.cat([harmful, harmless]).numpy(), [1] * len(harmful) + [0] * len(harmless)
    probe = LogisticRegression(C=1e4, max_iter=10_000).fit(rows, labels)
    return log_loss(labels, probe.predict_proba(rows))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, None])
@pytest.mark.parametrize(("n", "width"), [((80, 50), WIDTH), ((12, 9), 200)])
def test_the_class_is_uncorrelated_with_everything_on_the_fitting_sample(n, width, shrinkage):
    harmful, harmless = classes(n, width)
    eraser = fit_eraser(harmful, harmless, shrinkage=shrinkage)
    assert cross_covariance(harmful, harmless).abs().max() > 0.1
    assert cross_covariance(eraser(harmful), eraser(harmless)).abs().max() <= 1e-10
    rows = torch.cat([harmful, harmless])
    assert torch.allclose(eraser(rows).mean(0), rows.mean(0)) and torch.allclose(eraser(eraser(rows)), eraser(rows))


def test_no_linear_classifier_beats_the_constant_on_the_fitting_sample():
    harmful, harmless = classes()
    eraser = fit_eraser(harmful, harmless, shrinkage=0.0)
    share = torch.tensor(80 / 130).double()
    constant = -(share * share.log() + (1 - share) * (1 - share).log()).item()
    assert cross_entropy(eraser(harmful), eraser(harmless)) == pytest.approx(constant, abs=1e-7)
    assert cross_entropy(harmful, harmless) < 0.5 * constant
    rows, labels = torch.cat([eraser(harmful), eraser(harmless)]), torch.tensor([1.0] * 80 + [-1.0] * 50).double()
    design = torch.cat([rows, torch.ones(130, 1)], dim=1)
    fitted = torch.linalg.pinv(design, rtol=1e-9) @ labels
    assert torch.allclose(design @ fitted, torch.full((130,), 30 / 130, dtype=torch.float64), atol=1e-9)


def test_held_out_probes_after_erasure_are_inside_the_permutation_null():
    train, test = classes((400, 400)), classes((400, 400), seed=1)
    eraser = fit_eraser(*train)
    labels = torch.tensor([1] * 400 + [0] * 400)

    def accuracy(change, labels_of_train):
        fitted = LogisticRegression(max_iter=5000).fit(change(torch.cat(train)).numpy(), labels_of_train.numpy())
        return fitted.score(change(torch.cat(test)).numpy(), labels.numpy())

    generator = torch.Generator().manual_seed(0)
    null = [accuracy(eraser, labels[torch.randperm(800, generator=generator)]) for _ in range(20)]
    assert min(null) <= accuracy(eraser, labels) <= max(null) < accuracy(lambda rows: rows, labels)


@pytest.mark.parametrize("n", [(80, 50), (200, 200)])
def test_without_shrinkage_it_is_the_eraser_of_concept_erasure(n):
    harmful, harmless = classes(n)
    rows, labels = torch.cat([harmful, harmless]), torch.tensor([1] * n[0] + [0] * n[1])
    theirs = LeaceFitter.fit(rows, labels, shrinkage=False, svd_tol=1e-12).eraser
    ours = fit_eraser(harmful, harmless, shrinkage=0.0)
    assert torch.allclose(ours(rows), theirs(rows), atol=1e-9)
    assert not torch.allclose(fit_eraser(harmful, harmless, shrinkage=0.5)(rows), theirs(rows), atol=1e-3)


def test_it_moves_the_rows_less_than_the_orthogonal_projection_does():
    """E‖x' − x‖², of all affine changes after which the classes are uncorrelated, is least in every norm at once."""
    harmful, harmless = classes()
    rows = torch.cat([harmful, harmless])
    inverse = torch.linalg.inv(torch.cov(rows.T))
    erased, projected = fit_eraser(harmful, harmless, shrinkage=0.0)(rows), torch.cat(orthogonal(harmful, harmless))
    projected = projected - projected.mean(0) + rows.mean(0)
    for metric in (inverse, torch.eye(WIDTH, dtype=torch.float64)):
        cost, other = ((each - rows) @ metric * (each - rows) for each in (erased, projected))
        assert cost.sum() < 0.9 * other.sum()
    assert torch.cov(erased.T).trace() <= torch.cov(rows.T).trace() + 1e-9


def test_equal_classes_have_nothing_to_erase():
    harmful, _ = classes()
    with pytest.raises(UserError, match="nothing to erase"):
        fit_eraser(harmful, harmful.clone())
    with pytest.raises(UserError, match="fraction"):
        fit_eraser(*classes(), shrinkage=1.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_as_hooks_it_erases_the_stream_of_each_of_its_layers(family, tiny_model):
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    sides = ASKS[:4], ASKS[4:8]
    samples = [sample_activations(model, chat, side) for side in sides]
    chosen = [Leace.fit(*samples, 2)]
    under = [template_residuals(model, chat, side, layers=range(N_LAYERS), interventions=chosen) for side in sides]
    again = [ActivationSamples(each, chat.positions) for each in under]
    chosen.append(Leace.fit(*again, 4))
    for layer in (2, 3, 4):
        rows = [
            template_residuals(model, chat, side, layers=[layer], n_last=1, interventions=chosen)[:, 0, 0].double()
            for side in sides
        ]
        gap = (rows[0].mean(0) - rows[1].mean(0)).norm() / rows[0].norm(dim=-1).mean()
        assert (gap <= 1e-5) == (layer != 3), layer


def test_a_fit_needs_a_place_that_was_read():
    samples = ActivationSamples(torch.randn(4, 2, 3, 8), (-2, -1))
    for layer, position in ((3, -1), (1, -3)):
        with pytest.raises(UserError, match="nothing was read at position"):
            Leace.fit(samples, samples, layer, position=position)


def test_at_0_and_1_the_component_is_that_of_the_two_means(tiny_model):
    """For the difference of means and for another estimator's direction, whose length is the difference along it."""
    model = tiny_model("gpt2", "float64")
    name, generator = resid_hook(2, N_LAYERS), torch.Generator().manual_seed(0)
    harmful, harmless = torch.randn(2, 60, D_MODEL, generator=generator, dtype=torch.float64)
    harmful += torch.linspace(-1, 1, D_MODEL)
    means = ActivationMeans(harmless.mean(0)[None, None].expand(1, 3, -1), (-1,), 60)
    for vector in (harmful.mean(0) - harmless.mean(0), at_one_place(lda, harmful, harmless)):
        direction = direction_of(vector, 2)
        for coefficient, wanted in ((0.0, harmless), (1.0, harmful)):
            affine = Affine.between(direction, means, coefficient)
            ((hooked, function),) = affine.hooks(model)
            changed = function(torch.cat([harmful, harmless])[None], None)[0]
            along = changed @ direction.unit
            assert hooked == name and torch.allclose(along, (wanted.mean(0) @ direction.unit).expand_as(along))
            before = torch.cat([harmful, harmless])
            assert (before @ direction.unit - along).abs().max() > 0.5
            rest = (changed - before) - ((changed - before) @ direction.unit)[:, None] * direction.unit
            assert rest.abs().max() < 1e-12


def test_what_it_sets_at_one_layer_constants_set_everywhere(tiny_model):
    model, direction = tiny_model("gpt2", "float64"), random_direction(0, 2)
    chat = ChatFormat(model.tokenizer)

    def components(intervention):
        read = template_residuals(model, chat, ASKS[:3], interventions=[intervention]).double()
        return read @ direction.unit

    everywhere, here = components(Ablate(direction, constants=[1.5])), components(Affine(direction, 1.5))
    assert torch.allclose(everywhere, torch.full_like(everywhere, 1.5), atol=1e-5)
    assert torch.allclose(here[..., 2], torch.full_like(here[..., 2], 1.5), atol=1e-5)
    assert (here[..., 1] - 1.5).abs().max() > 0.1


def test_bad_numbers_places_and_widths_are_one_line(tiny_model):
    direction = random_direction(0)
    for wrong in (float("nan"), float("inf"), 1e30):
        with pytest.raises(UserError):
            Affine(direction, wrong)
        with pytest.raises(UserError):
            Affine(direction, 0.0, wrong)
    means = ActivationMeans(torch.zeros(1, 2, D_MODEL).double(), (-1,), 3)
    with pytest.raises(UserError, match="no mean at position -1, layer 2"):
        Affine.between(direction, means)
    wide = Direction(torch.ones(D_MODEL + 1), 2, resid_hook(2, N_LAYERS))
    eraser = fit_eraser(torch.randn(9, D_MODEL + 1), torch.randn(9, D_MODEL + 1))
    for intervention in (Affine(wide, 0.0), Leace(eraser, 2)):
        with pytest.raises(UserError, match="does not fit a model of width"):
            intervention.hooks(tiny_model("llama"))


def test_scopes_are_those_of_other_interventions_and_nothing_stays_on_the_model(tiny_model):
    model, direction = tiny_model("llama"), random_direction(0)
    eraser = fit_eraser(torch.randn(9, D_MODEL) + 2, torch.randn(9, D_MODEL))
    x = torch.randn(2, 6, D_MODEL)
    for made in (Affine(direction, 4.0, positions="prompt"), Leace(eraser, 2, positions="prompt")):
        changed = made.hooks(model, 4)[0][1](x, None)
        assert torch.equal(changed[:, 4:], x[:, 4:]) and not torch.isclose(changed[:, :4], x[:, :4]).all()
    batch = ChatFormat(model.tokenizer).batch(ASKS[:2])
    with torch.no_grad():
        with running(model, []):
            plain = last_logits(model, batch)
        with running(model, all_hooks(model, [Leace(eraser, 2)])):
            assert not torch.allclose(last_logits(model, batch), plain, atol=1e-3)
        with running(model, []):
            assert torch.equal(last_logits(model, batch), plain)
