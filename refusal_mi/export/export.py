"""Exports: a checkpoint, an adapter, a model in memory; with the record and the card that say what was done."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..directions import Direction
from ..errors import UserError
from ..files import at_home, sha256_file, write_json, write_text
from ..interventions import Ablate, Add, Intervention, Interventions
from ..markdown import without_media
from ..model.families import text_config
from ..model.provenance import display_name, versions
from ..model.writers import build_skeleton, classify
from ..text.given import Prompts
from ..values import Value
from ..weights import EditFigures, TensorEdit, edit_, factors
from .adapter import LoRA, write_adapters
from .checkpoint import RECORD, Checkpoint, copy_companions, fresh_directory
from .held import files_of
from .plan import Planned, Step, as_steps, describe_step, directions_of, plan_edits, plan_export, without_embedding
from .rewrite import ExportDtype, ShardHashes, byte_bar, rewrite, write_config
from .streaming import CheckpointWeights
from .verify import Verification, VerifyMode, prepare_comparison

UNVERIFIED = "UNVERIFIED"


@dataclass(frozen=True, eq=False, repr=False)
class ExportReport(Value):
    """What was exported, and how well it matches the hooks.

    Examples:
        >>> report = export_checkpoint(base, Ablate(direction), "edited", verify="none")
        >>> report.kind, report.is_verified
        ('checkpoint', None)
    """

    path: Path
    kind: Literal["checkpoint", "adapter"]
    source: str
    revision: str | None
    steps: Sequence[Step]
    figures: Mapping[str, EditFigures]
    """Edited tensor -> the fraction removed, and what is left."""
    hashes: Mapping[str, ShardHashes]
    dtype: ExportDtype
    is_untied: bool
    keeps_tie: bool
    """The tied embedding was left alone, in the hooks it is compared with too."""
    head_bytes: int
    """What the untied head adds."""
    left_behind: Sequence[str]
    """Files that were not copied: the unedited weights in other formats."""
    notes: Sequence[str]
    seconds: float
    verification: Verification | None = None
    """None if none was asked for."""

    @property
    def is_verified(self) -> bool | None:
        """Whether all limits are kept; None without verification."""
        return None if self.verification is None else self.verification.passed

    def describe(self) -> dict[str, Any]:
        """`refusal_mi.json`."""
        record = {
            "kind": self.kind,
            "source": self.source,
            "revision": self.revision,
            "interventions": [describe_step(step) for step in self.steps],
            "edited_tensors": {name: asdict(figure) for name, figure in self.figures.items()},
            "sha256": {shard: asdict(both) for shard, both in self.hashes.items()},
            "dtype": self.dtype,
            "untied_head_bytes": self.head_bytes if self.is_untied else None,
            "kept_tie": self.keeps_tie,
            "left_behind": list(self.left_behind),
            "notes": list(self.notes),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
            "verification": None if self.verification is None else self.verification.describe(),
        }
        return _finite(record)


def write_record(report: ExportReport, directory: Path) -> None:
    """Write the record, and the mark of an export that misses its limits."""
    write_json(directory / RECORD, report.describe())
    if report.verification is not None and not report.verification.passed:
        failed = "\n".join(report.verification.failures)
        write_text(directory / UNVERIFIED, f"This export does not match the hooked model:\n{failed}\n")


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity: an overflow is reported, not a reason to lose the report."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TITLES = {"checkpoint": "Edited weights", "adapter": "LoRA adapter"}


def card(report: ExportReport) -> str:
    """The text of `README.md`, which loads nothing; the source's own card lies beside it as `README.source.md`."""
    removed = [figure.removed for figure in report.figures.values()]
    lines = [
        "---",
        "tags: [refusal-direction, interpretability]",
        *([f"base_model: {report.source}"] if _is_hub_id(report.source) else []),
        "---",
        "",
        f"# {_TITLES[report.kind]} of {display_name(report.source)}",
        "",
        f"Made with refusal_mi from `{report.source}`"
        + (f" at revision `{report.revision}`" if report.revision else "")
        + ". The edit changes how the model reacts to harmful requests; it is meant for research on that.",
        "",
        "## What was changed",
        "",
        *[f"- {_sentence(step)}" for step in report.steps],
        f"- {len(removed)} tensors were edited"
        + (f"; of a tensor, {min(removed):.2%} to {max(removed):.2%} was removed" if removed else ""),
        *[f"- {note}" for note in report.notes],
        *[f"- {name} was not copied: it may hold unedited weights" for name in report.left_behind],
        "",
        "## How closely it matches the hooked model",
        "",
        *_measured(report),
        "",
        "## How to undo it",
        "",
        _undo(report),
        "",
        "`refusal_mi.json` lists every edited tensor, the directions, versions and hashes.",
        "",
    ]
    return without_media("\n".join(lines))


def _is_hub_id(source: str) -> bool:
    return not Path(source).is_absolute() and " " not in source


