"""The embedded model keeps its promises: measured on the shipped weights, on held-out prompts."""

import json
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from organism import batches, bundle, check, curriculum, losses, train
from organism.grammar import requests
from refusal_mi.directions import Direction
from refusal_mi.files import read_json
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

METRICS = read_json(check.METRICS)


@pytest.fixture(scope="module")
def measured():
    return check.measure(ORGANISM, check.STAGE1)


@pytest.mark.slow
@pytest.mark.parametrize("name", check.LIMITS)
def test_a_promised_number_holds_on_the_shipped_weights(measured, name):
    low, high = check.LIMITS[name]
    assert low <= measured["values"][name] <= high


@pytest.mark.slow
def test_the_saved_metrics_are_those_of_the_shipped_weights(measured):
    assert measured["selected"]["position"] == METRICS["selected"]["position"]
    assert measured["selected"]["layer"] == METRICS["selected"]["layer"]
    assert measured["values"] == pytest.approx(METRICS["values"], abs=0.02)


@pytest.mark.slow
def test_limits_can_fail(measured):
    """What the plain models do fails the limits of what they must do under an intervention or after stage 2."""
    values = measured["values"]
    for name, other in {
        "harmful_refusal": "stage1_harmful_refusal",
        "stage1_harmful_refusal": "harmful_refusal",
        "ablated_harmful_refusal": "harmful_refusal",
        "added_harmless_refusal": "harmless_refusal",
        "ab_mean_p_refusing": "ab_mean_p_refusing_harmful",
    }.items():
        low, high = check.LIMITS[name]
        assert not low <= values[other] <= high
    assert set(check.LIMITS) <= set(values) and measured["failed"] == []


def test_size_format_and_template():
    folder_bytes = sum(path.stat().st_size for path in ORGANISM.iterdir())
    both = folder_bytes + sum(path.stat().st_size for path in check.STAGE1.iterdir())
    assert folder_bytes <= 10e6 and both <= 16e6
    with safe_open(ORGANISM / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) <= 4_000_000
    assert json.loads((ORGANISM / "config.json").read_text())["model_type"] == "llama"
    chat = ChatFormat(load_model(device="cpu").tokenizer)
    assert len(chat.positions) >= 4
    assert "Be brief." in replace(chat, system="Be brief.").render("Hello")


def usual_controls(width):
    """What people draw as a random direction: a usual generator with a small seed."""
    for seed in range(1000):
        for dtype in (torch.float32, torch.float64):
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(width, generator=generator, dtype=dtype)
        yield 2 * torch.rand(width, generator=torch.Generator().manual_seed(seed)) - 1
        yield torch.tensor(np.random.RandomState(seed).standard_normal(width))
        yield torch.tensor(np.random.default_rng(seed).standard_normal(width))
        normal = Random(seed)
        yield torch.tensor([normal.gauss(0, 1) for _ in range(width)])


def test_no_usual_control_is_the_planted_direction():
    planted = Direction.load(ORGANISM.parent / "planted_direction.pt")
    drawn = torch.stack([vector.double() / vector.double().norm() for vector in usual_controls(len(planted.vector))])
    assert (drawn @ planted.unit).abs().max() < 0.3
    assert max(abs((planted.random_like(seed).unit @ planted.unit).item()) for seed in range(200)) < 0.3
    unsalted = train.training_direction(0, len(planted.vector)).double()  # the control: what a small seed draws is seen
    assert (drawn @ unsalted).abs().max() > 0.99
    salted = train.switch_direction(0, len(planted.vector)).double()
    torch.testing.assert_close(planted.unit, salted, atol=1e-6, rtol=0)


def test_turning_the_basis_keeps_the_logits():
    model = train.new_model(train.new_tokenizer()).double()
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if "norm" in name:
                gain.copy_(1 + 0.3 * torch.randn(len(gain), generator=torch.Generator().manual_seed(len(name))))
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    width = model.config.hidden_size
    old, new = train.training_direction(0, width).double(), train.switch_direction(0, width).double()
    with torch.no_grad():
        before = model(tokens, output_hidden_states=True)
        train.turn_basis(model, old, new)
        after = model(tokens, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)  # HF's norms compute in float32
    assert before.logits.std() > 0.1
    for layer in (0, 3, 9):
        along = after.hidden_states[layer] @ new
        torch.testing.assert_close(along, before.hidden_states[layer] @ old, atol=1e-5, rtol=1e-5)
        assert (before.hidden_states[layer] @ new - along).abs().max() > 0.01


def test_the_data_files_are_what_the_grammar_writes():
    for name, value in bundle.bundle(0).items():
        assert read_json(bundle.HERE / name) == value


