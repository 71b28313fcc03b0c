"""Direction files for other tools: llama.cpp control vectors and lm-evaluation-harness steering files."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import at_home, write_saved, write_whole
from ..interventions import Ablate, Add, check_width
from ..model.families import family_of, text_config
from ..model.points import EMBEDDING, caa_layer
from ..model.writers import build_skeleton
from .streaming import ModelShape, blocks_of, write_site

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


def write_gguf(path: str | Path, addition: Add, config: Any) -> None:
    """Write a llama.cpp control vector: `--control-vector FILE` adds it to every position.

    The stream entering our layer l is the output of block l − 1, which llama.cpp calls `direction.{l−1}`; it does not
    steer block 0.

    Examples:
        >>> from transformers import AutoConfig
        >>> write_gguf("refusal.gguf", Add(direction), AutoConfig.from_pretrained(base))
        >>> open("refusal.gguf", "rb").read(4)
        b'GGUF'

    Raises:
        UserError: the layer cannot be steered there, or the vector does not fit the model.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("control vectors need the gguf library: pip install 'refusal_mi[export]'") from None
    direction, layer, text = addition.direction, addition.target, text_config(config)
    check_width(len(direction.vector), text.hidden_size)
    if addition.positions != "all":
        raise UserError("a control vector acts at all positions")
    if addition.point is not None:
        raise UserError(f"a control vector is added to the stream between blocks, not at {addition.point}")
    if not _FIRST_STEERABLE <= layer <= text.num_hidden_layers:
        raise UserError(
            f"layer {layer} has no control vector: llama.cpp steers the output of block 1 and later, which are our "
            f"layers {_FIRST_STEERABLE}..{text.num_hidden_layers}"
        )
    values = (direction.vector.detach().cpu().double() * addition.coefficient).float().numpy()

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", _LLAMA_CPP_NAMES.get(text.model_type, text.model_type))
        writer.add_uint32("controlvector.layer_count", 1)
        writer.add_tensor(f"direction.{caa_layer(layer)}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(at_home(path), write)


def write_lm_eval(
    path: str | Path, intervention: Ablate | Add, config: Any, dtype: torch.dtype = torch.float32
) -> None:
    """Write a steering file for `lm_eval --model steered --model_args steer_path=FILE.pt`.

    Ablation becomes `clamp` to 0 at the token embedding and at the module behind every attention and MLP write; the
    harness looks modules up inside the base model and clamps one direction at each.

    Examples:
        >>> from transformers import AutoConfig
        >>> write_lm_eval("steer.pt", Ablate(direction), AutoConfig.from_pretrained(base))
        >>> len(torch.load("steer.pt")) == 1 + 2 * model.cfg.n_layers
        True

    Args:
        dtype: of the vectors; the harness mixes them with activations, so it should be the model's own.

    Raises:
        UserError: the harness has no form for it.
    """
    path = at_home(path)
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"the harness takes a steering file that ends in .pt, not {path.name}")
    if intervention.positions != "all":
        raise UserError("a steering file acts at all positions")
    if intervention.point is not None:
        raise UserError(f"a steering file is written for the stream and all writes, not for {intervention.point}")
    text = text_config(config)
    if isinstance(intervention, Ablate):
        unit = _one_unit(intervention)
        check_width(len(unit), text.hidden_size)
        entries = {name: _entry("clamp", unit.to(dtype), 0.0) for name in _write_modules(intervention, config)}
    else:
        layer = intervention.target
        if not 1 <= layer <= text.num_hidden_layers:
            raise UserError(f"layer {layer} has no steering entry: the harness adds to outputs of blocks (layers 1..)")
        vector = intervention.direction.vector.detach().cpu().to(dtype)
        check_width(len(vector), text.hidden_size)
        model = build_skeleton(config)
        block = _in_base(list(blocks_of(model))[caa_layer(layer)], model)
        entries = {block: _entry("add", vector, intervention.coefficient)}
    write_saved(path, entries)


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
    family, model = family_of(config), build_skeleton(config)
    modules = []
    for point, _ in step.hooks(ModelShape(text_config(config).num_hidden_layers, text_config(config).hidden_size)):
        if point == EMBEDDING:
            names = [name for name, _ in model.named_parameters() if family.naming.role(name) == ("embed", None)]
            modules += [name.rsplit(".", 1)[0] for name in names]
        else:
            modules.append(write_site(family, model, point))
    return [_in_base(name, model) for name in modules]


def _in_base(name: str, model: Any) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")
