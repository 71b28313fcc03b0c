"""Which tensors write into the residual stream, and which read it: by architecture, in a checkpoint and in a model."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .points import Component, HookedModel, check_raw_basis, write_hooks

Role = Literal["embed", "attn", "mlp", "head", "reader", "norm", "other"]
"""What a tensor does: write (embed, attn, mlp), unembed, read the stream, scale it, or none of these."""
_LINEAR = r"\.(weight|bias)"


@dataclass(frozen=True)
class Naming:
    """How a line of architectures names its tensors: patterns of the whole name, without the model's prefix."""

    blocks: str
    tensors: Mapping[Role, tuple[str, ...]]
    """Of embeddings, head and final norm, outside the blocks."""
    block_tensors: Mapping[Role, tuple[str, ...]]

    def role(self, name: str) -> tuple[Role, int | None] | None:
        """Role and block of a tensor; None if no pattern fits."""
        bare = re.sub(r"^(?:model|transformer|gpt_neox)\.", "", name)
        inside = re.fullmatch(rf"{self.blocks}\.(\d+)\.(.+)", bare)
        patterns = self.block_tensors if inside else self.tensors
        rest = inside[2] if inside else bare
        for role, options in patterns.items():
            if any(re.fullmatch(option, rest) for option in options):
                return role, int(inside[1]) if inside else None
        return None


@dataclass(frozen=True)
class Family:
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
        "embed": (r"embed_tokens\.weight",),
        "head": (r"lm_head\.weight",),
        "norm": (r"norm\.(weight|bias)",),
        "other": (r"rotary_emb\..+",),
    },
    {
        "attn": (rf"self_attn\.o_proj{_LINEAR}",),
        "mlp": (
            rf"mlp\.down_proj{_LINEAR}",
            r"mlp\.experts\.\d+\.down_proj\.weight",
            r"block_sparse_moe\.experts\.\d+\.w2\.weight",
            r"mlp\.experts\.down_proj(_bias)?",
            r"mlp\.shared_expert\.down_proj\.weight",
        ),
        "reader": (
            rf"self_attn\.(q|k|v|qkv)_proj{_LINEAR}",
            rf"mlp\.(gate|up|gate_up)_proj{_LINEAR}",
            r"mlp\.experts\.\d+\.(gate|up)_proj\.weight",
            r"block_sparse_moe\.experts\.\d+\.w[13]\.weight",
            r"mlp\.experts\.gate_up_proj(_bias)?",
            r"mlp\.shared_expert\.(gate|up)_proj\.weight",
            r"(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)\.(weight|bias)",
        ),
        "norm": (r"((input|post_attention|pre_feedforward|post_feedforward)_layernorm|self_attn\.[qk]_norm)\.weight",),
        "other": (r"self_attn\.sinks", r"self_attn\.rotary_emb\..+"),
    },
)

