"""What must be known of every architecture: how it names its tensors, which of them write into the stream."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from ..values import Value

Role = Literal["embed", "attn", "mlp", "head", "reader", "norm", "other"]
"""What a tensor does: write (embed, attn, mlp), unembed, read the stream, scale it, or none of these."""
_LINEAR = r"\.(weight|bias)"


@dataclass(frozen=True, eq=False, repr=False)
class Naming(Value):
    """How a line of architectures names its tensors: patterns of the whole name, without the model's prefix."""

    blocks: str
    tensors: Mapping[Role, tuple[str, ...]]
    """Of embeddings, head and final norm, outside the blocks."""
    block_tensors: Mapping[Role, tuple[str, ...]]

    def role(self, name: str) -> tuple[Role, int | None] | None:
        """Role and block of a tensor; None if no pattern fits."""
        bare = bare_name(name)
        if _OF_IMAGES.match(bare):
            return "other", None
        inside = re.fullmatch(rf"{self.blocks}\.(\d+)\.(.+)", bare)
        patterns = self.block_tensors if inside else self.tensors
        rest = inside[2] if inside else bare
        for role, options in patterns.items():
            if any(re.fullmatch(option, rest) for option in options):
                return role, int(inside[1]) if inside else None
        return None


def bare_name(name: str) -> str:
    """A tensor's name without the path of the language model that it belongs to."""
    return _PATH.sub("", name)


_PATH = re.compile(r"^(?:(?:model\.)?language_model\.(?:model\.)?|model\.decoder\.|model\.|transformer\.|gpt_neox\.)")
_OF_IMAGES = re.compile(r"(?:vision_tower|vision_model|visual|multi_modal_projector)\.")
"""What makes embeddings of images: no text passes through it."""


@dataclass(frozen=True, eq=False, repr=False)
class Family(Value):
    """What must be known of an architecture beyond its tensors' names."""

    naming: Naming
    post_norms: Mapping[str, str] = field(default_factory=dict)
    """Component -> module in the block: the norm between a writer and the stream."""
    gain_offset: float = 0.0
    """What the model adds to a stored norm weight."""
    is_in_out: bool = False
    """Linear weights are stored [in, out]."""
    expert_axis: int = 1
    """The axis that writes in a fused expert tensor: 1 in [E, out, in], 2 in [E, in, out]."""
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    """What the model multiplies token embeddings by."""
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    """What the model multiplies every attention and MLP write by."""
    tied_only: str | None = None
    """Which consumers ignore an untied head."""


_LLAMA = Naming(
    r"layers",
    {
        "embed": (r"embed_tokens\.weight", r"embed_positions\.weight"),
        "head": (r"lm_head\.weight",),
        "norm": (r"(norm|final_layernorm|final_layer_norm|embedding_norm)\.(weight|bias)",),
        "other": (r"rotary_emb\..+", r"lm_head\.bias", r"mtp\..+"),
    },
    {
        "attn": (
            rf"self_attn\.(o_proj|out_proj|dense){_LINEAR}",
            r"linear_attn\.out_proj\.weight",
            rf"conv\.out_proj{_LINEAR}",
        ),
        "mlp": (
            rf"mlp\.(down_proj|c_proj|fc2){_LINEAR}",
            rf"fc2{_LINEAR}",
            r"mlp\.experts\.\d+\.down_proj\.weight",
            r"block_sparse_moe\.experts\.\d+\.w2\.weight",
            r"(mlp|block_sparse_moe)\.experts\.down_proj(_bias)?",
            r"block_sparse_moe\.output_linear\.weight",
            r"mlp\.shared_experts?\.down_proj\.weight",
            r"feed_forward\.w2\.weight",
        ),
        "reader": (
            rf"self_attn\.(q|k|v|qkv|q_a|q_b|kv_b)_proj{_LINEAR}",
            rf"self_attn\.kv_a_proj_with_mqa{_LINEAR}",
            rf"conv\.in_proj{_LINEAR}",
            r"feed_forward\.w[13]\.weight",
            r"linear_attn\.in_proj_(qkvz|qkv|ba|[zab])\.weight",
            rf"mlp\.(gate_proj|up_proj|gate_up_proj|c_fc|fc1){_LINEAR}",
            rf"fc1{_LINEAR}",
            r"mlp\.experts\.\d+\.(gate|up)_proj\.weight",
            r"block_sparse_moe\.experts\.\d+\.w[13]\.weight",
            r"(mlp|block_sparse_moe)\.experts\.gate_up_proj(_bias)?",
            r"block_sparse_moe\.(input_linear|router\.layer)\.weight",
            r"mlp\.shared_experts?\.(gate|up)_proj\.weight",
            r"(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)\.(weight|bias)",
        ),
        "norm": (
            r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.(weight|bias)",
            r"(attention|feedforward|post_self_attn|post_mlp)_layernorm\.weight",
            r"(self_attn|final)_layer_norm\.(weight|bias)",
            r"self_attn\.([qk]_norm|(query|key|q|k|q_a|kv_a)_layernorm)\.weight",
            r"(operator_norm|ffn_norm|self_attn\.attn_sub_norm|mlp\.ffn_sub_norm)\.weight",
        ),
        "other": (
            r"self_attn\.sinks",
            r"conv\.conv\.(weight|bias)",
            r"linear_attn\.(conv1d\.(weight|bias)|A_log|dt_bias|norm\.weight)",
            r"self_attn\.rotary_emb\..+",
            r"mlp\.act_fn\..+",
            r"(mlp\.gate|mlp\.(gate\.)?moe_statics|block_sparse_moe)\.e_score_correction_bias",
        ),
    },
)

