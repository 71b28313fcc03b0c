"""Direction files for llama.cpp and lm-evaluation-harness, read back the way those tools read them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from refusal_mi.errors import UserError
from refusal_mi.export.formats import write_gguf, write_lm_eval
from refusal_mi.interventions import Ablate, Add
from tests.helpers.directions import random_direction
from tests.helpers.exports import hooked_logits, plain_logits, read_gguf, some_tokens
from tests.helpers.tiers import first_is_fast

R = random_direction(1)


def test_a_control_vector_comes_back_at_its_layer(tmp_path, tiny_dir):
    gguf = pytest.importorskip("gguf")
    config = AutoConfig.from_pretrained(tiny_dir("qwen3_moe"))
    write_gguf(tmp_path / "r.gguf", Add(R, -2.0, layer=3), config)
    reader = gguf.GGUFReader(tmp_path / "r.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["direction.2"]
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen3moe"
    assert list(read_gguf(tmp_path / "r.gguf")) == [3]
    torch.testing.assert_close(read_gguf(tmp_path / "r.gguf")[3], -2.0 * R.vector)


@pytest.mark.parametrize("layer", (0, 1, 6))
def test_layers_that_llama_cpp_cannot_steer_are_refused(layer, tmp_path, tiny_dir):
    pytest.importorskip("gguf")
    config = AutoConfig.from_pretrained(tiny_dir("qwen3_moe"))
    with pytest.raises(UserError, match=f"layer {layer} has no control vector"):
        write_gguf(tmp_path / "r.gguf", Add(R, layer=layer), config)
    assert not (tmp_path / "r.gguf").exists()


def steered_logits(directory, path):
    """What the harness does with a steering file: one forward hook per module of the base model."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    entries = torch.load(path, weights_only=True)
    modules = dict(model.base_model.named_modules())

    def hook_for(entry):
        vector = entry["steering_vector"]

        def steer(acts):
            if entry["action"] == "add":
                return acts + entry["steering_coefficient"] * vector
            unit = vector / torch.norm(vector)
            along = torch.sum(acts * unit, dim=-1, keepdim=True)
            return acts - along * unit + unit * entry["steering_coefficient"]

        def hook(module, inputs, output):
            return (steer(output[0]), *output[1:]) if isinstance(output, tuple) else steer(output)

        return hook

    for name, entry in entries.items():
        assert entry["bias"] is None
        modules[name].register_forward_hook(hook_for(entry))
    with torch.no_grad():
        return model(some_tokens().tokens).logits.flatten(0, 1)


@pytest.mark.parametrize("family", first_is_fast(("qwen2", "gemma2", "granite", "gpt2", "gpt_oss", "falcon")))
def test_a_steering_file_gives_the_hooked_logits(family, tmp_path, tiny_dir):
    source = tiny_dir(family)
    config = AutoConfig.from_pretrained(source)
    for what in (Ablate(R), Ablate(R, layers=range(1, 3)), Add(R, 0.5)):
        write_lm_eval(tmp_path / "steer.pt", what, config)
        hooked = hooked_logits(source, [what])
        assert (hooked - plain_logits(source)).abs().max() > 0.02
        assert (steered_logits(source, tmp_path / "steer.pt") - hooked).abs().max() <= 2e-5


def test_what_the_harness_has_no_form_for_is_refused(tmp_path, tiny_dir):
    config = AutoConfig.from_pretrained(tiny_dir("qwen2"))
    refused = {
        "one direction": Ablate([R, random_direction(2)]),
        "whole": Ablate(R, strength=0.5),
        "layer 0": Add(R, layer=0),
        "all positions": Ablate(R, positions="prompt"),
    }
    for message, what in refused.items():
        with pytest.raises(UserError, match=message):
            write_lm_eval(tmp_path / "steer.pt", what, config)
    with pytest.raises(UserError, match="steering file that ends"):
        write_lm_eval(tmp_path / "steer.bin", Ablate(R), config)
