"""Files of a PEFT LoRA adapter: which change goes under which name, and who does not read it.

Linear writers become LoRA pairs (their biases and additions `lora_bias`), embeddings embedding-LoRA, fused experts
`target_parameters`. PEFT allows `lora_bias` in no adapter that also has one of the latter two; where both are needed,
these go to a second adapter in the folder `embedding`, and both must be active.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import write_json
from ..values import Value
from .plan import NORM_NOTE, Planned

CONFIG, WEIGHTS, SECOND = "adapter_config.json", "adapter_model.safetensors", "embedding"


@dataclass(frozen=True, eq=False, repr=False)
class LoRA(Value):
    """One adapted parameter: its change is left @ right, or a vector for a bias."""

    left: Float[Tensor, "*experts out rank"]
    right: Float[Tensor, "*experts rank in"]
    removed: float = 0.0
    """‖change‖ / ‖parameter‖ (Frobenius)."""


def write_adapters(
    plan: Planned, changes: Mapping[str, LoRA], shapes: Mapping[str, tuple[int, ...]], directory: Path
) -> list[str]:
    """Write one adapter or two, and say what their users should know.

    Args:
        shapes: of every parameter of the loaded model.
    """
    from safetensors.torch import save_file

    linear = {name: lora for name, lora in changes.items() if _kind(plan, name) == "linear"}
    biases = {name: lora for name, lora in changes.items() if _kind(plan, name) == "bias"}
    others = {name: lora for name, lora in changes.items() if _kind(plan, name) in ("embedding", "parameter")}
    for name in biases:  # a bias needs a pair to hang on; an empty one changes nothing
        weight = name.removesuffix("bias") + "weight"
        linear.setdefault(weight, _empty(plan, shapes[weight]))
    groups: list[tuple[Path, Mapping[str, LoRA], Mapping[str, LoRA]]] = []
    if biases and others:
        groups = [(directory, linear, biases), (directory / SECOND, others, {})]
    else:
        groups = [(directory, {**linear, **others}, biases)]
    for folder, pairs, own_biases in groups:
        folder.mkdir(exist_ok=True)
        rank = max((lora.right.shape[-2] for lora in pairs.values()), default=1)
        tensors: dict[str, Tensor] = {}
        for name, lora in pairs.items():
            bias = own_biases.get(name.removesuffix("weight") + "bias")
            tensors |= _tensors(plan, name, lora, bias, rank, bool(own_biases))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / CONFIG, _config(plan, pairs, rank, bool(own_biases)))
    return _notes(plan, biases, others, len(groups) == 2)


def _kind(plan: Planned, name: str) -> str:
    role = plan.layout.family.naming.role(name)
    if role is not None and role[0] == "embed":
        return "embedding"
    if not name.endswith((".weight", ".bias")):
        return "parameter"
    return "bias" if name.endswith(".bias") else "linear"


def _tensors(
    plan: Planned, name: str, lora: LoRA, bias: LoRA | None, rank: int, with_biases: bool
) -> dict[str, Tensor]:
    """The entries of one parameter in `adapter_model.safetensors`."""
    left, right = _padded(lora, rank)
    kind, stem = _kind(plan, name), f"base_model.model.{name.rsplit('.', 1)[0]}"
    if kind == "embedding":
        return {f"{stem}.lora_embedding_A": right.float(), f"{stem}.lora_embedding_B": left.float()}
    if kind == "parameter":
        return _parameter_tensors(plan, stem, name, left, right)
    pair = {f"{stem}.lora_A.weight": right.float(), f"{stem}.lora_B.weight": left.float()}
    if not with_biases:
        return pair
    change = torch.zeros(len(left)) if bias is None else (bias.left @ bias.right)[:, 0]
    return {**pair, f"{stem}.lora_B.bias": change.float()}


def _parameter_tensors(plan: Planned, stem: str, name: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Expert parameters: PEFT nests one wrapper per parameter of a module and stacks the experts' ranks."""
    wrapper = f"{stem}.base_layer" if name in _inner_parameters(plan) else stem
    if left.ndim == 2:  # a bias [E, d_model]: PEFT's change is B A with B [E, rank], A [rank, d_model]
        return {f"{wrapper}.lora_A.weight": left.T.float(), f"{wrapper}.lora_B.weight": right.T.float()}
    stacked_a = rearrange(right, "expert rank feature -> (expert rank) feature")
    stacked_b = rearrange(left, "expert out rank -> out (rank expert)")
    return {f"{wrapper}.lora_A.weight": stacked_a.float(), f"{wrapper}.lora_B.weight": stacked_b.float()}


def _inner_parameters(plan: Planned) -> set[str]:
    """Parameters whose wrapper lies inside that of another parameter of the same module."""
    biased = {writer.name for writer in plan.layout.writers if writer.name.endswith("_bias")}
    return {name.removesuffix("_bias") for name in biased if name in plan.edits}


def _padded(lora: LoRA, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - lora.right.shape[-2]
    left = torch.nn.functional.pad(lora.left, (0, missing))
    return left, torch.nn.functional.pad(lora.right, (0, 0, 0, missing))


def _empty(plan: Planned, shape: tuple[int, ...]) -> LoRA:
    n_in = shape[0] if plan.layout.family.is_in_out else shape[1]
    return LoRA(torch.zeros(plan.layout.d_model, 1), torch.zeros(1, n_in))


def _config(plan: Planned, pairs: Mapping[str, LoRA], rank: int, with_biases: bool) -> dict[str, Any]:
    parameters = sorted(name for name in pairs if _kind(plan, name) == "parameter")
    modules = sorted(name.rsplit(".", 1)[0] for name in pairs if _kind(plan, name) != "parameter")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.source,
        "revision": plan.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": with_biases,
        "fan_in_fan_out": plan.layout.family.is_in_out,
        "init_lora_weights": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _notes(plan: Planned, biases: Mapping[str, Any], others: Mapping[str, Any], is_split: bool) -> list[str]:
    notes = []
    if is_split:
        notes.append(
            "two adapters belong together, this folder and embedding/: load both with refusal_mi.export.load_adapter"
        )
    if biases:
        notes.append("biases use lora_bias, which vLLM and llama.cpp's converter do not carry")
    if any(_kind(plan, name) == "parameter" for name in others):
        notes.append("fused experts use target_parameters, which vLLM and llama.cpp's converter do not carry")
    if any(_kind(plan, name) == "embedding" for name in others):
        notes.append("the embedding uses embedding-LoRA, which vLLM and llama.cpp's converter may not carry")
        if plan.layout.is_tied:
            notes.append("the embedding is tied: do not merge this adapter, export a checkpoint instead")
    if plan.is_behind_a_norm:
        notes.append(NORM_NOTE)
    return notes


def load_adapter(model: Any, directory: str | Path) -> Any:
    """Put an exported adapter on its base model, the second part too where there is one.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> report = export_adapter(base, Ablate(direction), "adapter", verify="none")
        >>> adapted = load_adapter(AutoModelForCausalLM.from_pretrained(base), "adapter")
        >>> any("lora" in name for name, _ in adapted.named_parameters())
        True
    """
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
