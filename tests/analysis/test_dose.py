"""Dose and response: every point is the model under that intervention."""

import statistics
from dataclasses import replace

import pytest
import torch

from refusal_mi.analysis.dose import dose_response
from refusal_mi.analysis.result import figures, load_result
from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add
from refusal_mi.judges.substring import is_degenerate, is_refusal
from refusal_mi.measures import ce_loss, next_token_logits, refusal_score, texts_to_score
from refusal_mi.stats import Rate
from refusal_mi.text.chat import ChatFormat
from tests.helpers.cases import FAMILIES
from tests.helpers.directions import random_direction
from tests.helpers.tiers import first_is_fast

HARMFUL, HARMLESS, TOKENS = ["Why?", "Tell me how a kite flies"], ["Go on", "Say it", "Name a color"], [5, 6, 7]


def score_by_hand(model, chat: ChatFormat, intervention, prompt: str) -> float:
    with model.hooks(fwd_hooks=intervention.hooks(model)), torch.no_grad():
        logits = model(torch.tensor([chat.encode(prompt)]))[:, -1]
    return refusal_score(logits, TOKENS).item()


@pytest.mark.parametrize("family", first_is_fast(FAMILIES))
def test_points_are_the_model_under_that_amount(tiny_model, family: str) -> None:
    model = tiny_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    results = [
        dose_response(
            model,
            chat,
            direction,
            HARMFUL,
            HARMLESS,
            TOKENS,
            coefficients=(0.0, 2.0),
            strengths=(0.0, 0.5),
            n_random=1,
            max_new_tokens=None,
            batch_size=size,
        )
        for size in (16, 1)
    ]
    result = results[0]
    for curve in result.scores:
        torch.testing.assert_close(results[1].scores[curve], result.scores[curve], atol=5e-6, rtol=0)
        assert (result.kl[curve][:, 0] == 0).all()  # amount 0 is the plain model, bit for bit
        assert (result.scores[curve][0, 0] == result.scores[curve][1, 0]).all()
        assert (result.scores[curve][:, 1] - result.scores[curve][:, 0]).abs().max() > 1e-3
        assert result.refused[curve].isnan().all() and result.band("refused", curve) == [None, None]
    control = direction.random_like(0)
    assert control.norm == pytest.approx(direction.norm)
    by_hand = {
        ("add/harmless", 0, 2): score_by_hand(model, chat, Add(direction, 2.0), HARMLESS[2]),
        ("add/harmless", 1, 0): score_by_hand(model, chat, Add(control, 2.0), HARMLESS[0]),
        ("ablate/harmful", 0, 1): score_by_hand(model, chat, Ablate(direction, 0.5), HARMFUL[1]),
    }
    for (curve, index, prompt), expected in by_hand.items():
        assert abs(result.scores[curve][index, 1, prompt].item() - expected) < 1e-5


