"""From interventions to an edit of each writer: the same objects that drive the hooks, checked before any write."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..interventions import Ablate, Add, Intervention, Interventions, as_interventions, check_width
from ..model.guards import guarded, read_config
from ..model.loading import resolve_source
from ..model.points import caa_layer, resid_hook, write_hook, write_hooks
from ..model.writers import Layout, Writer, classify
from ..values import Value
from ..weights import Projection, Shift, TensorEdit, writer_projection
from .checkpoint import OTHER_WEIGHTS, Checkpoint, open_checkpoint
from .rewrite import Head

Gain = Callable[[str], Float[Tensor, " d_model"]]
"""Reads a stored norm weight."""
Step = Ablate | Add


def as_steps(interventions: Interventions) -> tuple[Step, ...]:
    """The interventions, if each has a weight form.

    Raises:
        UserError: one acts at some positions only, or is neither `Ablate` nor `Add`.
    """
    return tuple(_checked(step) for step in as_interventions(interventions))


def _checked(step: Intervention) -> Step:
    if not isinstance(step, Ablate | Add):
        raise UserError(f"{type(step).__name__} has no weight form: Ablate (of writes) and Add have one")
    if step.positions != "all":
        raise UserError(f"positions={step.positions!r} has no weight form: weights act at all positions")
    if step.point is not None:
        raise UserError(
            f"what acts at {step.point} alone has no weight form: Ablate takes layers= and components=, Add a layer"
        )
    numbers = [step.coefficient] if isinstance(step, Add) else [step.strength, *(step.constants or ())]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"strengths, coefficients and constants must be finite, not {numbers}")
    return step


def without_embedding(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same interventions with the embedding left alone, as a tied embedding must be if it is to stay tied.

    Raises:
        UserError: one of them needs the embedding.
    """
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, Add):
            if step.target == 0:
                raise UserError("adding at layer 0 needs the token embedding, which --keep-tied leaves alone")
            kept.append(step)
        elif step.constants is not None:
            raise UserError("an affine ablation writes its constant with the embedding, which --keep-tied leaves alone")
        else:
            rest = tuple(part for part in step.components if part != "embed")
            if not rest:
                raise UserError("only the token embedding was to be edited, and --keep-tied leaves it alone")
            kept.append(replace(step, components=rest))
    return tuple(kept)


def plan_edits(
    layout: Layout, steps: Sequence[Step], gain: Gain, *, with_new_biases: bool = False
) -> dict[str, TensorEdit]:
    """What is done to each tensor; tensors that are not named stay as they are.

    Args:
        with_new_biases: an addition may name the bias of a linear MLP output that has none yet.

    Raises:
        UserError: a direction does not fit the model, or an addition finds no bias that could carry it.
    """
    edits: dict[str, list[TensorEdit]] = {}
    for step in sorted(steps, key=_is_late_addition):
        parts = _ablation(layout, step, gain) if isinstance(step, Ablate) else _addition(layout, step, with_new_biases)
        for name, edit in parts.items():
            edits.setdefault(name, []).append(edit)
    return {
        name: TensorEdit(several[0].axis, tuple(step for edit in several for step in edit.steps))
        for name, several in edits.items()
    }


def _is_late_addition(step: Step) -> bool:
    """An addition past the embedding acts after every ablation of the write that carries it."""
    return isinstance(step, Add) and step.target > 0


def _ablation(layout: Layout, step: Ablate, gain: Gain) -> dict[str, TensorEdit]:
    check_width(step.basis.shape[-1], layout.d_model)
    points = set(write_hooks(layout.n_layers, layers=step.layers, components=step.components))
    edits: dict[str, TensorEdit] = {}
    if step.strength == 0:
        return edits
    for writer in layout.writers:
        if writer.point not in points:
            continue
        scale = None if writer.post_norm is None else gain(writer.post_norm).double() + layout.family.gain_offset
        try:
            parts: list[Projection | Shift] = [writer_projection(step.basis, step.strength, scale)]
        except UserError as error:
            raise UserError(f"{writer.name}: {error}") from None
        if writer.is_token_embedding and step.offset is not None:
            parts.append(Shift(step.offset / layout.embedding_scale))
        edits[writer.name] = TensorEdit(writer.axis, tuple(parts))
    return edits


def _addition(layout: Layout, step: Add, with_new_biases: bool) -> dict[str, TensorEdit]:
    vector = step.direction.vector.detach().cpu().double() * step.coefficient
    check_width(len(vector), layout.d_model)
    layer = step.target
    resid_hook(layer, layout.n_layers)  # refuses layers that do not exist
    if step.coefficient == 0:
        return {}
    if layer == 0:
        shift = Shift(vector / layout.embedding_scale)
        return {layout.token_embedding: TensorEdit(1, (shift,))}
    shift, point = Shift(vector / layout.residual_scale), write_hook("mlp", caa_layer(layer))
    last = [writer for writer in layout.writers if writer.point == point and writer.post_norm is None]
    # Every expert's bias is shifted alike: where experts have biases, their weights sum to one.
    edits = {writer.name: TensorEdit(writer.axis, (shift,)) for writer in last if writer.is_bias}
    if not edits and with_new_biases:
        linear = [writer.name.removesuffix("weight") for writer in last if _is_linear(writer)]
        edits = {f"{stem}bias": TensorEdit(0, (shift,)) for stem in linear}
    if not edits:
        raise UserError(
            f"nothing carries an addition at layer {layer}: the MLP of block {caa_layer(layer)} has no bias, or a norm "
            "follows it; use --adapter (linear MLPs without a norm after them) or export vector --format gguf"
        )
    return edits


