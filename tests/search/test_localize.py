"""Removals of a direction from some writes: scored many to a pass as one by one, and searched for the cheapest."""

from types import SimpleNamespace

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.measures import kl_nats, next_token_logits, refusal_scores
from refusal_mi.model.points import write_hooks
from refusal_mi.model.running import all_logits, running
from refusal_mi.search.localize import (
    FIRST_PROMPTS,
    Localized,
    Measured,
    first_removals,
    localize_removal,
    map_writes,
    neighbours,
)
from refusal_mi.search.removals import COMPONENTS, Removal, RemovalScorer, complement
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.models import N_LAYERS
from tests.helpers.naive import ASKS

HARMFUL, HARMLESS = ASKS[:3], ASKS[1:]
DIRECTION = random_direction(1)
REMOVALS = (
    Removal(DIRECTION, 0, N_LAYERS),
    Removal(DIRECTION, 1, 3, ("attn",), 0.5),
    Removal(random_direction(2), 0, 2, ("embed", "mlp"), 1.2),
    Removal(random_direction(3), 0, 5, ("attn", "mlp"), 0.8, "peak", 0.2),
)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_many_removals_to_a_pass_are_each_what_its_hooks_give(tiny_model, family, batch_size):
    model = tiny_model(family)
    chat, tokens = ChatFormat(model.tokenizer), [(5, 7), (5, 9), (40,)]
    scorer = RemovalScorer(model, chat, HARMFUL, HARMLESS, tokens, batch_size=batch_size)
    directions, weights = [each.direction for each in REMOVALS], [each.weights(N_LAYERS) for each in REMOVALS]
    scores = scorer.score(directions, weights, range(len(HARMFUL)))
    kl = scorer.kl(directions, weights, [2, 0])
    plain = next_token_logits(model, chat, HARMLESS)
    for removal, score, cost in zip(REMOVALS, scores, kl, strict=True):
        expected = refusal_scores(model, chat, HARMFUL, tokens, interventions=removal.interventions)
        assert torch.allclose(score, expected.double(), atol=1e-4)
        changed = next_token_logits(model, chat, HARMLESS, interventions=removal.interventions)
        assert torch.allclose(cost, kl_nats(plain, changed)[[2, 0]], atol=1e-5)
    assert len({round(each.item(), 3) for each in scores[:, 0]}) == len(REMOVALS), "the control: they differ"
    assert (kl > 1e-4).all() and scorer.kl([DIRECTION], [{}], [0]).item() < 1e-12


def test_kl_over_several_tokens_is_the_mean_along_the_plain_answer(tiny_model):
    model = tiny_model("llama")
    chat, removal, n = ChatFormat(model.tokenizer), REMOVALS[0], 4
    answers = [each.token_ids for each in generate(model, chat, HARMLESS, max_new_tokens=n)]
    answers[1] = answers[1][:1]  # a short one
    scorer = RemovalScorer(model, chat, HARMFUL, HARMLESS, [5], answers=answers, n_kl=n)
    found = scorer.kl([removal.direction], [removal.weights(N_LAYERS)], range(len(HARMLESS)))[0]
    hooks = [hook for each in removal.interventions for hook in each.hooks(model)]
    for index, (ask, answer) in enumerate(zip(HARMLESS, answers, strict=True)):
        row = chat.encode(ask)
        batch, first = left_pad([[*row, *answer[: n - 1]]], 0), len(row) - 1
        with torch.no_grad(), running(model):
            plain = all_logits(model, batch)[0, first:]
        with torch.no_grad(), running(model, hooks):
            changed = all_logits(model, batch)[0, first:]
        assert len(plain) == 1 + min(n - 1, len(answer))
        assert found[index].item() == pytest.approx(kl_nats(plain, changed).mean().item(), abs=1e-5)
    with pytest.raises(UserError, match="needs the plain answer"):
        RemovalScorer(model, chat, HARMFUL, HARMLESS, [5], n_kl=n)


def test_a_removal_and_its_complement_are_all_writes():
    for removal in REMOVALS:
        touched, rest = removal.weights(N_LAYERS), complement(removal, N_LAYERS)
        assert sorted([*touched, *rest]) == sorted(write_hooks(N_LAYERS)) and not set(touched) & set(rest)
    assert complement(REMOVALS[0], N_LAYERS) == {}


def test_the_kernel_of_a_peak():
    removal = Removal(DIRECTION, 1, 5, ("mlp",), 1.0, "peak", 0.2)
    assert removal.strengths() == pytest.approx({1: 0.4, 2: 0.8, 3: 0.8, 4: 0.4})  # p = 2.5, d = 2
    assert [each.strength for each in removal.interventions] == list(removal.strengths().values())
    flat = Removal(DIRECTION, 1, 5, ("mlp",), 0.7)
    (ablation,) = flat.interventions
    assert ablation == Ablate(DIRECTION, 0.7, range(1, 5), ("mlp",)) and set(flat.strengths().values()) == {0.7}


