"""The same edit as a PEFT LoRA adapter: a few megabytes, and reversible."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import sha256_file
from ..interventions import Intervention
from ..weights import EditFigures, TensorEdit, factors
from .block_weights import CheckpointWeights
from .checkpoint import Checkpoint
from .classify import build_skeleton, classify
from .compare import VerifyMode
from .export import Written, publish
from .lora import CONFIG, SECOND, LoRA, write_adapters
from .plan import plan_edits
from .prepare import Planned, plan_export
from .report import ExportReport
from .rewrite import ShardHashes


def export_adapter(
    source: str | Path | None,
    interventions: Intervention | Sequence[Intervention],
    out: str | Path,
    *,
    verify: VerifyMode = "auto",
    prompts: Sequence[str] | None = None,
    revision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write the edit as a LoRA adapter of the unedited model; put it on again with `load_adapter`.

    Raises:
        UserError: something cannot be carried; nothing is written then.
    """
    plan = plan_export(source, interventions, revision=revision, with_new_biases=True)

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


def load_adapter(model: Any, directory: str | Path) -> Any:
    """Put an exported adapter on its base model, the second part too where there is one."""
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("adapters need the peft library: pip install 'refusal_mi[export]'") from None
    directory = Path(directory)
    adapted = PeftModel.from_pretrained(model, directory)
    if (directory / SECOND / CONFIG).is_file():
        adapted.load_adapter(directory / SECOND, SECOND)
        adapted.base_model.set_adapter(  # type: ignore[operator]
            ["default", SECOND]
        )
    return adapted.eval()


def _hashes(source: Checkpoint, directory: Path) -> dict[str, ShardHashes]:
    found = {shard: ShardHashes(sha256_file(source.directory / shard), None) for shard in source.shards}
    written = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*.safetensors"))}
    return found | {name: ShardHashes(None, sha256_file(path)) for name, path in written.items()}


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
