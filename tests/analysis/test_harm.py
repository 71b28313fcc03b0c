"""Harm and refusal apart: belief scores from the formula, at two different positions."""

import pytest
import torch

from refusal_mi.analysis.harm import separate_harm
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.errors import UserError
from refusal_mi.interventions import Ablate
from refusal_mi.measures import next_token_logits, refusal_score
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES, PROMPTS, cached
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

HARMFUL, HARMLESS = ["Burn", "Break this", "Take it all"], ["Sing a song", "Paint", "Walk far"]
REFUSED = (True, False, True, False, False, True)
TOKENS = [5, 6, 7]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b) / (a.norm() * b.norm())


def streams(model, chat: ChatFormat, prompt: str, position: int) -> list[torch.Tensor]:
    cache = cached(model, chat, prompt)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, 5)] + ["blocks.4.hook_resid_post"]
    return [cache[name][0, position].double() for name in names]


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_belief_scores_follow_the_formula(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat = ChatFormat(model.tokenizer)
    both = [
        separate_harm(model, chat, HARMFUL, HARMLESS, {"a": PROMPTS}, TOKENS, refused=REFUSED, batch_size=size)
        for size in (16, 1)
    ]
    result = both[0]
    torch.testing.assert_close(both[1].deltas["a"], result.deltas["a"], atol=5e-6, rtol=0)
    training = [*HARMFUL, *HARMLESS]
    flags = {-6: [True] * 3 + [False] * 3, -1: list(REFUSED)}
    for column, (position, first) in enumerate(flags.items()):
        rows = [streams(model, chat, prompt, position) for prompt in training]
        expected = []
        for layer, x in enumerate(streams(model, chat, PROMPTS[1], position)):
            a = sum(row[layer] for row, flag in zip(rows, first, strict=True) if flag) / 3
            b = sum(row[layer] for row, flag in zip(rows, first, strict=True) if not flag) / 3
            expected.append(cosine(x, a) - cosine(x, b))
            vectors = result.harm_vectors if position == -6 else result.refusal_vectors
            torch.testing.assert_close(vectors[layer], a - b, atol=1e-5, rtol=0)
        assert abs(sum(expected) / 5 - result.deltas["a"][1, column]) < 1e-5
    assert abs(cosine(result.harm_vectors[2], result.refusal_vectors[2]) - result.cosines[2]) < 1e-12
    assert (result.deltas["a"][:, 0] - result.deltas["a"][:, 1]).abs().max() > 1e-3  # two different judgements


def test_groups_can_be_read_under_interventions(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    result = separate_harm(
        model,
        chat,
        HARMFUL,
        HARMLESS,
        {"plain": PROMPTS, "ablated": PROMPTS},
        TOKENS,
        refused=REFUSED,
        interventions={"ablated": [Ablate(direction)]},
    )
    expected = refusal_score(next_token_logits(model, chat, PROMPTS, interventions=[Ablate(direction)]), TOKENS)
    torch.testing.assert_close(result.scores["ablated"], expected)
    assert (result.deltas["plain"] - result.deltas["ablated"]).abs().max() > 1e-3
    assert sum(result.quadrants("plain").values()) == len(PROMPTS)
    harmful_refused = sum(int(row[0] > 0 and row[1] > 0) for row in result.deltas["plain"])
    assert result.quadrants("plain")["harmful, refused"] == harmful_refused
    result.save(tmp_path / "harm.json")
    figure = figures(load_result(tmp_path / "harm.json"))["harm"]
    assert list(figure.data[0].x) == pytest.approx(result.deltas["plain"][:, 0].tolist())


def test_refused_is_the_sign_of_the_score_and_both_kinds_are_needed(tiny_model) -> None:
    model = tiny_model("llama")
    chat = ChatFormat(model.tokenizer)
    everything = list(range(model.cfg.d_vocab))
    with pytest.raises(UserError, match="6 count as refused"):
        separate_harm(model, chat, HARMFUL, HARMLESS, {"a": PROMPTS}, everything)