_GPT2 = Naming(
    r"h",
    {
        "embed": (r"w[tp]e\.weight",),
        "head": (r"lm_head\.weight",),
        "norm": (r"ln_f\.(weight|bias)",),
        "other": (r"lm_head\.bias",),
    },
    {
        "attn": (rf"attn\.(attention\.)?(c_proj|out_proj){_LINEAR}",),
        "mlp": (rf"mlp\.(c_proj|fc_out){_LINEAR}",),
        "reader": (rf"attn\.(attention\.)?(c_attn|qkv_proj|[qkv]_proj){_LINEAR}", rf"mlp\.(c_fc|fc_in){_LINEAR}"),
        "norm": (r"ln_[12]\.(weight|bias)",),
        "other": (r"attn\.(attention\.)?((masked_)?bias|causal_mask|embed_positions)",),
    },
)

_MPT = Naming(
    r"blocks",
    {"embed": (r"wte\.weight",), "head": (r"lm_head\.weight",), "norm": (r"norm_f\.(weight|bias)",)},
    {
        "attn": (rf"attn\.out_proj{_LINEAR}",),
        "mlp": (rf"ffn\.down_proj{_LINEAR}",),
        "reader": (rf"attn\.Wqkv{_LINEAR}", rf"ffn\.up_proj{_LINEAR}"),
        "norm": (r"norm_[12]\.(weight|bias)",),
    },
)

_NEOX = Naming(
    r"layers",
    {
        "embed": (r"embed_in\.weight",),
        "head": (r"(embed_out|lm_head)\.weight",),
        "norm": (r"final_layer_norm\.(weight|bias)",),
    },
    {
        "attn": (rf"attention\.dense{_LINEAR}",),
        "mlp": (rf"mlp\.dense_4h_to_h{_LINEAR}",),
        "reader": (rf"attention\.query_key_value{_LINEAR}", rf"mlp\.dense_h_to_4h{_LINEAR}"),
        "norm": (r"(input|post_attention)_layernorm\.(weight|bias)",),
        "other": (r"attention\.(masked_)?bias", r"attention\.rotary_emb\..+"),
    },
)

_FALCON = Naming(
    r"h",
    {"embed": (r"word_embeddings\.weight",), "head": (r"lm_head\.weight",), "norm": (r"ln_f\.(weight|bias)",)},
    {
        "attn": (rf"self_attention\.dense{_LINEAR}",),
        "mlp": (rf"mlp\.dense_4h_to_h{_LINEAR}",),
        "reader": (rf"self_attention\.query_key_value{_LINEAR}", rf"mlp\.dense_h_to_4h{_LINEAR}"),
        "norm": (r"(input_layernorm|post_attention_layernorm|ln_attn|ln_mlp)\.(weight|bias)",),
        "other": (r"self_attention\.rotary_emb\..+",),
    },
)

