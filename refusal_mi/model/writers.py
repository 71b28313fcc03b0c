"""Which tensors of a checkpoint write into the residual stream, and which read it, checked against the architecture."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import UserError
from .families import Family, Role, bare_name, family_of, text_config
from .points import Component, write_hook, write_hooks

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

    @property
    def point(self) -> str:
        """The hook point at which the write reaches the stream."""
        return write_hook(self.component, self.layer or 0)


@dataclass(frozen=True)
class Layout:
    """What every tensor of a checkpoint does."""

    family: Family
    config: Any
    """The HF config of the checkpoint."""
    writers: tuple[Writer, ...]
    token_embedding: str
    head: str
    """Name of the unembedding in a checkpoint that has one of its own."""
    is_tied: bool
    """The unembedding is the token embedding."""

    @property
    def n_layers(self) -> int:
        return text_config(self.config).num_hidden_layers

    @property
    def d_model(self) -> int:
        return text_config(self.config).hidden_size

    @property
    def embedding_scale(self) -> float:
        return self.family.embedding_scale(text_config(self.config))

    @property
    def residual_scale(self) -> float:
        return self.family.residual_scale(text_config(self.config))

    @property
    def sees_images(self) -> bool:
        """Whether something beside the token embedding can write what enters the first block."""
        return text_config(self.config) is not self.config


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
    family, text = family_of(config), text_config(config)
    model = build_skeleton(config) if skeleton is None else skeleton
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    roles = _roles(family, shapes)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ignored: set[Role] = {"other", "head"} if is_tied else {"other"}
    _compare(_census(roles, shapes, ignored), _census(_roles(family, expected), expected, ignored))
    token = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    head_module = next(name for name, part in model.named_modules() if part is model.get_output_embeddings())
    writers = [
        _writer(family, name, role, layer, shapes, text, token)
        for name, (role, layer) in roles.items()
        if role in _WRITERS
    ]
    post_norms = [writer.post_norm for writer in writers if writer.post_norm is not None]
    missing = [name for name in post_norms if name not in shapes]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]}, the norm that follows a writer")
    known = set(write_hooks(text.num_hidden_layers))
    for writer in writers:
        if writer.point not in known:
            raise UserError(f"{writer.name} writes into the stream at {writer.point}, which no hook covers")
    embedding = next(writer.name for writer in writers if writer.is_token_embedding)
    # Where transformers renames on loading, a head that is added goes by the old names as well.
    path = embedding.removesuffix(bare_name(embedding)) if embedding.startswith("language_model.") else ""
    head = f"{path.removesuffix('model.')}{head_module}.weight"
    return Layout(family, config, tuple(writers), embedding, head, is_tied)


def build_skeleton(config: Any) -> Any:
    """The HF causal language model of a config, with parameters on the meta device and buffers in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint as users do."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if text_config(config) is config else AutoModelForImageTextToText


def _roles(family: Family, names: Iterable[str]) -> dict[str, tuple[Role, int | None]]:
    roles = {}
    for name in names:
        role = family.naming.role(name)
        if role is None:
            raise UserError(f"{name} fits no class of tensor: it might write into the stream, so nothing is exported")
        roles[name] = role
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


def _compare(stored: Counter[tuple[str, int | None, str]], expected: Counter[tuple[str, int | None, str]]) -> None:
    for key in sorted(set(stored) | set(expected), key=str):
        if stored[key] != expected[key]:
            role, layer, kind = key
            place = "" if layer is None else f" of block {layer}"
            raise UserError(
                f"the checkpoint has {stored[key]} elements of {role} {kind}{place} where the architecture has "
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
    is_token = role == "embed" and bare_name(token_embedding) == bare_name(name)
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
