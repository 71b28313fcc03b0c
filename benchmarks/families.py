"""Which model types load, run exactly and export: `python -m benchmarks.families` writes docs/families.md.

Every type of transformers is tried as a tiny random model with weights of ordinary size, through the package's own
doors; nothing is remembered from one time to the next.
"""

import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from refusal_mi import Ablate, Direction
from refusal_mi.errors import UserError
from refusal_mi.export.export import export_checkpoint
from refusal_mi.files import write_text
from refusal_mi.interventions import all_hooks
from refusal_mi.model.families import FAMILIES
from refusal_mi.model.loading import ORGANISM, load_model, silence_libraries
from refusal_mi.model.points import Hook, HookedModel, block_hook, resid_hook
from refusal_mi.model.running import all_logits, running
from refusal_mi.text.batches import left_pad

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
TYPES = (
    *("afmoe", "apertus", "arcee", "bamba", "bitnet", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2"),
    *("deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "falcon_mamba"),
    *("flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe"),
    *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid"),
    *("helium", "hunyuan_v1_dense", "jais2", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba"),
    *("mamba2", "minimax_m2", "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron", "nemotron_h"),
    *("olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "recurrent_gemma"),
    *("rwkv", "seed_oss"),
    *("smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu", "zamba2"),
    *("gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5"),
)
N_LAYERS, WIDTH, N_HEADS, HIDDEN = 4, 64, 4, 96
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), N_HEADS),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "moe_intermediate_size"), HIDDEN),
    **dict.fromkeys(("shared_expert_intermediate_size", "block_ff_dim", "intermediate_size_mlp"), HIDDEN),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **{"num_key_value_heads": 2, "head_dim": 16, "word_embed_proj_dim": WIDTH, "rotary_dim": 8, "sliding_window": 64},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"query_pre_attn_scalar": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4096},
    **{"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_expand": 2, "lru_width": WIDTH},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"attention_hidden_size": WIDTH, "mamba_d_ssm": 128, "kv_channels": 16, "ssm_state_size": 8},
}
_ALSO: dict[str, dict[str, Any]] = {  # ... leaves a field as it is
    "codegen": {"n_head": 4, "rotary_dim": 8},
    **{name: {"head_dim": 8, "num_key_value_heads": 4} for name in ("deepseek_v2", "deepseek_v3", "youtu")},
    "gemma4_text": dict.fromkeys(("head_dim", "num_hidden_layers", "layer_types"), ...),
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [HIDDEN] * N_LAYERS,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * N_LAYERS,
    },
    "mpt": {"expansion_ratio": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (N_LAYERS // 2), "tie_word_embeddings": False},
    "persimmon": {"num_key_value_heads": None},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
}
N_LAST, SHOWN = 3, 110


@dataclass(frozen=True)
class Row:
    """What became of one model type."""

    model_type: str
    difference: float | None
    """Largest, of the hooked model's logits from plain transformers', relative to the largest logit."""
    left: float | None
    """Most of any block's stream that lies along an ablated direction, relative to what lay there before."""
    exported: float | None
    """Largest difference of the exported weights' logits from the hooked ones, relative to what ablation changes."""
    reason: str
    """Why not, where it is refused."""


def try_type(model_type: str, folder: Path) -> Row:
    """Make a model of a type, load it, run it under an ablation and export it.

    Raises:
        Exception: something else than the package's own refusal: a defect.
    """
    source = make(model_type, folder / "model")
    try:
        model = load_model(source, device="cpu", dtype="float32")
    except UserError as error:
        return Row(model_type, None, None, None, _short(error, source))
    batch = left_pad([[5, 9, 33, 40, 71, 12], [8, 44, 90]], 0)
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction(vector, 2, resid_hook(2, model.cfg.n_layers))
    with torch.no_grad():
        plain = _plain_logits(source, batch)
        difference = (_hooked(model, batch, []) - plain).abs().max() / plain.abs().max()
        before, after = (_along(model, batch, direction, what) for what in ([], [Ablate(direction)]))
        hooked = _hooked(model, batch, [Ablate(direction)])
    left, exported, reason = after / before, None, ""
    try:
        export_checkpoint(source, Ablate(direction), folder / "out", verify="none")
        with torch.no_grad():
            edited = _plain_logits(folder / "out", batch)
        exported = ((edited - hooked).abs().max() / (plain - hooked).abs().max()).item()
    except UserError as error:
        reason = _short(error, source)
    return Row(model_type, difference.item(), left, exported, reason)


def make(model_type: str, folder: Path) -> Path:
    """A random checkpoint of a type, with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    config = AutoConfig.for_model(model_type)
    _shrink(config, model_type, tokenizer)
    is_tower = getattr(config, "text_config", None) is not None
    torch.manual_seed(0)
    model = (AutoModelForImageTextToText if is_tower else AutoModelForCausalLM).from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 3 and "conv" not in name:
                parameter.copy_(torch.randn_like(parameter) * WIDTH**-0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _shrink(config: Any, model_type: str, tokenizer: Any) -> None:
    small = _SMALL | _ALSO.get(model_type, {})
    known = set(config.to_dict())
    fresh: dict[str, Any] = {name: small[name] for name in small if name in known or hasattr(type(config), name)}
    fresh |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fresh["pad_token_id"] = None
    for name in ("layer_types", "mlp_layer_types", "attention_layers"):
        kinds = getattr(config, name, None)
        if name not in small and isinstance(kinds, list) and len(kinds) > N_LAYERS:
            spread = list(dict.fromkeys(kinds))
            fresh[name] = [spread[index % len(spread)] for index in range(N_LAYERS)]
    fresh = {name: value for name, value in fresh.items() if small.get(name) is not ...}
    inner = getattr(config, "text_config", None)
    if inner is not None:
        _shrink(inner, model_type, tokenizer)
        for name in ("vision_config",):
            tower = getattr(config, name, None)
            for field in ("hidden_size", "out_hidden_size"):
                if hasattr(tower, field):
                    setattr(tower, field, WIDTH)
            for field in ("num_hidden_layers", "depth"):
                if hasattr(tower, field):
                    setattr(tower, field, 2)
            for field in ("num_attention_heads", "num_heads"):
                if hasattr(tower, field):
                    setattr(tower, field, N_HEADS)
            if hasattr(tower, "intermediate_size"):
                tower.intermediate_size = HIDDEN
            if hasattr(tower, "deepstack_visual_indexes"):
                tower.deepstack_visual_indexes = [0, 1]
        return
    for name, value in fresh.items():
        with suppress(AttributeError):  # a property that follows from other fields
            setattr(config, name, value)


def _plain_logits(source: Path, batch: Any) -> torch.Tensor:
    """Of plain transformers."""
    config = AutoConfig.from_pretrained(source)
    kind = AutoModelForCausalLM if getattr(config, "text_config", None) is None else AutoModelForImageTextToText
    model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    places = {"position_ids": batch.position_ids}
    with_places = places if "position_ids" in inspect.signature(model.forward).parameters else {}
    return model(batch.tokens, attention_mask=batch.mask, use_cache=False, **with_places).logits[:, -N_LAST:].float()


def _hooked(model: HookedModel, batch: Any, what: Sequence[Ablate]) -> torch.Tensor:
    with running(model, all_hooks(model, what, batch.tokens.shape[1])):
        return all_logits(model, batch)[:, -N_LAST:].float()


def _along(model: HookedModel, batch: Any, direction: Direction, what: Sequence[Ablate]) -> float:
    """The most of any block's stream along a direction."""
    found: list[float] = []

    def look(stream: torch.Tensor, hook: object) -> torch.Tensor:
        found.append((stream[:, -N_LAST:].double() @ direction.unit.double()).abs().max().item())
        return stream

    looks: list[Hook] = [(block_hook(block, "hook_resid_post"), look) for block in range(model.cfg.n_layers)]
    with running(model, [*all_hooks(model, what, batch.tokens.shape[1]), *looks]):
        all_logits(model, batch)
    return max(found)


def _short(error: UserError, source: Path) -> str:
    text = str(error).replace(str(source), "").replace("cannot load the model in : ", "").strip()
    text = re.sub(r"^\(\w[\w-]*\) |; known are .*|; nothing here.*", "", text)
    text = re.sub(r"^no export for model type '\w+': ", "no export: ", text)
    text = re.sub(r"^has no hook point (\S+): .*", r"not attention and an MLP in every block (no \1)", text)
    return text if len(text) <= SHOWN else text[:SHOWN].rsplit(" ", 1)[0] + " …"


def rows(types: Sequence[str]) -> Iterator[Row]:
    """One row for every type."""
    for model_type in types:
        with tempfile.TemporaryDirectory() as scratch:
            yield try_type(model_type, Path(scratch))


def page(found: Sequence[Row]) -> str:
    """The table, Markdown."""
    runs = [row for row in found if row.difference is not None]
    exports = [row for row in runs if row.exported is not None]
    lines = [
        "# Model types\n\n",
        f"Made by `python -m benchmarks.families` with transformers {_version('transformers')} and TransformerLens "
        f"{_version('transformer-lens')}: {len(found)} types as tiny random models, {len(runs)} run, {len(exports)} "
        f"export, the others are refused in the line shown. The package knows who writes in {len(FAMILIES)} types.\n\n"
        "*logits*: largest difference from plain transformers, relative to the largest logit. *left*: most of any "
        "block's stream that still lies along an ablated direction, relative to before. *export*: largest difference "
        "of the exported weights in plain transformers from the hooked model, relative to what ablation changes "
        "(behind a post-norm exports are close, not equal: docs/export.md).\n\n",
        "| type | logits | left | export | |\n|---|---|---|---|---|\n",
    ]
    for row in sorted(found, key=lambda row: row.model_type):
        shown = ["–" if value is None else f"{value:.0e}" for value in (row.difference, row.left, row.exported)]
        lines.append(f"| {row.model_type} | {' | '.join(shown)} | {row.reason} |\n")
    return "".join(lines)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> int:
    """Try every type, and write the page."""
    silence_libraries()
    warnings.simplefilter("ignore")
    found = []
    for row in rows(TYPES):
        found.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    write_text(PAGE, page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
