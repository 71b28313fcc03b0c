"""The stream adds up in every family that is supported, and a model in which something else writes is refused."""

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.model import loading
from refusal_mi.model.families import nearest_type
from refusal_mi.model.loading import load_model
from refusal_mi.model.sums import allowed, check_sums, unexplained
from tests.helpers.models import FAMILIES, N_LAYERS, save_tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_adds_up_to_a_quarter_of_what_is_allowed(family, dtype, tiny_dir):
    if dtype == "float64" and family in ("gpt_oss", "mixtral", "qwen3_moe"):  # torch multiplies no groups in float64
        with pytest.raises(UserError, match=r"cannot load the model in .*: Expected mat_a to be"):
            load_model(tiny_dir(family), device="cpu", dtype=dtype)
        return
    model = load_model(tiny_dir(family), device="cpu", dtype=dtype)
    errors = unexplained(model)
    assert len(errors) == N_LAYERS
    assert max(errors) < allowed(model.cfg.dtype) / 4


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt2"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_writes_elsewhere_is_found_in_its_block(family, where, tiny_dir):
    """A thousandth of the stream, of something that neither attention nor the MLP gave."""
    model = load_model(tiny_dir(family), device="cpu")
    block = model.blocks[3].original_component
    extra = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def write(_, args, output=None):
        stream = args[0] if output is None else output[0] if isinstance(output, tuple) else output
        more = stream + 1e-3 * stream.norm(dim=-1, keepdim=True) / extra.norm() * extra
        rest = args[1:] if output is None else output[1:] if isinstance(output, tuple) else None
        return more if rest is None else (more, *rest)

    handle = block.register_forward_pre_hook(write) if where == "before" else block.register_forward_hook(write)
    errors = unexplained(model)
    assert max(range(N_LAYERS), key=errors.__getitem__) == 3 and 3e-4 < errors[3] < 3e-3
    with pytest.raises(UserError, match=r"tiny \(.*\) is not supported: 0\.00.* after block 3"):
        check_sums(model, "tiny")
    handle.remove()
    check_sums(model, "tiny")


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_block_may_scale_its_stream(scale, tiny_dir):
    model = load_model(tiny_dir("llama"), device="cpu")
    model.blocks[1].original_component.register_forward_hook(lambda *args: args[-1] * scale)
    check_sums(model, "tiny")


def test_it_is_asked_of_every_model_that_is_loaded(tiny_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "check_sums", lambda model, name: asked.append(name))
    load_model(tiny_dir("llama"), device="cpu")
    assert asked == [str(tiny_dir("llama").resolve())]


_BESIDE = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "gemma4_text": {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 275},
}
"""Families with a Mamba branch, and with embeddings of every layer, beside attention and MLP."""


@pytest.mark.parametrize("family", _BESIDE)
def test_families_that_write_elsewhere_are_refused_in_one_line(family, tmp_path, monkeypatch):
    small = {"head_dim": 8, "sliding_window": 64, "mamba_chunk_size": 8, "num_kv_shared_layers": 0}
    monkeypatch.setitem(FAMILIES, family, FAMILIES["llama"] | small | _BESIDE[family])
    with pytest.raises(UserError, match=rf"{family} \({family}\) is not supported: 0\.[0-9]+ of the stream") as caught:
        load_model(save_tiny(family, tmp_path / family), device="cpu")
    assert "cannot load" not in str(caught.value)
    assert str(caught.value).endswith(f"supported: {'falcon' if family == 'falcon_h1' else 'gemma3_text'})")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("qwen3_next", "qwen3"), ("qwen3_5", "qwen3"), ("granitemoehybrid", "granitemoe"), ("deepseek_v4", "deepseek_v3")],
)
def test_a_type_that_is_not_supported_has_a_next_of_kin(asked, nearest):
    assert nearest_type(asked) == f" (the nearest type that is supported: {nearest})"
    assert nearest_type("mamba") == nearest_type("openai-gpt") == nearest_type("") == ""
