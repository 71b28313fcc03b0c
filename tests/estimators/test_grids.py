"""Estimators over positions and layers, what they are given, and their names."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.estimators.linear import lda
from refusal_mi.estimators.named import estimator_named
from refusal_mi.estimators.names import NAMES, parse_name
from refusal_mi.estimators.pools import by_size, category_differences
from refusal_mi.estimators.samples import (
    ActivationSamples,
    EveryPlace,
    SampleEstimator,
    at_one_place,
    needs_prompts,
    sees_prompts,
)
from refusal_mi.reading import mean_activations, sample_activations
from refusal_mi.text.chat import ChatFormat
from tests.helpers.naive import ASKS

EVERY = (*NAMES, "kmeans-1", "kmeans-4", "peel-1", "peel-2")
POSITIONS = (-2, -1)


def samples(n=20, *, seed=0, gap=3.0, generator=None):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(n, 2, 3, 8, generator=generator) + 2
    prompts[..., 1] += gap
    prompts[:, 0, 0] = 5.0  # a template token at layer 0: the same in every prompt
    return ActivationSamples(prompts, POSITIONS)


def given(name, harmful, harmless):
    estimator = estimator_named(name)
    return estimator(*((harmful, harmless) if needs_prompts(estimator) else (harmful.means, harmless.means)))


@pytest.mark.parametrize("name", EVERY)
def test_every_name_finds_the_planted_axis_and_marks_where_there_is_none(name):
    harmful, harmless = samples(60), samples(60, seed=1, gap=0.0)
    grid = given(name, harmful, harmless)
    assert grid.positions == POSITIONS and grid.is_degenerate[0][0] and not grid.vectors[0, 0].any()
    if name == "peel-2":  # the first took the axis
        return
    for position, layer in grid.candidates()[1:]:
        assert grid.direction(position, layer).unit[1] > 0.6, (name, position, layer)
    difference = difference_in_means(harmful.means, harmless.means).vectors
    lengths = (grid.vectors * difference).sum(-1)
    torch.testing.assert_close(lengths, grid.vectors.square().sum(-1))  # (v̂·δ)v̂


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_prompts_does_not_matter_and_the_class_does(name):
    harmful, harmless = samples(60), samples(60, seed=1, gap=0.0)
    turned = harmful.take(range(59, -1, -1)), harmless.take(range(59, -1, -1))
    grid = given(name, harmful, harmless)
    if not name.startswith("kmeans"):  # starts are drawn by row
        torch.testing.assert_close(given(name, *turned).vectors, grid.vectors, rtol=1e-3, atol=1e-3)
    assert (given(name, harmless, harmful).vectors[:, 1:] - grid.vectors[:, 1:]).abs().max() > 1e-3


def test_a_grid_is_its_places_one_by_one():
    harmful, harmless = samples(), samples(seed=1, gap=0.0)
    grid = EveryPlace(lda, "lda", {"shrinkage": "Ledoit-Wolf"})(harmful, harmless)
    assert isinstance(EveryPlace(lda, "lda"), SampleEstimator)
    one = at_one_place(lda, harmful.at(-1, 2), harmless.at(-1, 2))
    assert torch.equal(grid.vectors[1, 2], one)
    assert grid.provenance == {"method": "lda", "shrinkage": "Ledoit-Wolf", "n_harmful": 20, "n_harmless": 20}
    with pytest.raises(UserError, match="different positions or layers"):
        EveryPlace(lda, "lda")(harmful, ActivationSamples(harmless.prompts, (-3, -2)))


def test_what_is_read_of_every_prompt_averages_to_the_means(tiny_model):
    model = tiny_model("gpt2")
    chat = ChatFormat(model.tokenizer)
    read, means = sample_activations(model, chat, ASKS[:5], batch_size=2), mean_activations(model, chat, ASKS[:5])
    assert read.n_prompts == 5 and read.n_layers == model.cfg.n_layers
    torch.testing.assert_close(read.means.means, means.means, rtol=1e-5, atol=1e-6)
    alone = sample_activations(model, chat, ASKS[3:4])
    torch.testing.assert_close(read.take([3]).prompts, alone.prompts, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(read.take([2]).prompts, alone.prompts, atol=1e-3)


def test_samples_need_prompts_and_one_row_a_position():
    for shape in ((0, 2, 3, 8), (4, 3, 3, 8)):
        with pytest.raises(UserError, match="expected"):
            ActivationSamples(torch.zeros(shape), POSITIONS)


def test_a_mark_tells_the_two_kinds_apart():
    @sees_prompts
    def mine(harmful, harmless):
        return None

    assert needs_prompts(mine) and needs_prompts(estimator_named("lda"))
    assert not needs_prompts(difference_in_means) and not needs_prompts(estimator_named("projected"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("meidan", "median"),
        ("LDA", "lda"),
        ("winsorized", "winsorised"),
        ("peel-0", "peel-"),
        ("kmeans-5", "kmeans-"),
        ("peel", "peel-"),
    ],
)
def test_a_name_that_is_none_is_told_what_was_meant(name, near):
    with pytest.raises(UserError, match=rf"no estimator is called '{name}' \(did you mean {near}"):
        parse_name(name)
    assert parse_name("peel-2") == ("peel", 2) and parse_name("mean") == ("mean", 0)


def test_a_category_is_the_mean_of_its_prompts_alone():
    harmful, harmless = samples(12), samples(seed=1, gap=0.0)
    harmful = replace(harmful, categories=("Physical harm", "drugs", None) * 4)
    rows = [0, 3, 6, 9]
    apart = harmful.prompts.clone()
    apart[rows, ..., 3] += 6  # what this category has of its own
    harmful = replace(harmful, prompts=apart)
    grid = estimator_named("category-physical-harm")(harmful, harmless)
    difference = harmful.at(-1, 2)[rows].mean(0) - harmless.at(-1, 2).mean(0)
    torch.testing.assert_close(grid.direction(-1, 2).unit, difference / difference.norm())
    other = estimator_named("category-drugs")(harmful, harmless)
    assert grid.direction(-1, 2).unit[3] > 0.5 > other.direction(-1, 2).unit[3].abs()
    assert torch.equal(estimator_named("category-Physical harm")(harmful, harmless).vectors, grid.vectors)
    assert harmful.take([1, 0]).categories == ("drugs", "Physical harm")
    with pytest.raises(UserError, match="of the category 'durgs': did you mean 'drugs'"):
        estimator_named("category-durgs")(harmful, harmless)
    with pytest.raises(UserError, match="these prompts have no categories"):
        estimator_named("category-drugs")(samples(), harmless)
    with pytest.raises(UserError, match="3 categories were given for 20 prompts"):
        replace(samples(), categories=("a", "b", "c"))


def test_the_largest_categories_come_first_and_are_weighted_to_the_difference_of_means():
    harmful, harmless = samples(10).at(-1, 2), samples(10, seed=1, gap=0.0).at(-1, 2)
    categories = [*"bbbaaaccca"]
    found = category_differences(harmful, harmless, categories, 3)
    assert list(by_size(categories)) == ["a", "b", "c"], "the largest, then by name"
    weighted = (found * torch.tensor([4.0, 3, 3])[:, None]).sum(0) / 10
    torch.testing.assert_close(weighted, harmful.mean(0) - harmless.mean(0))
    assert torch.equal(category_differences(harmful, harmless, categories, 2), found[:2])
    with pytest.raises(UserError, match="4 categories were asked for, and the harmful prompts have 3"):
        category_differences(harmful, harmless, [*"bbbaaaccc", None], 4)


def test_the_default_is_the_difference_of_means_itself():
    assert estimator_named("mean") is difference_in_means


def test_the_page_names_them_all():
    page = (Path(__file__).parents[2] / "docs/estimators.md").read_text("utf-8")
    assert (
        all(f"| `{name}`" in page for name in (*NAMES, "kmeans-1", "peel-1", "category-NAME"))
        and "| `nothing`" not in page
    )