def _is_linear(writer: Writer) -> bool:
    """Whether this is the weight of a single linear output, which could have a bias."""
    return writer.name.endswith(".weight") and ".experts." not in writer.name and "shared" not in writer.name


def directions_of(step: Step) -> Sequence[Direction | Tensor]:
    """The directions that an intervention is about; bare vectors do not say where they were read."""
    return (step.direction,) if isinstance(step, Add) else step.each


def describe_step(step: Step) -> dict[str, Any]:
    """An intervention as JSON values; a direction's SHA-256 is that of its float64 values."""
    directions = [_described(direction) for direction in directions_of(step)]
    if isinstance(step, Add):
        return {"kind": "add", "coefficient": step.coefficient, "layer": step.target, "directions": directions}
    return {
        "kind": "ablate",
        "strength": step.strength,
        "layers": None if step.layers is None else list(step.layers),
        "components": list(step.components),
        "constants": None if step.constants is None else list(step.constants),
        "directions": directions,
    }


def _described(direction: Direction | Tensor) -> dict[str, Any]:
    if isinstance(direction, Direction):
        return {**direction.describe(), "sha256": _digest(direction.vector)}
    norm = direction.double().norm().item()
    return {"pos": None, "layer": None, "hook_name": None, "norm": norm, "sha256": _digest(direction)}


def _digest(vector: Float[Tensor, " d_model"]) -> str:
    return hashlib.sha256(vector.detach().cpu().double().numpy().tobytes()).hexdigest()


NORM_NOTE = (
    "a norm follows every writer of this architecture: nothing is written along the direction, but the scale of the "
    "rest differs slightly from the hooked model's; no weights can be exact here"
)


IMAGE_NOTE = (
    "what makes embeddings of images was left alone: in prompts with images it may still write along the direction, "
    "where the hooks would remove it"
)


@dataclass(frozen=True, eq=False, repr=False)
class Planned(Value):
    """An export that can be made."""

    checkpoint: Checkpoint
    layout: Layout
    steps: tuple[Step, ...]
    edits: Mapping[str, TensorEdit]
    source: str
    revision: str | None
    keeps_tie: bool
    """The token embedding is tied and is left alone, in the hooks too."""

    @property
    def is_untied(self) -> bool:
        """Whether the unembedding must be kept apart from an edited token embedding."""
        return self.layout.is_tied and self.layout.token_embedding in self.edits

    @property
    def untied_head(self) -> Head | None:
        """The head that must be saved by itself; None where the checkpoint already has one."""
        present = self.layout.head in self.checkpoint.tensors
        return Head(self.layout.head, self.layout.token_embedding) if self.is_untied and not present else None

    @property
    def head_bytes(self) -> int:
        """What that head adds."""
        head = self.untied_head
        return 0 if head is None else self.checkpoint.tensors[head.source].n_bytes

    @property
    def is_behind_a_norm(self) -> bool:
        """Whether a norm follows a writer that is edited, so that no weights can do exactly what the hooks did."""
        return any(writer.post_norm is not None and writer.name in self.edits for writer in self.layout.writers)

    @property
    def notes(self) -> list[str]:
        """What a user of the checkpoint should know."""
        notes = []
        if self.is_untied:
            size = f" ({self.head_bytes / 2**20:.1f} MiB more)" if self.untied_head is not None else ""
            notes.append(f"the unembedding, tied to the token embedding before, is saved by itself{size}")
            ignored = self.layout.family.tied_only
            notes.append(
                f"transformers honors the untied unembedding, but {ignored}: for these export with --keep-tied"
                if ignored
                else "transformers honors the untied unembedding; whether another program does was not tried"
            )
        if self.keeps_tie:
            notes.append("the token embedding is tied and was left alone; the comparison leaves it alone too")
        if self.layout.sees_images:
            notes.append(IMAGE_NOTE)
        if self.is_behind_a_norm:
            notes.append(NORM_NOTE)
        return notes


def plan_export(
    source: str | Path | None,
    interventions: Interventions,
    *,
    keep_tied: bool = False,
    with_new_biases: bool = False,
    revision: str | None = None,
    name: str | None = None,
) -> Planned:
    """Read headers and config, classify every tensor, and say what would be done to each.

    Args:
        name: what the record calls the source, where that is not its directory or hub id.

    Raises:
        UserError: the checkpoint or the interventions cannot be exported.
    """
    steps = as_steps(interventions)
    directory, commit = local_files(source, revision)
    checkpoint = open_checkpoint(directory)
    config = read_config(directory)
    layout = classify(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    keeps_tie = keep_tied and layout.is_tied
    if keeps_tie:
        steps = without_embedding(steps)
    edits = plan_edits(layout, steps, checkpoint.read, with_new_biases=with_new_biases)
    return Planned(checkpoint, layout, steps, edits, name or resolve_source(source), commit, keeps_tie)


def local_files(source: str | Path | None, revision: str | None) -> tuple[Path, str | None]:
    """The directory of a model, downloaded if need be, and its hub commit.

    Raises:
        UserError: the hub has no such model or revision, or cannot be reached.
    """
    name = resolve_source(source)
    if Path(name).is_dir():
        return Path(name), None
    if Path(name).is_file():
        raise UserError(f"{name} is quantized and cannot be edited: export the checkpoint that it was made from")
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        patterns = [*unwanted, "original/*", "consolidated*"]
        with guarded(name):
            path = Path(snapshot_download(name, revision=revision, ignore_patterns=patterns))
    except Exception as error:  # the client's transport raises classes of its own, which differ between versions
        where = name if revision is None else f"{name} at revision {revision}"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot get the files of {where} from the hub: {reason}") from None
    return path, path.name
