"""Models that mix attention with a recurrence (qwen3_next, qwen3_5) or convolution (lfm2): it writes like any other."""

import pytest
import torch

from benchmarks.families import make
from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.weights import weight_alignment
from refusal_mi.directions import DirectionGrid
from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.model.loading import load_model
from refusal_mi.search.sweep import sweep
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction

pytestmark = pytest.mark.slow
TYPES = ("qwen3_next", "qwen3_5_text", "lfm2")
ASKS = ["Name a color", "What is the capital of France, and why is it so?", "Hi", "Why does the sea look blue to us?"]
ABLATION = Ablate(random_direction(1, width=64))


@pytest.fixture(scope="module", params=TYPES)
def model(request, tmp_path_factory):
    return load_model(make(request.param, tmp_path_factory.mktemp("mixer") / "model"), device="cpu", dtype="float32")


def test_every_block_writes_at_the_same_name(model):
    recurrent = [index for index, block in enumerate(model.blocks) if "attn" not in block._modules]
    assert recurrent and len(recurrent) < model.cfg.n_layers
    assert all(f"blocks.{index}.hook_attn_out" in model.hook_dict for index in range(model.cfg.n_layers))


@pytest.mark.parametrize("interventions", [(), (ABLATION,)], ids=["plain", "ablated"])
def test_answers_in_a_batch_are_those_one_by_one_without_a_cache(model, interventions):
    """Rows end at different times and leave the batch: what the recurrence keeps of the others must stay theirs."""
    chat = ChatFormat(model.tokenizer)
    alone = [
        generate(model, chat, [ask], interventions=interventions, max_new_tokens=10, use_kv_cache=False)[0]
        for ask in ASKS
    ]
    stops = [alone[0].token_ids[1], alone[2].token_ids[4]]
    before = model.original_model.generation_config.eos_token_id
    model.original_model.generation_config.eos_token_id = stops
    try:
        batch = generate(model, chat, ASKS, interventions=interventions, max_new_tokens=10, batch_size=4)
    finally:
        model.original_model.generation_config.eos_token_id = before
    for one, answer in zip(alone, batch, strict=True):
        ends = [index for index, token in enumerate(one.token_ids) if token in stops]
        assert answer.token_ids == one.token_ids[: ends[0] if ends else None]
    assert len({len(answer.token_ids) for answer in batch}) > 1


def test_the_search_gives_what_one_plain_pass_each_gives(model):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, model.cfg.n_layers, 64, generator=generator)
    grid = DirectionGrid(vectors, (-2, -1), ((False,) * model.cfg.n_layers,) * 2)
    chat = ChatFormat(model.tokenizer)
    found, expected = (
        sweep(model, chat, grid, ASKS[:2], ASKS[2:], (40, 41), share_work=share) for share in (True, False)
    )
    values = [torch.tensor([[row.bypass, row.induce, row.kl_nats] for row in each.rows]) for each in (found, expected)]
    assert torch.allclose(*values, rtol=1e-5, atol=1e-6) and values[0].std() > 0.01


def test_what_is_about_heads_is_refused_in_one_line_and_the_rest_runs(model):
    chat, direction = ChatFormat(model.tokenizer), ABLATION.directions
    found = patch_activations(model, chat, ASKS[:2], ASKS[2:], [40], sites=["resid", "attn", "mlp"])
    assert found.patched["attn"].isfinite().all()
    with pytest.raises(UserError, match=r"no blocks\.\d\.attn\.hook_z"):
        patch_activations(model, chat, ASKS[:2], ASKS[2:], [40], sites=["heads"])
    with pytest.raises(UserError, match=r"no blocks\.\d\.attn\.hook_z"):
        attribute_direction(model, chat, direction, {"all": ASKS})
    with pytest.raises(UserError, match=r"block \d of this model has no attention heads"):
        weight_alignment(model, direction)