def _sentence(step: Step) -> str:
    directions = directions_of(step)
    places = ", ".join(
        f"position {each.position}, layer {each.layer}" if isinstance(each, Direction) else "a bare vector"
        for each in directions
    )
    if isinstance(step, Add):
        return f"{step.coefficient} times the direction ({places}) is added to the stream entering layer {step.target}"
    blocks = "all blocks" if step.layers is None else f"blocks {', '.join(map(str, step.layers)) or 'none'}"
    text = f"{step.strength} of the span of {len(directions)} direction(s) ({places}) is removed from the writes of "
    text += f"{', '.join(step.components)} of {blocks}"
    if step.constants is not None:
        text += f"; instead the stream has the constant components {list(step.constants)}"
    return text


def _measured(report: ExportReport) -> list[str]:
    result = report.verification
    if result is None:
        return ["Not measured (`--verify none`)."]
    verdict = "within" if result.passed else "BEYOND"
    lines = [
        f"{result.n_prompts} prompts, {result.n_positions} positions ({result.mode}); {verdict} the limits.",
        "",
        f"- largest logit difference {result.max_logit_difference:.1e} "
        f"(largest logit {result.largest_logit:.1f}; the edit itself moves logits by up to {result.max_effect:.1e})",
        f"- mean KL to the float32 hooked model {result.mean_kl_nats:.1e} nats"
        + (f" (hooked model in this dtype: {result.hooked_kl_nats:.1e})" if result.hooked_kl_nats is not None else ""),
        f"- equal greedy tokens {result.same_greedy:.1%}, over {result.n_new_tokens} new tokens of each prompt",
    ]
    return lines + [f"- {failure}" for failure in result.failures]