def test_the_first_removals_and_their_neighbours_change_something(tiny_model):
    directions = [DIRECTION, random_direction(2)]
    first = first_removals(directions, N_LAYERS)
    every = [*first, *(near for each in first for near in neighbours(each, directions, N_LAYERS))]
    for removal in every:
        assert removal.weights(N_LAYERS) and set(removal.components) <= set(COMPONENTS)
        assert "embed" not in removal.components or removal.first == 0
    assert all(
        len({tuple(each.weights(N_LAYERS)) for each in first if each.direction is one}) > 20 for one in directions
    )


class Planted(RemovalScorer):
    """Scores as if refusal were written by some blocks and cost by others: what the best removal is, is known."""

    def __init__(self):
        self.n_harmful = self.n_harmless = 32
        self.model = SimpleNamespace(cfg=SimpleNamespace(n_layers=N_LAYERS))

    def score(self, directions, weights, harmful):
        needed = [f"blocks.{block}.hook_mlp_out" for block in (2, 3)]
        removed = torch.tensor([[sum(min(1.0, each.get(name, 0)) for name in needed)] for each in weights])
        return 4 - 4 * removed.double() + torch.linspace(-0.5, 0.5, len(harmful)).double()

    def kl(self, directions, weights, harmless):
        cost = torch.tensor([[sum(each.values()) ** 2 / 100] for each in weights]).double()
        return cost.expand(len(weights), len(harmless))


def test_the_search_finds_what_is_known_to_be_least():
    found = localize_removal(Planted(), [DIRECTION], n_generations=8)
    best = found.measured[0].removal
    assert (best.first, best.last, best.components) == (2, 4, ("mlp",)) and 0.5 < best.strength <= 1
    assert found.measured[0].mean_kl < 0.1 * found.whole.mean_kl and found.n_tried > 50
    again = localize_removal(Planted(), [DIRECTION], n_generations=8)
    assert [each.removal.label for each in again.measured] == [each.removal.label for each in found.measured]
    with pytest.raises(UserError, match="at least one direction"):
        localize_removal(Planted(), [])


def test_scores_just_below_the_zero_point_count_as_risks():
    far, near = torch.linspace(-9, -7, 32).double(), torch.linspace(-2.2, -0.05, 32).double()
    at = {
        name: Measured(REMOVALS[0], scores, torch.zeros(4).double()) for name, scores in (("far", far), ("near", near))
    }
    assert at["far"].n_refused(0.0) == at["near"].n_refused(0.0) == 0, "by counting they are the same"
    assert at["far"].refused(0.0) < 1e-6 < 0.02 < at["near"].refused(0.0) < 0.1


def test_nothing_on_the_front_is_beaten():
    rows = [(0.0, 0.5), (-1.0, 0.2), (-9.0, 0.4), (-9.0, 0.3), (2.0, 0.1), (2.0, 0.05)]
    spread = torch.linspace(-0.1, 0.1, 8).double()
    made = [Measured(REMOVALS[0], score + spread, torch.full((3,), kl).double()) for score, kl in rows]
    front = Localized(made[0], tuple(made[1:]), 0.0, 6).front
    assert [each.mean_kl for each in front] == pytest.approx([0.05, 0.2, 0.3][: len(front)])


def test_one_write_at_a_time(tiny_model):
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    asked = [*HARMFUL * 6, ASKS[3]]  # more than are read
    plain, scores, kl = map_writes(RemovalScorer(model, chat, asked, HARMLESS, [5]), DIRECTION)
    read = refusal_scores(model, chat, asked[: 2 * FIRST_PROMPTS], [5]).double()
    assert plain == pytest.approx(read.mean().item(), abs=1e-5), "of the same prompts as the others"
    last = refusal_scores(model, chat, asked, [5]).double().mean().item()
    assert abs(last - plain) > 1e-4, "the control: more prompts have another mean"
    name = write_hooks(N_LAYERS)[3]
    (hook,) = [hook for hook in Ablate(DIRECTION).hooks(model) if hook[0] == name]
    with torch.no_grad(), running(model, [hook]):
        logits = torch.stack([all_logits(model, left_pad([chat.encode(ask)], 0))[0, -1] for ask in HARMLESS])
    assert kl[3].item() == pytest.approx(
        kl_nats(next_token_logits(model, chat, HARMLESS), logits).mean().item(), abs=1e-5
    )
    assert len(scores) == len(kl) == 2 * N_LAYERS + 1
