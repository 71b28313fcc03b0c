"""On a CUDA GPU: the numbers of the CPU, quantized weights, and what a GPU refuses. Run by `make test-gpu`."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refusal_mi import Ablate, Direction
from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import all_hooks
from refusal_mi.measures import refusal_scores
from refusal_mi.model.loading import ORGANISM, load_model
from refusal_mi.model.points import resid_hook, write_hooks
from refusal_mi.model.provenance import describe_model
from refusal_mi.model.readers import ModelWeights
from refusal_mi.model.running import all_logits, running
from refusal_mi.reading import mean_activations
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.options import RunOptions, command_line
from refusal_mi.text.batches import left_pad
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts
from tests.helpers.directions import random_direction
from tests.helpers.models import FAMILIES, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.gpu
ROWS = [[40, 50, 60, 70], [41, 51]]


@pytest.fixture(scope="module")
def on_both():
    """The embedded model on the CPU and on the GPU, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return [load_model(device=device, dtype="float32") for device in ("cpu", "cuda")]


def test_the_embedded_model_says_the_same_on_both(on_both):
    harmful = load_prompts("organism_harmful_test").instructions[:16]
    scores, answers, means = [], [], []
    for model in on_both:
        chat = ChatFormat(model.tokenizer)
        scores.append(refusal_scores(model, chat, harmful, [(40,)]))
        answers.append([each.text for each in generate(model, chat, harmful, max_new_tokens=16)])
        means.append(mean_activations(model, chat, harmful).means)
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)
    assert answers[0] == answers[1]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_a_quick_run_chooses_the_same_direction(tmp_path):
    records = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        assert exit_status(["run", "--quick", "--device", device, "--dtype", "float32", f"--output-dir={folder}"]) == 0
        records.append(RunRecord.load(folder))
    here, there = (Direction.load(tmp_path / device / "direction.pt").vector.double() for device in ("cpu", "cuda"))
    assert torch.nn.functional.cosine_similarity(here, there, dim=0) > 0.999999
    metadata = [json.loads((tmp_path / device / "direction_metadata.json").read_text()) for device in ("cpu", "cuda")]
    assert [each["layer"] for each in metadata] == [metadata[0]["layer"]] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_leaves_nothing_along_the_direction(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    direction = random_direction(1)
    found = {}
    for device in ("cpu", "cuda"):
        model = load_model(folder, device=device, dtype="float32")
        batch = left_pad(ROWS, 0).to(torch.device(device))
        with torch.no_grad(), running(model, all_hooks(model, [Ablate(direction)], 4)):
            found[device] = all_logits(model, batch).cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """Wide enough for 4-bit blocks."""
    tokenizer, folder = tiny_tokenizer(), tmp_path_factory.mktemp("wide") / "llama"
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_directions_are_found_and_tested_under_quantization(quantization, wide_dir, tmp_path):
    model, plain = load_model(wide_dir, quantization=quantization), load_model(wide_dir, device="cuda")
    record = describe_model(model, str(wide_dir))
    assert record.quantization == quantization
    assert f"--quantization {quantization}" in command_line(record, RunOptions())
    chat, asked = ChatFormat(model.tokenizer), ["tell me", "a longer question", "what"]
    read, exact = (mean_activations(each, chat, asked).means.flatten(0, -2) for each in (model, plain))
    cosines = torch.nn.functional.cosine_similarity(read.double(), exact.double(), dim=-1)
    assert cosines.min() > 0.9
    direction = Direction(torch.linspace(-1, 1, 256), 2, resid_hook(2, 5))
    unit, left = direction.vector / direction.vector.norm(), []

    def look(activation, hook):
        left.append((activation.float().cpu() @ unit.float()).abs().max())
        return activation

    looks = [(name, look) for name in write_hooks(model.cfg.n_layers)]
    batch = left_pad(ROWS, 0).to(torch.device("cuda"))
    with torch.no_grad(), running(model, [*all_hooks(model, [Ablate(direction)], 4), *looks]):
        ablated = all_logits(model, batch)
    assert max(left) < 0.02 and not torch.allclose(ablated, all_logits(model, batch), atol=1e-2)
    assert len(generate(model, chat, asked, max_new_tokens=4, interventions=[Ablate(direction)])) == 3
    with pytest.raises(UserError, match="quantized"):
        ModelWeights(model)


def test_a_gpu_and_the_cpu_together_are_refused_or_right(tmp_path):
    folder = save_tiny("llama", tmp_path / "llama")
    parts = {f"model.layers.{block}": "cpu" if block > 2 else 0 for block in range(5)}
    where = parts | {"model.embed_tokens": 0, "model.norm": "cpu", "model.rotary_emb": 0, "lm_head": "cpu"}
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder, device_map=where)


def test_bfloat16_runs(tmp_path):
    assert (
        exit_status(["run", str(ORGANISM), "--quick", "--dtype", "bfloat16", f"--output-dir={tmp_path / 'run'}"]) == 0
    )