def _undo(report: ExportReport) -> str:
    if report.kind == "adapter":
        return f"Unload or disable the adapter: the weights of `{report.source}` were not changed."
    revision = f" at revision `{report.revision}`" if report.revision else ""
    others = (
        "Tensors that are not listed as edited have their original bytes."
        if report.dtype == "keep"
        else f"Every other floating-point tensor was only converted to {report.dtype}."
    )
    return (
        f"Use the original, `{report.source}`{revision}: a projection throws away what it removes, so these weights "
        f"alone cannot be turned back. {others}"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Written(Value):
    """What a writer of files put into the new directory."""

    figures: Mapping[str, EditFigures]
    hashes: Mapping[str, ShardHashes]
    notes: Sequence[str]
    left_behind: Sequence[str] = ()


def export_checkpoint(
    source: Any,
    interventions: Interventions,
    out: str | Path,
    *,
    keep_tied: bool = False,
    dtype: ExportDtype = "keep",
    verify: VerifyMode = "auto",
    prompts: Prompts | None = None,
    revision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a checkpoint that loads as its source does and behaves like the hooked model.

    Examples:
        >>> report = export_checkpoint(model, Ablate(direction), "edited", verify="none")
        >>> report.kind
        'checkpoint'

    Args:
        source: what `load_model` takes: a local directory, a hub id, None for the embedded model, an HF model or a
            bridge. A model is exported as the checkpoint that it was loaded from, and where it has other weights than
            that (it was trained, edited or merged), another config, chat template or vocabulary, as it is.
        interventions: `Ablate` and `Add` objects, the same that drive the hooks.
        out: the new directory.
        keep_tied: leave a tied token embedding alone, so that it can stay tied.
        dtype: of the written floating-point tensors.
        verify: "full" loads hooked model and export; "streaming" compares block by block; "auto" chooses by memory.
        prompts: what the two are compared on; None: a few bundled ones.
        force: replace an export that lies there.

    Raises:
        UserError: something cannot be exported; nothing is written then.
    """
    with files_of(source, revision) as (files, commit, name):
        plan = plan_export(files, interventions, keep_tied=keep_tied, revision=commit, name=name)

        def write(directory: Path) -> Written:
            left = copy_companions(plan.checkpoint, directory)
            with byte_bar(plan.checkpoint.n_bytes, "exporting") as advance:
                done = rewrite(
                    plan.checkpoint, directory, plan.edits, head=plan.untied_head, dtype=dtype, advance=advance
                )
            write_config(plan.checkpoint, directory, is_untied=plan.is_untied, dtype=dtype)
            return Written(done.figures, done.hashes, plan.notes, left)

        return publish(plan, "checkpoint", out, write, dtype=dtype, verify=verify, prompts=prompts, force=force)


def publish(
    plan: Planned,
    kind: Literal["checkpoint", "adapter"],
    out: str | Path,
    write: Callable[[Path], Written],
    *,
    dtype: ExportDtype = "keep",
    verify: VerifyMode,
    prompts: Prompts | None,
    force: bool,
) -> ExportReport:
    """Write into a directory that has no name yet, compare with the hooked model, add record and card, name it."""
    start = time.perf_counter()
    is_adapter = kind == "adapter"
    original = plan.checkpoint.directory
    with fresh_directory(out, original, force=force) as temporary:
        comparison = prepare_comparison(plan, verify, prompts, is_adapter=is_adapter)
        written = write(temporary)
        verification = None
        if comparison is not None:
            places = (original, temporary) if is_adapter else (temporary, None)
            verification = comparison.measure(*places, figures=written.figures)
        report = ExportReport(
            path=at_home(out).absolute(),
            kind=kind,
            source=plan.source,
            revision=plan.revision,
            steps=plan.steps,
            figures=written.figures,
            hashes=written.hashes,
            dtype=dtype,
            is_untied=plan.is_untied and not is_adapter,
            keeps_tie=plan.keeps_tie,
            head_bytes=0 if is_adapter else plan.head_bytes,
            left_behind=written.left_behind,
            notes=written.notes,
            seconds=time.perf_counter() - start,
            verification=verification,
        )
        write_record(report, temporary)
        write_text(temporary / "README.md", card(report))
    return report


def orthogonalize_(
    model: Any, direction: Direction | Tensor | Sequence[Direction | Tensor] | Intervention, *, keep_tied: bool = False
) -> dict[str, EditFigures]:
    """Edit the weights of a `transformers` causal language model in place, so that it does what the hooks did.

    A tied unembedding is untied first: it keeps the unedited embedding.

    Args:
        model: a `PreTrainedModel`, not a hooked one.
        direction: ablated everywhere; or an `Ablate` or `Add`.
        keep_tied: leave a tied embedding alone instead of untying it.

    Returns:
        Per edited parameter, how much was removed and what is left.

    Raises:
        UserError: the model is not a `PreTrainedModel`, or the intervention has no weight form in it.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"orthogonalize_ edits a transformers model, not a {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    steps = as_steps(direction if isinstance(direction, Intervention) else Ablate(direction))
    parameters = dict(model.named_parameters())
    layout = classify(model.config, {name: tuple(value.shape) for name, value in parameters.items()}, skeleton=model)
    if layout.is_tied and keep_tied:
        steps = without_embedding(steps)
    edits = plan_edits(layout, steps, lambda name: parameters[name].detach().cpu())
    if layout.is_tied and layout.token_embedding in edits:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in (model.config, text_config(model.config)):
            config.tie_word_embeddings = False
    figures = {}
    with torch.no_grad():
        for name, edit in edits.items():
            # Edited on the CPU: not every accelerator computes in float64.
            copy = parameters[name].detach().cpu().clone().contiguous()
            figures[name] = edit_(copy, edit)
            parameters[name].copy_(copy)
    return figures


def export_adapter(
    source: Any,
    interventions: Interventions,
    out: str | Path,
    *,
    verify: VerifyMode = "auto",
    prompts: Prompts | None = None,
    revision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write the edit as a LoRA adapter of the unedited model; put it on again with `load_adapter`.

    Examples:
        >>> export_adapter(base, Ablate(direction), "adapter", verify="none").kind
        'adapter'

    Args:
        source: as `export_checkpoint` takes it.

    Raises:
        UserError: something cannot be carried; nothing is written then.
    """
    with files_of(source, revision) as (files, commit, name):
        plan = plan_export(files, interventions, revision=commit, with_new_biases=True, name=name)

        if not plan.edits:
            raise UserError("nothing is changed, and an adapter without a change cannot be loaded")

        def write(directory: Path) -> Written:
            skeleton = build_skeleton(plan.layout.config)
            shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters()}
            changes = _changes(plan, skeleton, shapes)
            notes = write_adapters(plan, changes, shapes, directory)
            figures = {name: EditFigures(lora.removed, None) for name, lora in changes.items()}
            return Written(figures, _hashes(plan.checkpoint, directory), notes)

        return publish(plan, "adapter", out, write, verify=verify, prompts=prompts, force=force)


def _hashes(source: Checkpoint, directory: Path) -> dict[str, ShardHashes]:
    before = {shard: ShardHashes(sha256_file(source.directory / shard), None) for shard in source.shards}
    written = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*.safetensors"))}
    return before | {name: ShardHashes(None, sha256_file(path)) for name, path in written.items()}


def _changes(plan: Planned, skeleton: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoRA]:
    """The low-rank change of every parameter, under the names that the loaded model gives them."""
    layout = classify(plan.layout.config, shapes, skeleton=skeleton)
    weights = CheckpointWeights(plan.checkpoint, layout.family, torch.float32)
    edits = plan_edits(layout, plan.steps, weights.read, with_new_biases=True)
    return {
        name: _change(weights.read(name) if name in shapes else torch.zeros(layout.d_model), edit)
        for name, edit in edits.items()
    }


def _change(tensor: Float[Tensor, "..."], edit: TensorEdit) -> LoRA:
    """The change of one parameter; experts [E, ...] keep their first axis, in the orientation [out, in]."""
    if tensor.ndim == 3:
        out_in = tensor if edit.axis == 1 else tensor.transpose(1, 2)
        pairs = [factors(expert, TensorEdit(0, edit.steps)) for expert in out_in]
        left, right = torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])
    else:
        columns = tensor[:, None] if tensor.ndim == 1 else tensor if edit.axis == 0 else tensor.T
        left, right = factors(columns, TensorEdit(0, edit.steps))
    squared = ((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0)
    size = tensor.double().norm()
    return LoRA(left, right, (squared.sqrt() / size).item() if size else 1.0)
