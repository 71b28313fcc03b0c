"""Direction files for other tools: llama.cpp control vectors and lm-evaluation-harness steering files."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..directions import Direction
from ..errors import UserError
from ..files import write_whole
from ..interventions import Ablate, Add
from ..model.writers import Family, build_skeleton, family_of
from .streaming import ModelShape, write_site

_LLAMA_CPP_NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "cohere": "command-r",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "olmo3": "olmo2",
}

_FIRST_STEERABLE = 2


def write_gguf(path: Path, addition: Add, config: Any) -> None:
    """Write a llama.cpp control vector: `--control-vector FILE` adds it to every position.

    The stream entering our layer l is the output of block l − 1, which llama.cpp calls `direction.{l−1}`; it does not
    steer block 0.

    Raises:
        UserError: the layer cannot be steered there, or the vector does not fit the model.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("control vectors need the gguf library: pip install 'refusal_mi[export]'") from None
    direction = addition.direction
    layer = direction.layer if addition.layer is None else addition.layer
    _check_width(direction, config)
    if addition.positions != "all":
        raise UserError("a control vector acts at all positions")
    if not _FIRST_STEERABLE <= layer <= config.num_hidden_layers:
        raise UserError(
            f"layer {layer} has no control vector: llama.cpp steers the output of block 1 and later, which are our "
            f"layers {_FIRST_STEERABLE}..{config.num_hidden_layers}"
        )
    values = (direction.vector.detach().cpu().double() * addition.coefficient).float().numpy()

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", _LLAMA_CPP_NAMES.get(config.model_type, config.model_type))
        writer.add_uint32("controlvector.layer_count", 1)
        writer.add_tensor(f"direction.{layer - 1}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, write)


def read_gguf(path: Path) -> dict[int, Float[Tensor, " d_model"]]:
    """The vectors of a control vector file, by our layer index."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {
        int(tensor.name.removeprefix("direction.")) + 1: torch.from_numpy(tensor.data.copy())
        for tensor in reader.tensors
    }


def write_lm_eval(path: Path, intervention: Ablate | Add, config: Any, dtype: torch.dtype = torch.float32) -> None:
    """Write a steering file for `lm_eval --model steered --model_args steer_path=FILE.pt`.

    Ablation becomes `clamp` to 0 at the token embedding and at the module behind every attention and MLP write; the
    harness looks modules up inside the base model and clamps one direction at each.

    Args:
        dtype: of the vectors; the harness mixes them with activations, so it should be the model's own.

    Raises:
        UserError: the harness has no form for it.
    """
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"the harness takes a steering file that ends in .pt, not {path.name}")
    if intervention.positions != "all":
        raise UserError("a steering file acts at all positions")
    if isinstance(intervention, Ablate):
        unit = _one_unit(intervention)
        entries = {name: _entry("clamp", unit.to(dtype), 0.0) for name in _write_modules(intervention, config)}
        width = len(unit)
    else:
        layer = intervention.direction.layer if intervention.layer is None else intervention.layer
        if not 1 <= layer <= config.num_hidden_layers:
            raise UserError(f"layer {layer} has no steering entry: the harness adds to outputs of blocks (layers 1..)")
        vector = intervention.direction.vector.detach().cpu().to(dtype)
        model = build_skeleton(config)
        block = _in_base(f"{_block_list(model)}.{layer - 1}", model)
        entries = {block: _entry("add", vector, intervention.coefficient)}
        width = len(vector)
    if width != config.hidden_size:
        raise UserError(f"a direction of width {width} does not fit a model of width {config.hidden_size}")
    write_whole(path, lambda temporary: torch.save(entries, temporary))


def _entry(action: str, vector: Float[Tensor, " d_model"], coefficient: float) -> dict[str, Any]:
    return {"action": action, "steering_vector": vector, "steering_coefficient": coefficient, "bias": None}


def _one_unit(step: Ablate) -> Float[Tensor, " d_model"]:
    if len(step.units) != 1:
        raise UserError("the harness clamps one direction at each module: give one direction")
    if step.strength != 1 or step.constants is not None:
        raise UserError("the harness clamps to a constant in every write: only a whole, linear ablation has that form")
    return step.units[0]


def _write_modules(step: Ablate, config: Any) -> list[str]:
    """Modules, named inside the base model, whose outputs are the writes."""
    family, model = family_of(config.model_type), build_skeleton(config)
    named = dict(model.named_modules())
    found = []
    for point, _ in step.hooks(ModelShape(config.num_hidden_layers, config.hidden_size)):
        _, layer, site = point.split(".")
        if site == "hook_resid_pre":
            found += [name.rsplit(".", 1)[0] for name in _embeddings(family, model)]
            continue
        prefix = f"{_block_list(model)}.{layer}"
        component = site.removeprefix("hook_").removesuffix("_out")
        found.append(f"{prefix}.{write_site(family, named, prefix, component)}")
    return [_in_base(name, model) for name in found]


def _embeddings(family: Family, model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if family.naming.role(name) == ("embed", None)]


def _block_list(model: Any) -> str:
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return next(name for name, part in lists if len(part) == model.config.num_hidden_layers)


def _in_base(name: str, model: Any) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _check_width(direction: Direction, config: Any) -> None:
    if len(direction.vector) != config.hidden_size:
        raise UserError(
            f"a direction of width {len(direction.vector)} does not fit a model of width {config.hidden_size}"
        )
