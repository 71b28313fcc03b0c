"""Cones: what a mixture is, what is averaged, and that all directions of one are lower than random ones."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.estimators.cones import Cone, fit_cone, mixtures
from refusal_mi.estimators.descent import orthonormal
from refusal_mi.estimators.rdo import RDOOptions, fit_rdo, rdo_terms
from refusal_mi.interventions import Ablate
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import direction_of, random_direction
from tests.helpers.rdo import made_up_texts

START = random_direction(1)
OPTIONS = RDOOptions(n_steps=6, learning_rate=0.05, retention=0.1)


@pytest.fixture(scope="module")
def given(tiny_model):
    model = tiny_model("llama")
    return model, ChatFormat(model.tokenizer), made_up_texts(model.tokenizer)


def cone_of(n):
    rows = orthonormal(torch.stack([random_direction(seed).vector for seed in range(n)]))
    return Cone(tuple(direction_of((row * 5).float()) for row in rows))


def test_mixtures_lie_evenly_in_the_nonnegative_part_of_the_sphere():
    weights = mixtures(3, 20_000, 0)
    assert weights.min() >= 0 and torch.allclose(weights.norm(dim=-1), torch.ones(20_000).double())
    # a coordinate of a uniform point of the sphere in three dimensions is uniform in [-1, 1] (Archimedes)
    assert ((weights.mean(0) - 0.5).abs() < 0.01).all() and ((weights.square().mean(0) - 1 / 3).abs() < 0.01).all()
    assert torch.equal(weights[:5], mixtures(3, 20_000, 0)[:5]) and not torch.equal(weights, mixtures(3, 20_000, 1))


def test_a_mixture_is_a_direction_of_the_cone_s_span_and_length():
    cone = cone_of(3)
    mixed = cone.mix([3, 0, 4])
    assert torch.allclose(mixed.unit, (0.6 * cone.basis[0] + 0.8 * cone.basis[2]), atol=1e-6)
    assert mixed.norm == pytest.approx(5) and mixed.layer == cone.directions[0].layer
    drawn = cone.sample(6)
    assert drawn == cone.sample(6, seed=42) != cone.sample(6, seed=1)
    overlaps = torch.stack([each.unit for each in drawn]) @ cone.basis.T
    assert overlaps.min() > 0 and torch.allclose(overlaps.norm(dim=-1), torch.ones(6).double(), atol=1e-6)
    assert Ablate(cone.directions).basis.shape == (3, len(mixed.vector))
    for weights in ([1, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(UserError, match="3 weights, none of them negative"):
            cone.mix(weights)
    with pytest.raises(UserError, match="must be orthogonal"):
        Cone((START, random_direction(2)))
    with pytest.raises(UserError, match="of one layer"):
        Cone((START, replace(cone.directions[1], layer=3, hook_name="blocks.3.hook_resid_pre")))


def rdo_loss(given, direction, options=OPTIONS):
    model, chat, texts = given
    terms = rdo_terms(model, chat, START, texts, options)
    with torch.no_grad():
        return sum(term.weight * term.prepare(term.texts)(direction.unit).item() for term in terms)


def test_the_loss_is_the_mean_over_mixtures_and_the_mean_over_directions(given):
    model, chat, texts = given
    cone = Cone(fit_cone(model, chat, START, texts, replace(OPTIONS, n_steps=1), n_directions=2).directions)
    fit = fit_cone(model, chat, cone, texts, replace(OPTIONS, n_steps=1), n_directions=2, n_samples=3)
    weights = mixtures(2, 3, 0)  # of step 0 and seed 0
    mixed = [rdo_loss(given, cone.mix(row)) for row in weights.tolist()]
    alone = [rdo_loss(given, each) for each in cone.directions]
    assert fit.losses[0, 0].item() == pytest.approx(sum(mixed) / 3 + sum(alone) / 2, rel=1e-4)


def test_a_cone_starts_from_what_it_is_given_and_every_direction_of_it_gets_better(given):
    model, chat, texts = given
    other = random_direction(9)
    fit = fit_cone(model, chat, START, texts, OPTIONS, n_directions=2, n_samples=2, orthogonal_to=[other])
    cone = Cone(fit.directions)
    assert (cone.basis @ other.unit).abs().max() < 1e-6
    random = [rdo_loss(given, START.random_like(seed)) for seed in range(4)]
    assert max(rdo_loss(given, each) for each in (*cone.directions, *cone.sample(4))) < min(random)
    first = fit_cone(model, chat, cone, texts, replace(OPTIONS, n_steps=1), n_directions=3, n_samples=1).directions
    assert torch.allclose(torch.stack([each.unit for each in first[:2]]), cone.basis, atol=1e-6)
    assert abs((first[2].unit @ cone.basis.T).abs().max()) < 1e-6
    with pytest.raises(UserError, match="a cone of 1 directions cannot start from 2"):
        fit_cone(model, chat, cone, texts, OPTIONS, n_directions=1)


def test_a_cone_of_one_direction_is_rdo(given):
    model, chat, texts = given
    options = replace(OPTIONS, n_steps=3)
    alone, one = (
        fit_rdo(model, chat, START, texts, options),
        fit_cone(model, chat, START, texts, options, n_directions=1),
    )
    assert torch.equal(one.losses, alone.losses) and torch.equal(one.direction.vector, alone.direction.vector)


def test_a_cone_goes_on_bit_for_bit(given, tmp_path):
    model, chat, texts = given
    options = replace(OPTIONS, texts_per_step=2, n_steps=4)
    whole = fit_cone(model, chat, START, texts, options, n_directions=2, n_samples=1)
    for n in (2, 4):
        fit = fit_cone(
            model,
            chat,
            START,
            texts,
            replace(options, n_steps=n),
            n_directions=2,
            n_samples=1,
            checkpoint=tmp_path / "c.pt",
        )
    assert fit == whole
    with pytest.raises(UserError, match="another model, other texts"):
        fit_cone(model, chat, START, texts, options, n_directions=2, n_samples=2, checkpoint=tmp_path / "c.pt")
