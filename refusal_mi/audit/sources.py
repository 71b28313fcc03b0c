"""The tensors of two checkpoints side by side, one at a time; the second may be a LoRA adapter of the first."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..errors import UserError
from ..export.adapter import CONFIG, SECOND, WEIGHTS
from ..export.checkpoint import DTYPES, Checkpoint, open_checkpoint
from ..export.plan import local_files
from ..export.streaming import CheckpointWeights
from ..files import at_home, read_json, read_record, read_tensors
from ..model.families import Role, bare_name, text_config
from ..model.guards import read_config
from ..model.loading import resolve_source
from ..model.provenance import display_name
from ..model.writers import Layout, build_skeleton, classify
from ..values import Value

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Weights(Value):
    """Tensors by their names without the model's path."""

    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    """As they are stored."""
    read: Callable[[str], Shaped[Tensor, "..."]]


@dataclass(frozen=True, eq=False, repr=False)
class Sides(Value):
    """Two checkpoints of one architecture."""

    layout: Layout
    base: Weights
    suspect: Weights
    roles: Mapping[str, Role]
    """Of every tensor that both have."""
    added: tuple[str, ...]
    """Tensors of the suspect alone."""
    remarks: tuple[str, ...] = ()
    """What else than weights differs, and whether an adapter names another base."""


def open_sides(
    base: str | Path | None, suspect: str | Path | None, revisions: tuple[str | None, str | None] = (None, None)
) -> Sides:
    """Read configs and headers, and pair the tensors.

    Args:
        base: what `load_model` takes as a name.
        suspect: the same, or the folder of a LoRA adapter of the base.
        revisions: of both, on the hub.

    Raises:
        UserError: one of them cannot be read tensor by tensor, or they are not of one architecture and size.
    """
    directory = _files("BASE", base, revisions[0])
    checkpoint, config = open_checkpoint(directory), read_config(directory)
    layout = classify(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    one = _stored(checkpoint)
    if suspect is not None and is_adapter(at_home(suspect)):
        return replace(
            _paired(layout, one, adapted(one, at_home(suspect))), remarks=_other_base(base, at_home(suspect))
        )
    directory = _files("SUSPECT", suspect, revisions[1])
    suspected = open_checkpoint(directory)
    other = read_config(directory)
    _check_same_architecture(config, other)
    two = _stored(suspected)
    missing = [name for name in one.shapes if name not in two.shapes and _role(layout, name) not in ("head", "other")]
    if missing:  # experts may be stored one by one here and fused there
        skeleton = build_skeleton(config)
        shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters()}
        layout = classify(config, shapes, skeleton=skeleton)
        one, two = (_as_loaded(each, layout, shapes) for each in (checkpoint, suspected))
    return replace(_paired(layout, one, two), remarks=_other_config(config, other))


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def _files(which: str, source: str | Path | None, revision: str | None) -> Path:
    name = resolve_source(source)
    if Path(name).is_file():
        raise UserError(f"{which} is a quantized file, {name}: an audit compares the checkpoints that such are made of")
    return local_files(name, revision)[0]


def _check_same_architecture(base: Any, suspect: Any) -> None:
    def said(config: Any) -> str:
        text = text_config(config)
        return f"{text.model_type} of {text.num_hidden_layers} blocks and width {text.hidden_size}"

    if said(base) != said(suspect):
        raise UserError(f"BASE is a {said(base)}, SUSPECT a {said(suspect)}: {_SAME}")


_SAYS_NOTHING = {"architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config", "name_or_path"}
"""Keys of a config that change with how a model was saved."""


def _other_config(base: Any, suspect: Any) -> tuple[str, ...]:
    """The keys whose values differ, which weights do not show."""
    one, two = (text_config(each).to_dict() for each in (base, suspect))
    keys = [key for key in sorted({*one, *two} - _SAYS_NOTHING) if not key.startswith("_")]
    differ = [f"{key} {one.get(key)} → {two.get(key)}" for key in keys if one.get(key) != two.get(key)]
    return (f"config differs, which is not judged: {', '.join(differ)}",) if differ else ()


def _other_base(base: str | Path | None, adapter: Path) -> tuple[str, ...]:
    """Whether an adapter says that it was made for another model; a name is compared by its last part."""
    held = read_json(adapter / CONFIG)
    named = held.get("base_model_name_or_path") if isinstance(held, dict) else None
    here = resolve_source(base)
    if not isinstance(named, str) or Path(named).name == Path(here).name:
        return ()
    return (f"the adapter says that it is of {display_name(named)}, and BASE is {display_name(here)}: is it the same?",)


_SAME = "an audit compares a checkpoint with the one that it was made from"


def _stored(checkpoint: Checkpoint) -> Weights:
    names = {bare_name(name): name for name in checkpoint.tensors}
    shapes = {bare: checkpoint.tensors[name].shape for bare, name in names.items()}
    dtypes = {bare: DTYPES[checkpoint.tensors[name].dtype] for bare, name in names.items()}
    return Weights(shapes, dtypes, lambda bare: checkpoint.read(names[bare]))


