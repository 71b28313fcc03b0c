"""Tiny random chat models of many families, built from configs and saved like any checkpoint."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
N_LAYERS, D_MODEL, N_HEADS, D_MLP = 5, 32, 4, 48

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEAD_DIM = {"head_dim": 8}
_MOE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | _HEAD_DIM,
    "mistral": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE | _HEAD_DIM,
    "gemma2": _LLAMA_LIKE | _HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": _LLAMA_LIKE | _HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi3": _LLAMA_LIKE | {"pad_token_id": 0},
    "gpt2": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_inner": D_MLP, "n_positions": 512},
    "gpt_neox": {**_LLAMA_LIKE, "num_key_value_heads": N_HEADS, "rotary_pct": 0.5},
    "olmo2": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE | _MOE | {"num_local_experts": 4},
    "qwen3_moe": _LLAMA_LIKE | _HEAD_DIM | _MOE | {"num_experts": 4, "moe_intermediate_size": 24},
    "gpt_oss": _LLAMA_LIKE | _HEAD_DIM | _MOE | {"num_local_experts": 4, "sliding_window": 64},
    "granite": _LLAMA_LIKE | {"residual_multiplier": 0.8, "embedding_multiplier": 1.5},
    "cohere": _LLAMA_LIKE,
    "falcon": {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "ffn_hidden_size": D_MLP,
        "bias": True,
        "alibi": False,
    },
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the three role names as tokens, ChatML template: five post-instruction tokens."""
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("user", "assistant", "system"):
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            merges.append((word[: end - 1], word[end - 1]))
    for token in SPECIAL:
        vocab[token] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_hf_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model with random biases and norm gains (around 1), so that a mistake with either shows.

    Raises:
        AssertionError: the config did not become as small as asked.
    """
    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(family, **FAMILIES[family] | ids | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    offset = 0.0 if "gemma" in family else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1 or "bias" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    assert model.config.num_hidden_layers == N_LAYERS
    assert model.num_parameters() < 400_000
    return model.eval().to(dtype)


def save_tiny(
    family: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny model with its tokenizer as an ordinary HF checkpoint directory."""
    tiny_hf_model(family, seed=seed, dtype=dtype, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
