"""COSMIC: cosines, layers and the rule, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from refusal_mi.directions import difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate, Add
from refusal_mi.reading import mean_activations, template_residuals
from refusal_mi.search.cosmic import CosmicScore, cosmic_cosines, cosmic_scores, evaluation_layers, select_cosmic
from refusal_mi.text.chat import ChatFormat
from tests.helpers.naive import ASKS


def test_the_layers_are_those_where_the_classes_differ_most():
    harmless = torch.tensor([[1.0, 0.0]]).expand(20, 2)
    angles = torch.full((20,), 0.1)
    angles[[3, 17, 8]] = torch.tensor([2.0, 1.0, 0.5])
    harmful = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 21)[:, None]
    assert evaluation_layers(harmful, harmless) == (4, 18)  # after blocks 3 and 17
    assert evaluation_layers(harmful, harmless, 0.15) == (4, 9, 18)
    assert evaluation_layers(harmful[:5], harmless[:5]) == (4,)


def test_the_cosines_are_of_means_over_prompts_and_layers():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    tables = [vector.expand(3, 2, 2).clone() for vector in (a, b, b, a)]
    assert cosmic_cosines(*tables) == pytest.approx((1, 1))
    assert cosmic_cosines(tables[0], tables[1], tables[0], tables[1]) == pytest.approx((0, 0))
    tables[2][:, 0] = a  # half of it: 45 degrees
    assert cosmic_cosines(*tables) == pytest.approx((math.sqrt(0.5), 1))


def rows(peaks=(2, 3), n_layers=10, positions=(-3, -2, -1)):
    """Scores that fall off from a peak: ablation's and addition's layers of the positions before the last."""
    return [
        CosmicScore(p, layer, 1 - 0.01 * abs(layer - peaks[0]), 1 - 0.01 * abs(layer - peaks[1]), 0.05)
        for p in positions
        for layer in range(n_layers)
    ]


def test_the_best_has_the_largest_sum_and_ties_keep_their_order():
    scores = rows()
    scores[17] = replace(scores[17], comply=1.5)
    assert select_cosmic(scores, 10).best is scores[17]
    assert select_cosmic(rows(), 10).best == rows()[2]


def test_each_rule_drops_its_own():
    scores = rows()
    chosen = select_cosmic(scores, 10)
    reasons = {(row.position, row.layer): why for row, why in chosen.rejected}
    assert {place for place, why in reasons.items() if why == ("layer",)} == {(p, i) for p in (-3, -2) for i in (8, 9)}
    # At the last position: beyond both 2 and 3.
    late = "late at the last position"
    assert {layer for (p, layer), why in reasons.items() if p == -1 and late in why} == set(range(4, 10))
    assert (-1, 3) not in reasons
    costly = [replace(row, kl_nats=0.2) if row.layer == 2 else row for row in scores]
    assert select_cosmic(costly, 10).best.layer == 3
    assert select_cosmic(costly, 10, kl_max=None).best.layer == 2
    unmeasured = [replace(row, kl_nats=None) for row in scores]
    with pytest.raises(UserError, match="no candidate survives: all 30 fail by kl"):
        _ = select_cosmic(unmeasured, 10).best
    nothing = [replace(row, comply=None) if row.layer == 2 else row for row in scores]
    assert all(row.layer != 2 for row in select_cosmic(nothing, 10).survivors)


def test_medians_are_the_lower_of_two_and_one_position_knows_no_late_layer():
    scores = [row for row in rows(peaks=(1, 1)) if row.position != -2] + rows(peaks=(6, 1), positions=(-2,))
    kept = {row.layer for row in select_cosmic(scores, 10).survivors if row.position == -1}
    assert kept == {0, 1}
    alone = rows(positions=(-1,))
    assert {row.layer for row in select_cosmic(alone, 10).survivors} == set(range(8))


def test_measured_scores_are_those_of_stored_activations(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    harmful, harmless = ASKS[:4], ASKS[4:8]
    grid = difference_in_means(*(mean_activations(model, chat, side) for side in (harmful, harmless)))
    scores = cosmic_scores(model, chat, grid, harmful, harmless, (3, 5), kl={(-2, 3): 0.04})
    found = {(row.position, row.layer): row for row in scores}
    assert len(found) == len(grid.candidates()) and found[-2, 3].kl_nats == 0.04
    assert found[-1, 0].total is None  # the template's own token

    def mean(side, *interventions):
        table = template_residuals(model, chat, side, layers=(3, 5), n_last=1, interventions=interventions)
        return table.double().mean((0, 1, 2))

    direction = grid.direction(-2, 3)
    cosine = torch.nn.functional.cosine_similarity
    comply = cosine(mean(harmful, Ablate(direction)), mean(harmless), dim=0).item()
    refuse = cosine(mean(harmless, Add(direction)), mean(harmful), dim=0).item()
    assert (found[-2, 3].comply, found[-2, 3].refuse) == pytest.approx((comply, refuse), abs=1e-5)
    assert len({round(row.comply, 6) for row in scores if row.comply is not None}) > 5