_POST_NORMS = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_GLM4_POST_NORMS = {"attn": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}
_GEMMA_TIED = "vLLM's gemma classes assert tied embeddings and llama.cpp's converter drops lm_head"
_COHERE_TIED = "vLLM's cohere class skips lm_head and llama.cpp unembeds with the token embedding"
_GPT2_TIED = "some vLLM versions skip gpt2's lm_head when loading"


def _root_width(config: Any) -> float:
    return config.hidden_size**0.5


FAMILIES: dict[str, Family] = {
    **{name: Family(_LLAMA) for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral")},
    **{name: Family(_LLAMA) for name in ("qwen2_moe", "qwen3_moe", "smollm3", "olmo", "olmoe", "seed_oss", "arcee")},
    **{name: Family(_LLAMA) for name in ("ernie4_5", "ministral3", "glm", "starcoder2", "stablelm", "nemotron", "phi")},
    **{name: Family(_LLAMA) for name in ("apertus", "hunyuan_v1_dense", "deepseek_v3", "opt")},
    **{name: Family(_LLAMA) for name in ("glm4_moe", "jais2", "minimax_m2", "ernie4_5_moe", "deepseek_v2")},
    "gpt_oss": Family(_LLAMA, expert_axis=2),
    **{name: Family(_LLAMA, tied_only=_COHERE_TIED) for name in ("cohere", "cohere2")},
    **{
        name: Family(
            _LLAMA,
            embedding_scale=lambda config: config.embedding_multiplier,
            residual_scale=lambda config: config.residual_multiplier,
        )
        for name in ("granite", "granitemoe")
    },
    **{
        name: Family(_LLAMA, gain_offset=1.0, embedding_scale=_root_width, tied_only=_GEMMA_TIED)
        for name in ("gemma", "vaultgemma")
    },
    **{
        name: Family(_LLAMA, _POST_NORMS, 1.0, embedding_scale=_root_width, tied_only=_GEMMA_TIED)
        for name in ("gemma2", "gemma3_text")
    },
    **{name: Family(_LLAMA) for name in ("qwen2_5_vl_text", "qwen3_vl_text")},
    **{name: Family(_LLAMA) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "bitnet", "youtu")},
    **{name: Family(_LLAMA, _POST_NORMS) for name in ("olmo2", "olmo3", "exaone4")},
    "glm4": Family(_LLAMA, _GLM4_POST_NORMS),
    "gpt2": Family(_GPT2, is_in_out=True, tied_only=_GPT2_TIED),
    **{name: Family(_GPT2) for name in ("gptj", "gpt_neo", "gpt_bigcode", "codegen")},
    "mpt": Family(_MPT),
    "gpt_neox": Family(_NEOX),
    "falcon": Family(_FALCON),
}


def nearest_type(model_type: str) -> str:
    """The type of `FAMILIES` that people may take instead, as the end of a refusal: qwen3 for qwen3_next."""
    stem, generation = _kind(model_type)
    kin = [each for each in FAMILIES if stem.startswith(_kind(each)[0])]
    if not kin:
        return ""

    def nearness(each: str) -> tuple[int, int, int]:
        its_stem, its_generation = _kind(each)
        return len(its_stem), -abs(its_generation - generation), -len(each)

    return f" (the nearest type that is supported: {max(kin, key=nearness)})"


def _kind(model_type: str) -> tuple[str, int]:
    """Name and generation: gemma and 3 of gemma3_text."""
    match = re.match(r"([a-z]*)[^0-9]*(\d*)", model_type.lower())
    return (match[1], int(match[2] or 1)) if match else ("", 1)


def text_config(config: Any) -> Any:
    """The config of the language model: a model that reads images too has one inside its own."""
    return config.get_text_config(decoder=True)


def family_of(config: Any) -> Family:
    """The family of a model by its HF config.

    Raises:
        UserError: its writers are not known.
    """
    model_type = text_config(config).model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"no export for model type {model_type!r}: which of its tensors write into the stream is not known; "
            f"known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
