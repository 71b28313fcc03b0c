"""The same weights as a `HookedTransformer` of TransformerLens 3.9, without its hub."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def hf_model_of(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The plain HF model of a directory."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def hooked_transformer(directory: Path, hf_model: PreTrainedModel | None = None, **processing: bool) -> Any:
    """The model of a directory as people get it from `HookedTransformer.from_pretrained_no_processing`.

    Args:
        processing: what is done to the weights instead, as `center_writing_weights=True`.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict

    hf_model = hf_model_of(directory) if hf_model is None else hf_model
    asked = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    asked |= processing
    dtype = hf_model.dtype
    with TemporaryDirectory() as folder:
        named = Path(folder) / "checkpoint"  # names that contain "llama" or "gemma" are looked up in the hub
        shutil.copytree(directory, named)
        config = json.loads((named / "config.json").read_text())
        config.setdefault("n_ctx", config.get("n_positions"))  # as gpt2's own config has it
        (named / "config.json").write_text(json.dumps(config))
        cfg = get_pretrained_model_config(str(named), device="cpu", dtype=dtype, fold_ln=asked["fold_ln"])
        weights = get_pretrained_state_dict(str(named), cfg, hf_model, dtype=dtype)
    cfg.tokenizer_name = None
    model = HookedTransformer(cfg, None)
    model.load_and_process_state_dict(weights, **asked)
    model.tokenizer = AutoTokenizer.from_pretrained(directory)
    return model.eval()