def _as_loaded(checkpoint: Checkpoint, layout: Layout, shapes: Shapes) -> Weights:
    """The parameters of the loaded model, made of what is stored, in the widest dtype that is."""
    stored = {DTYPES[tensor.dtype] for tensor in checkpoint.tensors.values() if tensor.is_float}
    dtype = max(stored, key=lambda each: each.itemsize)
    reader, names = CheckpointWeights(checkpoint, layout.family, dtype), {bare_name(name): name for name in shapes}

    def read(bare: str) -> Tensor:
        try:
            return reader.read(names[bare])
        except UserError:
            raise UserError(f"no tensor of {checkpoint.directory} becomes {names[bare]}, which BASE has") from None

    return Weights({bare: shapes[name] for bare, name in names.items()}, dict.fromkeys(names, dtype), read)


def _paired(layout: Layout, base: Weights, suspect: Weights) -> Sides:
    """The tensors of both, a tied unembedding as the token embedding that it is."""
    head, embedding = bare_name(layout.head), bare_name(layout.token_embedding)
    if head in base.shapes or head in suspect.shapes:
        base, suspect = (_with_head(each, head, embedding) for each in (base, suspect))
    roles = {name: _role(layout, name) for name in base.shapes if name in suspect.shapes}
    for name in roles:
        if base.shapes[name] != suspect.shapes[name]:
            here, there = list(base.shapes[name]), list(suspect.shapes[name])
            raise UserError(f"{name} has shape {here} in BASE and {there} in SUSPECT: {_SAME}")
    added = tuple(name for name in suspect.shapes if name not in base.shapes)
    return Sides(layout, base, suspect, roles, added)


def _role(layout: Layout, name: str) -> Role:
    role = layout.family.naming.role(name)
    return "other" if role is None else role[0]


def _with_head(weights: Weights, head: str, embedding: str) -> Weights:
    if head in weights.shapes:
        return weights
    shapes = {**weights.shapes, head: weights.shapes[embedding]}
    dtypes = {**weights.dtypes, head: weights.dtypes[embedding]}
    return Weights(shapes, dtypes, lambda name: weights.read(embedding if name == head else name))


@dataclass(frozen=True)
class _AdapterConfig:
    """What is needed of `adapter_config.json`."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


_PART = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")


def adapted(base: Weights, directory: Path) -> Weights:
    """What the base becomes when a LoRA adapter is merged, both parts of one that this package wrote in two.

    Raises:
        UserError: the adapter holds something else than plain LoRA pairs of tensors of the base.
    """
    folders = [directory, *([directory / SECOND] if (directory / SECOND / CONFIG).is_file() else [])]
    changes: dict[str, list[_Added]] = {}
    for folder in folders:
        for name, added in _changes(folder):
            if name not in base.shapes:
                raise UserError(f"{folder} changes {name}, which BASE has not; {_MERGE}")
            if added.shape != base.shapes[name]:
                raise UserError(f"{folder} changes {name} as {list(added.shape)}; BASE has {list(base.shapes[name])}")
            changes.setdefault(name, []).append(added)

    def read(name: str) -> Tensor:
        tensor = base.read(name)
        if name in changes:
            tensor = tensor.float()
        for added in changes.get(name, ()):
            added.add_(tensor)
        return tensor

    dtypes = {name: torch.float32 if name in changes else dtype for name, dtype in base.dtypes.items()}
    return Weights(base.shapes, dtypes, read)


_MERGE = "merge the adapter with PEFT and audit the checkpoint"


@dataclass(frozen=True, eq=False, repr=False)
class _Added(Value):
    """scale · left @ right, or a vector, in the orientation in which the tensor is stored."""

    left: Float[Tensor, "..."]
    right: Float[Tensor, "rank columns"] | None
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.left.shape) if self.right is None else (self.left.shape[0], self.right.shape[1])

    def add_(self, tensor: Float[Tensor, "..."]) -> None:
        """Change a tensor in place."""
        if self.right is None:
            tensor.add_(self.left, alpha=self.scale)
        else:
            tensor.addmm_(self.left, self.right, alpha=self.scale)


def _changes(folder: Path) -> Iterator[tuple[str, _Added]]:
    """Name of a tensor -> what is added to it."""
    config = read_record(folder / CONFIG, _AdapterConfig)
    if config.peft_type != "LORA" or config.use_dora or config.rank_pattern or config.alpha_pattern or config.r < 1:
        raise UserError(f"{folder} is not a plain LoRA adapter; {_MERGE}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        match = _PART.fullmatch(key)
        if match is None or not tensor.is_floating_point() or tensor.ndim != (1 if key.endswith("bias") else 2):
            raise UserError(f"{folder} holds {key}, which is no part of a plain LoRA pair; {_MERGE}")
        parts.setdefault(bare_name(f"{match[1]}.weight").removesuffix(".weight"), {})[match[2]] = tensor.float()
    for module, part in parts.items():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if (a in part) != (b in part) or (a in part and part[a].shape[0] != part[b].shape[1]):
                raise UserError(f"{folder} has half of a LoRA pair of {module}: it is damaged")
            if a in part:
                is_turned = config.fan_in_fan_out or a == "lora_embedding_A"
                left, right = (part[a].T, part[b].T) if is_turned else (part[b], part[a])
                yield f"{module}.weight", _Added(left, right, config.scale)
        if "lora_B.bias" in part:
            yield f"{module}.bias", _Added(part["lora_B.bias"], None, config.scale)