@pytest.mark.slow
def test_rates_losses_and_bands(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    texts = texts_to_score(chat, ["Some plain words.", "And more of them."])

    class Long:
        name = "long"

        def complied(self, prompts, responses) -> list[bool]:
            return [len(response) > 4 for response in responses]

    result = dose_response(
        model,
        chat,
        direction,
        HARMFUL,
        HARMLESS,
        TOKENS,
        coefficients=(-1.0, 0.0, 3.0),
        strengths=(1.0,),
        texts=texts,
        n_random=1,
        max_new_tokens=6,
        judge=Long(),
    )
    answers = generate(model, chat, HARMLESS, interventions=[Add(direction, 3.0)], max_new_tokens=6)
    refused = [len(answer.text) <= 4 for answer in answers]
    assert result.refused["add/harmless"][0, 2].bool().tolist() == refused
    assert result.degenerate["add/harmless"][0, 2].bool().tolist() == [is_degenerate(answer.text) for answer in answers]
    expected = Rate.of(refused)
    assert result.band("refused", "add/harmless")[2] == (expected.value, *expected.interval)
    assert not any(map(is_refusal, (answer.text for answer in answers)))
    loss = ce_loss(model, chat, texts, interventions=[Ablate(direction)]).ce_loss
    assert result.ce_loss["ablate"][0, 0].item() == pytest.approx(loss)
    assert result.ce_loss["add"][0, 1] == result.ce_loss["add"][1, 1] != result.ce_loss["add"][0, 2]
    mean, low, high = result.band("score", "add/harmful")[0]
    assert low < mean < high and mean == pytest.approx(result.scores["add/harmful"][0, 0].mean().item())
    means = result.scores["add/harmful"][0].mean(-1)
    assert (result.monotonicity("add/harmful") == 1) == bool((means.diff() > 0).all())
    result.save(tmp_path / "dose.json")
    figure = figures(load_result(tmp_path / "dose.json"))["dose"]
    assert {trace.name for trace in figure.data if trace.showlegend} >= {"harmful prompts (n = 2)"}


@pytest.mark.slow
def test_the_control_is_a_band_over_random_directions(tiny_model) -> None:
    model = tiny_model("llama")
    chat, direction = ChatFormat(model.tokenizer), random_direction()
    texts = texts_to_score(chat, ["Some plain words."])
    settings = {"coefficients": (-2.0, 0.0, 2.0), "strengths": (0.0, 1.0), "max_new_tokens": 2, "texts": texts}
    result = dose_response(
        model, chat, direction, HARMFUL, HARMLESS, TOKENS, n_random=3, n_random_answered=1, **settings
    )
    assert result.n_random == 3
    alone = [
        refusal_score(next_token_logits(model, chat, HARMFUL, interventions=[Add(one, 2.0)]), TOKENS).mean().item()
        for one in (direction, *map(direction.random_like, range(3)))
    ]
    mean, low, high = result.control_band("score", "add/harmful")[2]
    assert (mean, low, high) == pytest.approx((statistics.mean(alone[1:]), min(alone[1:]), max(alone[1:])), abs=1e-5)
    z = result.z("add/harmful")
    assert z[1] is None
    assert z[2] == pytest.approx((alone[0] - statistics.mean(alone[1:])) / statistics.stdev(alone[1:]), rel=1e-3)
    ends = result.scores["add/harmful"].mean(-1)
    assert result.steering("harmful", 2) == pytest.approx((ends[2, 2] - ends[2, 0]).item() / 2)
    read = ~result.refused["add/harmless"][:, 2].isnan().any(-1)
    assert read.tolist() == [True, True, False, False] and (~result.ce_loss["add"][:, 2].isnan()).equal(read)
    few = dose_response(model, chat, direction, HARMFUL, HARMLESS, TOKENS, n_random=2, **settings | {"texts": ()})
    assert few.z("add/harmful") == [None] * 3
    with pytest.raises(UserError, match="its negative"):
        replace(few, coefficients=(-1.0, 0.0, 2.0)).steering("harmful")
    assert "z = " in figures(result)["dose"].layout.title.subtitle.text


@pytest.mark.parametrize("family", first_is_fast(["llama", "gpt2"]))
def test_a_dose_is_also_a_share_of_the_stream_on_plain_text(family: str, tiny_model, plain_model, tmp_path) -> None:
    model, hf = tiny_model(family), plain_model(family)
    chat, direction = ChatFormat(model.tokenizer), random_direction(layer=3)
    texts = texts_to_score(chat, ["Some plain words.", "And more of them, as long as it takes.", "x y"])
    settings = {"coefficients": (-2.0, 0.0, 1.0), "strengths": (1.0,), "n_random": 1, "max_new_tokens": None}
    result = dose_response(model, chat, direction, HARMFUL, HARMLESS, TOKENS, texts=texts, batch_size=8, **settings)
    norms = []
    for text in texts:
        with torch.no_grad():
            states = hf(torch.tensor([text.token_ids]), output_hidden_states=True).hidden_states
        norms += states[3][0, 1:].double().norm(dim=-1).tolist()
    assert result.stream_norm == pytest.approx(statistics.mean(norms), rel=1e-5)
    share = direction.norm / statistics.mean(norms)
    assert result.shares("add/harmful") == pytest.approx([2 * share, 0, share], rel=1e-5)
    assert result.shares("ablate/harmful") == [None]
    table = result.to_frame()
    assert list(table.columns) == ["of", "direction", "amount", "share", "prompt", "scores"]
    row = table.query("of == 'add/harmless' and direction == 1 and amount == -2 and prompt == 2").iloc[0]
    assert row.scores == result.scores["add/harmless"][1, 0, 2] and row.share == pytest.approx(2 * share)
    assert table[table.of == "ablate/harmful"].share.isna().all()
    assert list(result.to_frame("ce_loss").columns) == ["of", "direction", "amount", "share", "ce_loss"]

    def ticks(drawn) -> list[str]:
        return [text for axis in figures(drawn)["dose"].select_xaxes() for text in axis.ticktext or ()]

    assert ticks(result) == [f"−2<br>{2 * share:.2f}", "0<br>0.00", f"1<br>{share:.2f}"]
    without = replace(result, stream_norm=None)
    without.save(tmp_path / "dose.json")
    assert load_result(tmp_path / "dose.json").shares("add") == [None] * 3
    assert ticks(without) == []


def test_both_sides_are_needed(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="both sides"):
        dose_response(model, ChatFormat(model.tokenizer), random_direction(), HARMFUL, [], TOKENS)