_GPT2 = Naming(
    r"h",
    {
        "embed": (r"w[tp]e\.weight",),
        "head": (r"lm_head\.weight",),
        "norm": (r"ln_f\.(weight|bias)",),
    },
    {
        "attn": (rf"attn\.c_proj{_LINEAR}",),
        "mlp": (rf"mlp\.c_proj{_LINEAR}",),
        "reader": (rf"attn\.c_attn{_LINEAR}", rf"mlp\.c_fc{_LINEAR}"),
        "norm": (r"ln_[12]\.(weight|bias)",),
        "other": (r"attn\.(masked_)?bias",),
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
    {
        "embed": (r"word_embeddings\.weight",),
        "head": (r"lm_head\.weight",),
        "norm": (r"ln_f\.(weight|bias)",),
    },
    {
        "attn": (rf"self_attention\.dense{_LINEAR}",),
        "mlp": (rf"mlp\.dense_4h_to_h{_LINEAR}",),
        "reader": (rf"self_attention\.query_key_value{_LINEAR}", rf"mlp\.dense_h_to_4h{_LINEAR}"),
        "norm": (r"(input_layernorm|post_attention_layernorm|ln_attn|ln_mlp)\.(weight|bias)",),
        "other": (r"self_attention\.rotary_emb\..+",),
    },
)

_POST_NORMS = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_GEMMA_TIED = "vLLM's gemma classes assert tied embeddings and llama.cpp's converter drops lm_head"
_COHERE_TIED = "vLLM's cohere class skips lm_head and llama.cpp unembeds with the token embedding"
_GPT2_TIED = "some vLLM versions skip gpt2's lm_head when loading"


def _root_width(config: Any) -> float:
    return config.hidden_size**0.5


FAMILIES: dict[str, Family] = {
    **{name: Family(_LLAMA) for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral")},
    **{name: Family(_LLAMA) for name in ("qwen2_moe", "qwen3_moe", "smollm3")},
    "gpt_oss": Family(_LLAMA, expert_axis=2),
    "cohere": Family(_LLAMA, tied_only=_COHERE_TIED),
    "granite": Family(
        _LLAMA,
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
    ),
    "gemma": Family(_LLAMA, gain_offset=1.0, embedding_scale=_root_width, tied_only=_GEMMA_TIED),
    **{
        name: Family(_LLAMA, _POST_NORMS, 1.0, embedding_scale=_root_width, tied_only=_GEMMA_TIED)
        for name in ("gemma2", "gemma3_text")
    },
    **{name: Family(_LLAMA, _POST_NORMS) for name in ("olmo2", "olmo3")},
    "gpt2": Family(_GPT2, is_in_out=True, tied_only=_GPT2_TIED),
    "gpt_neox": Family(_NEOX),
    "falcon": Family(_FALCON),
}


def family_of(model_type: str) -> Family:
    """The family of an HF model type.

    Raises:
        UserError: its writers are not known.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"no export for model type {model_type!r}: which of its tensors write into the stream is not known; "
            f"known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


_WRITERS = ("embed", "attn", "mlp")


@dataclass(frozen=True)
class Writer:
    """A tensor whose rows (along `axis`) are added to the residual stream."""

    name: str
    component: Component
    layer: int | None
    """The block; None for an embedding."""
    axis: int
    is_bias: bool
    is_token_embedding: bool
    post_norm: str | None
    """Name of the gain of the norm between this writer and the stream."""


@dataclass(frozen=True)
class Layout:
    """What every tensor of a checkpoint does."""

    family: Family
    config: Any
    """The HF config of the language model."""
    writers: tuple[Writer, ...]
    token_embedding: str
    head: str
    """Name of the unembedding in a checkpoint that has one of its own."""
    is_tied: bool
    """The unembedding is the token embedding."""

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def embedding_scale(self) -> float:
        return self.family.embedding_scale(self.config)

    @property
    def residual_scale(self) -> float:
        return self.family.residual_scale(self.config)


def classify(config: Any, shapes: Mapping[str, tuple[int, ...]], *, skeleton: Any = None) -> Layout:
    """Say what each tensor does, and check the result against the architecture itself.

    Args:
        config: HF config.
        shapes: every tensor of the checkpoint.
        skeleton: the HF model, real or on the meta device; None builds it from the config.

    Raises:
        UserError: the architecture is not known, a tensor fits no class, or the writers found are not exactly those
            that the architecture has and the hook points cover.
    """
    family = family_of(config.model_type)
    model = build_skeleton(config) if skeleton is None else skeleton
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    roles = _roles(family, shapes)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ignored: set[Role] = {"other", "head"} if is_tied else {"other"}
    _compare(_census(roles, shapes, ignored), _census(_roles(family, expected), expected, ignored))
    token = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    head_module = next(name for name, part in model.named_modules() if part is model.get_output_embeddings())
    found = [
        _writer(family, name, role, layer, shapes, config, token)
        for name, (role, layer) in roles.items()
        if role in _WRITERS
    ]
    missing = [writer.post_norm for writer in found if writer.post_norm is not None and writer.post_norm not in shapes]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]}, the norm that follows a writer")
    known = set(write_hooks(config.num_hidden_layers))
    unknown = [writer for writer in found if _hook_name(writer) not in known]
    if unknown:
        raise UserError(f"{unknown[0].name} writes into the stream at {_hook_name(unknown[0])}, which no hook covers")
    embedding = next(writer.name for writer in found if writer.is_token_embedding)
    return Layout(family, config, tuple(found), embedding, f"{head_module}.weight", is_tied)


def build_skeleton(config: Any) -> Any:
    """The HF causal language model of a config, with parameters on the meta device and buffers in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.eval()


def _roles(family: Family, names: Iterable[str]) -> dict[str, tuple[Role, int | None]]:
    roles = {}
    for name in names:
        found = family.naming.role(name)
        if found is None:
            raise UserError(f"{name} fits no class of tensor: it might write into the stream, so nothing is exported")
        roles[name] = found
    return roles


def _census(
    roles: Mapping[str, tuple[Role, int | None]], shapes: Mapping[str, tuple[int, ...]], ignored: set[Role]
) -> Counter[tuple[str, int | None, str]]:
    """Elements per role, block and kind: the same whether experts are stored one by one or fused."""
    counts: Counter[tuple[str, int | None, str]] = Counter()
    for name, (role, layer) in roles.items():
        if role not in ignored:
            counts[role, layer, "bias" if _is_bias(name) else "weight"] += prod(shapes[name])
    return counts


def _compare(found: Counter[tuple[str, int | None, str]], expected: Counter[tuple[str, int | None, str]]) -> None:
    for key in sorted(set(found) | set(expected), key=str):
        if found[key] != expected[key]:
            role, layer, kind = key
            place = "" if layer is None else f" of block {layer}"
            raise UserError(
                f"the checkpoint has {found[key]} elements of {role} {kind}{place} where the architecture has "
                f"{expected[key]}: its writers are not fully known, so nothing is exported"
            )


def _writer(
    family: Family,
    name: str,
    role: Role,
    layer: int | None,
    shapes: Mapping[str, tuple[int, ...]],
    config: Any,
    token_embedding: str,
) -> Writer:
    shape, is_bias = shapes[name], _is_bias(name)
    axis = len(shape) - 1 if is_bias else _weight_axis(family, role, shape)
    if shape[axis] != config.hidden_size:
        raise UserError(
            f"{name} has shape {list(shape)}: axis {axis}, along which it writes, is not {config.hidden_size} wide"
        )
    post_norm = None
    if role in family.post_norms:
        stem = name.split(f".{layer}.")[0]
        post_norm = f"{stem}.{layer}.{family.post_norms[role]}.weight"
    is_token = role == "embed" and token_embedding.endswith(name)
    return Writer(name, role, layer, axis, is_bias, is_token, post_norm)  # type: ignore[arg-type]


def _weight_axis(family: Family, role: Role, shape: tuple[int, ...]) -> int:
    """Decided by the model type, never by the shape: a square matrix looks the same either way."""
    if role == "embed":
        return 1
    if len(shape) == 3:
        return family.expert_axis
    return 1 if family.is_in_out else 0


def _is_bias(name: str) -> bool:
    return name.endswith(("bias", "_bias"))


def _hook_name(writer: Writer) -> str:
    if writer.component == "embed":
        return "blocks.0.hook_resid_pre"
    return f"blocks.{writer.layer}.hook_{writer.component}_out"


def named_weights(model: HookedModel) -> dict[str, Tensor]:
    """Every parameter, by its name in the HF checkpoint."""
    named = model.original_model.named_parameters(remove_duplicate=False)  # type: ignore[attr-defined]
    return {name.replace("._original_component", ""): parameter for name, parameter in named}


def norm_before(model: HookedModel, layer: int, component: Literal["attn", "mlp"]) -> Callable[[Tensor], Tensor] | None:
    """The norm through which a component of block `layer` reads the stream; None where it reads it as it is."""
    block = model.blocks[layer]  # type: ignore[attr-defined]
    is_shared = component == "mlp" and not hasattr(block, "ln2") and not hasattr(block, "ln2_post")
    return getattr(block, "ln1" if component == "attn" or is_shared else "ln2", None)


def final_norm(model: HookedModel) -> Callable[[Tensor], Tensor]:
    """The norm before the unembedding."""
    return model.ln_final  # type: ignore[attr-defined]


def readers(model: HookedModel, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The linear maps of block `layer` that read the normed stream: q, k, v and what the MLP has of gate and in."""
    block = model.blocks[layer]  # type: ignore[attr-defined]
    dense = dict(block.mlp.named_children()) if hasattr(block.mlp, "out") else {}
    found = {name: getattr(block.attn, name) for name in ("q", "k", "v")}
    return found | {name: dense[name] for name in ("gate", "in") if name in dense}


_CHUNK = 4096
_LONG = 1e3


@dataclass(frozen=True)
class ModelWeights:
    """A model's tensors by what they do to the stream."""

    model: HookedModel

    def __post_init__(self) -> None:
        check_raw_basis(self.model)

    @cached_property
    def layout(self) -> Layout:
        """Which tensors write, along which axis, and which norm comes after.

        Raises:
            UserError: nobody has said so for this type of model.
        """
        config = self.model.original_model.config  # type: ignore[attr-defined]
        if config.model_type not in FAMILIES:
            raise UserError(
                f"this analysis reads weights, and which of them write into the stream is not known for model type "
                f"{config.model_type!r}; project_residuals, linear_probes and patch_activations read activations only"
            )
        skeleton = build_skeleton(config)
        return classify(config, {name: tuple(p.shape) for name, p in skeleton.named_parameters()}, skeleton=skeleton)

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """Every parameter by its name in the HF checkpoint."""
        return named_weights(self.model)

    def writers(self, component: Component, layer: int) -> list[Writer]:
        """The weight tensors (biases apart) that write for a component of a block."""
        found = self.layout.writers
        return [w for w in found if w.component == component and w.layer == layer and not w.is_bias]

    def written_rows(self, writer: Writer) -> Float[Tensor, "feature d_model"]:
        """What one unit of each of a writer's inputs adds to the stream, before a post-norm."""
        tensor = self.named[writer.name].detach()
        return tensor.movedim(writer.axis, -1).reshape(-1, tensor.shape[writer.axis])

    def gain(self, component: Component, layer: int) -> Float[Tensor, " d_model"]:
        """What multiplies a component's output on its way into the stream: post-norm gain and residual scale."""
        writer = self.writers(component, layer)[0]
        gain = torch.ones(self.layout.d_model, dtype=torch.float64)
        if writer.post_norm is not None:
            gain = self.named[writer.post_norm].detach().cpu().double() + self.layout.family.gain_offset
        return gain * self.layout.residual_scale

    def bias(self, component: Component, layer: int) -> Float[Tensor, " d_model"] | None:
        """What a component adds to its output before a post-norm; None without one, or where every expert has one."""
        found = [w for w in self.layout.writers if w.component == component and w.layer == layer and w.is_bias]
        tensors = [self.named[writer.name] for writer in found]
        return tensors[0].detach().cpu().double() if tensors and tensors[0].ndim == 1 else None

    def head_rows(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of every head of a block, before a post-norm."""
        (writer,) = self.writers("attn", layer)
        rows = self.written_rows(writer)
        return rows.reshape(self.model.cfg.n_heads, -1, rows.shape[-1])

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_U, by rows."""
        return self.named[self.layout.token_embedding if self.layout.is_tied else self.layout.head].detach()

    def expert_readers(self, layer: int) -> Float[Tensor, "feature d_model"] | None:
        """What a block's fused experts read, None where there are none."""
        (writer, *_) = self.writers("mlp", layer)
        name = writer.name.replace("down_proj", "gate_up_proj")
        if "experts" not in name or name not in self.named:
            return None
        tensor, axis = self.named[name].detach(), 3 - self.layout.family.expert_axis
        return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


@dataclass(frozen=True)
class NormMap:
    """The linear part of a norm: x → gain ⊙ (x − mean x), or without the mean, its division by a length apart."""

    gain: Float[Tensor, " d_model"]
    is_centered: bool

    @classmethod
    def of(cls, norm: Any, model: HookedModel) -> "NormMap":
        """Measure it: a long vector of alternating signs has mean 0 and any norm returns its gain."""
        like = next(iter(named_weights(model).values()))
        signs = torch.ones(model.cfg.d_model, dtype=like.dtype, device=like.device)
        signs[1::2] = -1
        probes = torch.stack([_LONG * signs, _LONG * signs.abs(), torch.zeros_like(signs)])
        with torch.no_grad():
            alternating, constant, zero = norm(probes[None])[0].double().cpu()
        gain = (alternating - zero) * signs.double().cpu()
        return cls(gain, bool((constant - zero).norm() < 0.01 * gain.norm()))

    def apply(self, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector d_model"]:
        """gain ⊙ (v − mean v), or gain ⊙ v."""
        double = vectors.double()
        return self.gain * (double - double.mean(-1, keepdim=True) if self.is_centered else double)


def norms_along(
    rows: Float[Tensor, "feature d_model"], vectors: Float[Tensor, "vector d_model"]
) -> Float[Tensor, " vector"]:
    """‖rows · v‖ for each vector, in float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64)
    for piece in rows.split(_CHUNK):
        total += (piece.cpu().double() @ vectors.double().T).square().sum(0)
    return total.sqrt()
