"""From a hub id or a folder to a model with raw HF weights, ready for hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..errors import UserError, cause
from ..files import sha256_json
from .points import HookedModel, hf_config, missing_points, model_type, write_hooks
from .sums import check_sums

ORGANISM = Path(__file__).parents[1] / "organism" / "model"
"""Directory of the embedded demonstration model."""
DeviceName = Literal["auto", "cuda", "mps", "cpu"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def load_model(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> HookedModel:
    """Load a chat model with raw HF weights, ready for hooks.

    Args:
        source: a local HF directory, a hub id, or None for the embedded model.
        revision: hub branch, tag or commit.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" is the checkpoint's dtype, and float32 on a CPU.

    Raises:
        UserError: there is no such model, it cannot be reached, its architecture is not supported, it would run code
            of its own, or its weight files lack some of its tensors.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    name = resolve_source(source)
    place = _pick_device(device)
    if dtype not in get_args(DtypeName):
        raise UserError(f"unknown dtype {dtype!r}; expected one of {', '.join(get_args(DtypeName))}")
    if revision is not None and Path(name).is_dir():
        raise UserError(f"{name} is a directory and has no revisions; leave --revision out, or name a hub id")
    try:
        with no_remote_code(), no_processor():
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
            model = TransformerBridge.boot_transformers(
                name,
                revision=revision,
                device=place,
                dtype=_pick_dtype(dtype, place, config),
                model_class=_WholeCheckpoint(config),
            )
        model.eval()
        _check_writes(model, name)
    except UserError:
        raise
    except Exception as error:  # foreign code
        raise UserError(_load_failure(name, revision, error)) from error
    if not Path(name).is_dir():
        hf_config(model)._commit_hash = hub_commit(name, revision)
    return model


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Inside, transformers refuses code that lies beside a model's files at once: by itself it asks on stdout.

    A call with `trust_remote_code=False` refuses as well; this reaches the calls that other libraries make.
    """
    from transformers import dynamic_module_utils as remote

    seconds = remote.TIME_OUT_REMOTE_CODE
    try:
        remote.TIME_OUT_REMOTE_CODE = 0
        yield
    finally:
        remote.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def no_processor() -> Iterator[None]:
    """Inside, TransformerLens loads no image or audio processor: for text none is needed, and it installs packages."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    loaders = getattr(helpers, "_MODALITY_PROCESSOR_LOADERS", [])
    before = list(loaders)
    try:
        loaders.clear()
        yield
    finally:
        loaders[:] = before


def quiet_load(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> HookedModel:
    """`load_model` without the libraries' own chatter."""
    silence_libraries()
    return load_model(source, revision=revision, device=device, dtype=dtype)


def silence_libraries() -> None:
    """No advice and no bars from huggingface_hub and transformers."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def resolve_source(source: str | Path | None) -> str:
    """The directory or hub id that a MODEL argument means; a path that does not exist is a UserError."""
    if source is None:
        return str(ORGANISM)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        return str(path.resolve())
    name = str(source)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists()
    if looks_like_a_path:
        raise UserError(
            f"no such model: {name!r} is neither a directory with config.json nor a hub id of the form owner/name; "
            "leave MODEL out for the embedded model"
        )
    return name


def model_alias(source: str | Path | None) -> str:
    """A folder name that differs between any two models: owner--name for a hub id, name-hash for a directory."""
    name = resolve_source(source)
    if name == str(ORGANISM):
        return "organism"
    if Path(name).is_dir():
        return f"{Path(name).name}-{sha256_json(name)[:6]}"
    return name.replace("/", "--")


def _pick_device(device: DeviceName) -> torch.device:
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device not in available:
        raise UserError(f"unknown device {device!r}; expected auto, cuda, mps or cpu")
    if not available[device]:
        raise UserError(f"device {device!r} is not available here; use --device auto")
    return torch.device(device)


def _pick_dtype(dtype: DtypeName, device: torch.device, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" or stored is None else stored


class _WholeCheckpoint:
    """Loads as the HF class of an architecture does, and refuses weight files that lack some of the parameters."""

    def __init__(self, config: Any) -> None:
        from transformer_lens.model_bridge.sources import transformers as bridge_source

        architecture = bridge_source.determine_architecture_from_hf_config(config)
        self._hf_class = bridge_source.get_hf_model_class_for_architecture(architecture)

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        """The model with all of its parameters.

        Raises:
            ValueError: some are in no weight file, and HF would make them up. Tied ones are there once.
        """
        model, report = self._hf_class.from_pretrained(name, output_loading_info=True, **kwargs)
        missing = [parameter for parameter, _ in model.named_parameters() if parameter in report["missing_keys"]]
        if missing:
            raise ValueError(
                f"{len(missing)} {'tensor' if len(missing) == 1 else 'tensors'} that its config.json names "
                f"{'is' if len(missing) == 1 else 'are'} in no weight file, first {missing[0]}; "
                "get the whole checkpoint again, or correct config.json"
            )
        return model


def _check_writes(model: HookedModel, name: str) -> None:
    """Refuse models in which a block has no attention or no MLP output: nothing here could ablate what it writes."""
    missing = missing_points(model, write_hooks(model.cfg.n_layers))
    if missing:
        raise UserError(
            f"{name} ({model_type(model)}) has no hook point {missing[0]}: only models whose every block is attention "
            "and an MLP are supported"
        )
    check_sums(model, name)


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub model was loaded from: the folder of the hub's cache that its config lies in."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _load_failure(name: str, revision: str | None, error: Exception) -> str:
    where = name if revision is None else f"{name} at revision {revision}"
    reason = cause(error)
    if "trust_remote_code" in str(error):
        reason = "it brings Python code of its own, which is not run"
    if "Available architectures" in reason:
        reason = "TransformerLens does not know its architecture"
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights do not have the shapes that its config.json names"
    if Path(name).is_dir():
        return f"cannot load the model in {where}: {reason}"
    return (
        f"cannot load {where} from the hub: {reason} "
        "(without a network pass a local directory, or leave MODEL out for the embedded model)"
    )
