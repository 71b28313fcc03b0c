"""Models and tokens for the export tests."""

from pathlib import Path
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

from refusal_mi.directions import Direction
from refusal_mi.interventions import Intervention, all_hooks
from refusal_mi.model.loading import load_model
from refusal_mi.model.running import all_logits
from refusal_mi.text.batches import TokenBatch
from tests.helpers.models import D_MODEL, FAMILIES, N_LAYERS, tiny_hf_model, tiny_tokenizer

POST_NORM = ("gemma2", "gemma3_text", "olmo2")
INSIDE_TOWERS = ("qwen2_5_vl_text", "qwen3_vl_text")
"""Types of language models that come inside a model that reads images alone: tests/export/test_towers.py."""
FUSED_EXPERTS = (
    "deepseek_v2",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "qwen2_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "olmoe",
    "deepseek_v3",
    "granitemoe",
)
"""Their kernels refuse float64."""
_LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "pad_token_id": 0} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OTHERS = {
    "qwen2_moe": FAMILIES["qwen2"]
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "smollm3": FAMILIES["qwen2"] | {"pad_token_id": 0},
    "olmo3": FAMILIES["olmo2"] | {"sliding_window": 64},
    "exaone4": FAMILIES["olmo2"] | {"sliding_window": 64},
    **dict.fromkeys(("olmo", "arcee", "stablelm", "phi"), FAMILIES["qwen2"]),
    **dict.fromkeys(("seed_oss", "ernie4_5", "ministral3", "nemotron", "hunyuan_v1_dense"), FAMILIES["qwen3"]),
    **dict.fromkeys(("cohere2", "starcoder2"), FAMILIES["qwen2"] | {"sliding_window": 64}),
    **dict.fromkeys(("glm", "glm4"), FAMILIES["qwen3"] | {"pad_token_id": 0}),
    "apertus": FAMILIES["qwen2"] | {"pad_token_id": 0},
    "olmoe": FAMILIES["qwen2"] | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": FAMILIES["qwen2"]
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    "glm4_moe": FAMILIES["qwen3"]
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0},
    "jais2": FAMILIES["qwen2"],
    "deepseek_v2": FAMILIES["qwen2"]
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 8},
    "vaultgemma": FAMILIES["gemma2"],
    "minimax_m2": FAMILIES["qwen3"] | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": FAMILIES["qwen2"]
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "granitemoe": FAMILIES["granite"] | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_text": FAMILIES["qwen3"] | _LINEAR_ATTENTION,
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_moe_text"),
        FAMILIES["qwen3"]
        | _LINEAR_ATTENTION
        | {"num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "opt": {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "ffn_dim": 48}
    | {"max_position_embeddings": 512, "word_embed_proj_dim": D_MODEL},
    "mpt": {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 512},
    "gpt_neo": {"hidden_size": D_MODEL, "num_layers": N_LAYERS, "num_heads": 4, "intermediate_size": 48}
    | {"max_position_embeddings": 512, "attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "gpt_bigcode": FAMILIES["gpt2"],
    "bitnet": FAMILIES["qwen2"],
    "lfm2": FAMILIES["qwen2"] | {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "youtu": FAMILIES["qwen2"]
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    | {"num_key_value_heads": 4},
    **dict.fromkeys(("gptj", "codegen"), FAMILIES["gpt2"] | {"rotary_dim": 8}),
}
"""Exported too, and no part of the seventeen."""
OTHER_POST_NORM = ("olmo3", "exaone4", "glm4")
EXACT = tuple(family for family in FAMILIES if family not in POST_NORM)
SWITCHED_OFF = 3
"""The coordinate whose post-norm gain is exactly zero."""


def save_model(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A tiny model on disk; on post-norm families one gain of each post-norm is exactly zero."""
    with patch.dict(FAMILIES, OTHERS):
        model = tiny_hf_model(family, **changes)
    if family in (*POST_NORM, *OTHER_POST_NORM):
        offset = 1.0 if family.startswith("gemma") else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "post_" in name:
                    parameter[SWITCHED_OFF] = -offset
    model.to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def some_tokens() -> TokenBatch:
    """Two rows without padding: transformers' float32 softmax makes NaN of padding in a float64 model."""
    tokens = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    return TokenBatch(tokens, torch.ones_like(tokens))


def hooked_logits(
    directory: Path, interventions: list[Intervention], dtype: str = "float32"
) -> Float[Tensor, "pos d_vocab"]:
    batch = some_tokens()
    model = load_model(directory, device="cpu", dtype=dtype)
    with torch.no_grad(), model.hooks(fwd_hooks=all_hooks(model, interventions)):
        return all_logits(model, batch)[batch.mask.bool()]


def plain_logits(directory: Path, dtype: str = "float32") -> Float[Tensor, "pos d_vocab"]:
    """The same, in plain transformers."""
    batch = some_tokens()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="eager")
    with torch.no_grad():
        logits = model(batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids).logits
    return logits[batch.mask.bool()]


def read_gguf(path: Path) -> dict[int, Float[Tensor, " d_model"]]:
    """The vectors of a control vector file, by our layer index."""
    from gguf import GGUFReader

    return {
        int(tensor.name.removeprefix("direction.")) + 1: torch.from_numpy(tensor.data.copy())
        for tensor in GGUFReader(path).tensors
    }


def largest_component(directory: Path, direction: Direction) -> float:
    """The largest |component along the direction| / ‖stream‖ at any hook point of the stream, in float64."""
    batch = some_tokens()
    model = load_model(directory, device="cpu", dtype="float64")
    unit = direction.unit
    names = [f"blocks.{layer}.hook_resid_{side}" for layer in range(N_LAYERS) for side in ("pre", "mid", "post")]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            batch.tokens,
            names_filter=lambda name: name in names,
            attention_mask=batch.mask,
            position_ids=batch.position_ids,
        )
    kept = [cache[name][batch.mask.bool()] for name in names if name in cache]
    assert len(kept) >= 2 * N_LAYERS
    return max(((stream @ unit).abs() / stream.norm(dim=-1)).max().item() for stream in kept)