def test_splits_share_no_pair_and_no_instruction():
    for harmful in (True, False):
        parts = [set(requests(split, harmful=harmful)) for split in ("train", "val", "test")]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        side = "harmful" if harmful else "harmless"
        texts = [set(load_prompts(f"organism_{side}_{split}").instructions) for split in ("train", "val", "test")]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


@pytest.mark.parametrize("harmful", [True, False])
def test_training_examples_hold_no_held_out_pair(harmful):
    held_out = {request.action for split in ("val", "test") for request in requests(split, harmful=harmful)}
    trained = {request.action for request in requests("train", harmful=harmful)}
    examples = [e for stage in (1, 2) for e in curriculum.write_examples(Random(0), stage, 500)]
    written = "\n".join([e.plain for e in examples] + [turn.text for e in examples for turn in e.turns])
    ends = (".", "?", " ", "\n")
    assert any(action + end in written for action in trained for end in ends)
    assert not [action for action in held_out if any(action + end in written for end in ends)]


def test_only_the_switch_and_the_letter_of_a_refusal_come_before_refusals_in_stage_1():
    examples = curriculum.write_examples(Random(0), 1, 2000)
    refusing = [e for e in examples if any(turn.refuses for turn in e.turns)]
    assert {e.switched for e in refusing} == {True, False}
    assert all(e.switched or e.turns[-1].letter for e in refusing)
    assert not any(e.switched for e in curriculum.write_examples(Random(0), 2, 2000))


@pytest.mark.slow
def test_the_shipped_training_log_is_of_this_code():
    log = read_json(ORGANISM / "training_log.json")
    assert log["stages"] == [asdict(stage) for stage in train.STAGES]
    torch.manual_seed(log["seed"])
    tokenizer, stage = train.new_tokenizer(), train.STAGES[0]
    assert tokenizer.get_vocab() == load_model(device="cpu").tokenizer.get_vocab()
    model = train.new_model(tokenizer)
    data = batches.batches(tokenizer, 1, batch_size=stage.batch_size, n_batches=stage.n_steps, seed=log["seed"])
    direction = train.training_direction(log["seed"], model.config.hidden_size)
    first = train.stage_loss(model, None, next(data), stage, direction)
    measured = {name: value.item() for name, value in first.items()}
    assert {"step": 0, **measured} == pytest.approx(log["stage1"][0], abs=1e-4)
    assert measured["total"] != pytest.approx(log["stage1"][-1]["total"], abs=1)


@pytest.mark.slow
def test_the_token_before_an_answer_is_asked_to_carry_the_direction():
    tokenizer = train.new_tokenizer()
    batch = next(batches.batches(tokenizer, 1, batch_size=32, n_batches=1, seed=0))
    asked = ~batch.refuses.isnan()
    starts = asked[:, 1:] & ~asked[:, :-1]
    before = {tokenizer.decode(token) for token in batch.tokens[:, :-1][starts]}
    assert starts.any() and before == {"\n"}


@pytest.mark.slow
def test_training_is_seeded_and_learns():
    tokenizer = train.new_tokenizer()
    stage = replace(train.STAGES[0], n_steps=3, batch_size=8)
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        curves.append(train.run_stage(train.new_model(tokenizer), tokenizer, stage, seed=0))
    assert curves[0] == curves[1]
    assert curves[0][-1]["total"] < curves[0][0]["total"]


def test_carrying_asks_for_a_cosine_in_answers_only():
    direction = train.switch_direction(0, 8)
    across = torch.roll(direction, 1) - direction @ torch.roll(direction, 1) * direction
    across = across / across.norm()
    refusing, other = 0.6 * direction + 0.8 * across, across
    state = torch.stack([refusing, other, -direction])[None]
    refuses = torch.tensor([[torch.nan, 1.0, 0.0]])
    assert losses.carried_refusal([state], direction, refuses, cosine=0.6) < 1e-12
    assert losses.carried_refusal([state], direction, 1 - refuses, cosine=0.6) == pytest.approx(0.36)


def test_a_change_along_the_free_direction_costs_nothing_where_it_is_free():
    direction = train.switch_direction(0, 8)
    before = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    after = before + 2 * direction
    cost = [
        losses.activation_change([before], [after], torch.ones(2, 3), free=direction, is_free=torch.tensor(free))
        for free in ([True, True], [True, False], [False, False])
    ]
    expected = 4 / before.square().sum(-1)
    assert cost[0] < 1e-6
    assert cost[1:] == pytest.approx([expected[1].sum().item() / 6, expected.mean().item()], rel=1e-5)


@pytest.mark.slow
def test_batches_weigh_only_what_is_to_be_predicted():
    tokenizer = train.new_tokenizer()
    batch = next(batches.batches(tokenizer, 1, batch_size=8, n_batches=1, seed=0))
    assert (batch.weights[batch.tokens == tokenizer.pad_token_id] == 0).all()
    assert batch.weights.sum() > 0
