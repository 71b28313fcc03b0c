"""From a hub id or a folder to a model with raw HF weights, ready for hooks."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..errors import UserError, cause
from ..files import at_home, sha256_json
from ..options import Quantization
from ..progress import alone
from ..values import Value, check_named
from .families import nearest_type
from .guards import guarded, no_processor
from .held import adopt, as_it_is, name_of
from .offload import end_offloaded
from .points import (
    HookedModel,
    bridge,
    check_raw_basis,
    hf_config,
    missing_points,
    model_type,
    name_mixers,
    resid_hook,
    set_from_files,
    write_hooks,
)
from .sums import check_sums
from .wrappers import round_rotations

EMBEDDED = "organism"
"""Alias of the embedded model."""
ORGANISM = Path(__file__).parents[1] / "organism" / "model"
"""Directory of the embedded demonstration model."""
DeviceName = Literal["auto", "cuda", "mps", "cpu"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def load_model(
    source: Any = None,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    hf_model: Any = None,
) -> HookedModel:
    """Load a chat model with raw HF weights, ready for hooks.

    Examples:
        >>> load_model().cfg.n_layers  # the embedded model
        10

    Args:
        source: a local HF directory, a `.gguf` file (transformers dequantizes it), a hub id, or None for the embedded
            model. Or a model that is loaded already: a `TransformerBridge` is used as it is, and so is an unprocessed
            `HookedTransformer` of TransformerLens 3.9; an HF model is wrapped in place (its submodules become a
            bridge's, its attention eager, its mode eval) and stays where it is, also where it is refused then: save it
            first, its `save_pretrained` finds shared tensors afterwards. The same model gives the same bridge again.
            What is recorded of such a model is a fingerprint of its parameters.
        revision: hub branch, tag or commit.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" is the checkpoint's dtype, and float32 on a CPU.
        device_map: where accelerate puts the parts of the model, as for `from_pretrained`; instead of `device`.
        max_memory: how much it may use of every device, as {0: "20GiB", "cpu": "60GiB"}.
        quantization: "bnb-4bit" or "bnb-8bit" (bitsandbytes, on CUDA). Directions can be found and tested so; exports
            are made from the full-precision checkpoint.
        trust_remote_code: run Python files that come with the checkpoint, with all that you may do on this machine.
        tokenizer: of a model that is loaded already; by default the one in the directory that its config names, or of
            that hub id in the hub's cache.
        hf_model: what a `HookedTransformer` was made of: the HF model, which analyses of weights need, or its
            directory or hub id; by default the one that its tokenizer comes from.

    Raises:
        UserError: there is no such model, it cannot be reached, its architecture is not supported, it would run code
            of its own, or its weight files lack some of its tensors.
    """
    asked = _Asked(revision, device, dtype, device_map, max_memory, quantization, trust_remote_code)
    is_named = source is None or isinstance(source, (str, Path))
    if is_named:
        name = resolve_source(source)
        asked.check(name)
    else:
        if asked != _Asked():
            raise UserError(
                "a model that is loaded already stays where and as it is: give load_model no device, dtype, revision, "
                "quantization or trust_remote_code with it"
            )
        name = name_of(source)
    if is_named and (tokenizer is not None or hf_model is not None):
        what = "hf_model=" if tokenizer is None else "tokenizer="
        raise UserError(f"{what} is for a model that is loaded already; a directory or hub id brings its own")
    is_there = True
    try:
        if is_named:
            with alone(), guarded(name, trust_remote_code=trust_remote_code) as is_there, no_processor():
                model = _load(name, asked)
        else:
            model = adopt(source, tokenizer, hf_model)
        set_from_files(model, is_so=is_named)
        model.eval()
        _place_inputs(model)
        end_offloaded(bridge(model).original_model)
        name_mixers(model)
        round_rotations(model)
        check_raw_basis(model)
        _check_writes(model, name)
    except UserError:
        raise
    except Exception as error:  # foreign code
        raise UserError(_load_failure(name, revision, error)) from error
    if is_named and not Path(name).exists():
        commit = hub_commit(name, revision)
        hf_config(model)._commit_hash = commit
        if not is_there:
            warnings.warn(f"the hub does not answer: {name} is taken from its cache, commit {commit}", stacklevel=2)
    return model


@dataclass(frozen=True, eq=False, repr=False)
class _Asked(Value):
    """How a model is to be loaded."""

    revision: str | None = None
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    max_memory: Mapping[str | int, str | int] | None = None
    quantization: Quantization | None = None
    trust_remote_code: bool = False

    def check(self, name: str) -> None:
        """Refuse what cannot be, before anything is read."""
        for what, value, known in (
            ("dtype", self.dtype, get_args(DtypeName)),
            ("quantization", self.quantization, (None, *get_args(Quantization))),
        ):
            check_named(what, value, known)
        if self.revision is not None and Path(name).exists():
            kind = "directory" if Path(name).is_dir() else "file"
            raise UserError(f"{name} is a {kind} and has no revisions; leave --revision out, or name a hub id")
        if not isinstance(self.device, str):
            raise UserError(f"device takes auto, cuda, mps or cpu, not {self.device!r}")
        places = self.device_map.values() if isinstance(self.device_map, Mapping) else [self.device_map or ""]
        if any(isinstance(place, bool) or not isinstance(place, str | int | torch.device) for place in places):
            raise UserError('--device-map takes auto, or a device for every module as in {"": "cpu"}')
        if self.max_memory is not None and not isinstance(self.max_memory, Mapping):
            raise UserError(f'max_memory takes a size for every device as in {{"cpu": "5GB"}}, not {self.max_memory!r}')
        if self.device_map is not None and self.device != "auto":
            raise UserError("a device map says where every part goes: leave --device out")
        if self.max_memory is not None and self.device_map is None:
            raise UserError("--max-memory is for a device map: say --device-map auto as well")
        if self.quantization is not None:
            if is_gguf(name):
                raise UserError(f"{name} is quantized by itself; leave --quantization out")
            if not torch.cuda.is_available():
                raise UserError(f"--quantization {self.quantization} needs a CUDA GPU, and there is none here")
            if find_spec("bitsandbytes") is None:
                raise UserError("--quantization needs bitsandbytes: pip install 'refusal_mi[quantization]'")

    @property
    def placement(self) -> dict[str, Any]:
        """What accelerate is told."""
        return {"device_map": self.device_map, "max_memory": self.max_memory}

    @property
    def weights(self) -> dict[str, Any]:
        """What `from_pretrained` is told beside what TransformerLens tells it."""
        if self.quantization is None:
            return {}
        from transformers import BitsAndBytesConfig

        kind = {"bnb-4bit": "load_in_4bit", "bnb-8bit": "load_in_8bit"}[self.quantization]
        return {"quantization_config": BitsAndBytesConfig(**{kind: True})}


def _load(name: str, asked: _Asked) -> Any:
    """A directory, GGUF file or hub id as a bridge."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoTokenizer

    place = _pick_device(asked.device) if asked.device_map is None else None
    trust = asked.trust_remote_code
    if is_gguf(name):
        folder, file = str(Path(name).parent), Path(name).name
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        dtype = _pick_dtype(asked.dtype, place, config)
        where = {"device_map": place} if asked.device_map is None else asked.placement
        hf_model = _WholeCheckpoint(config).from_pretrained(
            folder, gguf_file=file, dtype=dtype, attn_implementation="eager", **where
        )
        hf_model.config._name_or_path = name
        tokenizer = as_it_is(AutoTokenizer.from_pretrained(folder, gguf_file=file))
        return TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer, dtype=dtype)
    config = AutoConfig.from_pretrained(name, revision=asked.revision, trust_remote_code=trust)
    where = {"device": place}
    if asked.device_map is not None or asked.quantization is not None:  # quantized weights are never moved
        where = asked.placement if asked.device_map is not None else {"device_map": {"": str(place)}}
    return TransformerBridge.boot_transformers(
        name,
        revision=asked.revision,
        dtype=_pick_dtype(asked.dtype, place, config),
        model_class=_WholeCheckpoint(config, **asked.weights),
        trust_remote_code=trust,
        **where,
    )


def _place_inputs(model: Any) -> None:
    """Inputs go where accelerate runs the embedding, also where its weights lie on disk ("meta")."""
    if str(model.cfg.device) == "meta":
        embedding = model.original_model.get_input_embeddings()
        hook = getattr(getattr(embedding, "original_component", embedding), "_hf_hook", None)
        model.cfg.device = str(getattr(hook, "execution_device", "cpu"))


def quiet_load(source: Any = None, **how: Any) -> HookedModel:
    """`load_model` without the libraries' own chatter."""
    silence_libraries()
    return load_model(source, **how)


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a directory, GGUF file or hub id, without the model.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    folder, file = (str(Path(source).parent), Path(source).name) if is_gguf(source) else (source, None)
    try:
        with guarded(source):
            return AutoTokenizer.from_pretrained(folder, revision=revision, gguf_file=file, trust_remote_code=False)
    except Exception as error:  # foreign code
        raise UserError(f"cannot read the tokenizer of {source}: {cause(error)}") from error


def silence_libraries() -> None:
    """No advice and no bars from huggingface_hub and transformers."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_gguf(source: str | Path) -> bool:
    """Whether this is a GGUF file, by its first bytes."""
    path = Path(source)
    try:
        with path.open("rb") as handle:
            return handle.read(4) == b"GGUF"
    except (OSError, ValueError):  # a folder, or a name that no file can have
        return False


def resolve_source(source: str | Path | None) -> str:
    """The directory, GGUF file or hub id that a MODEL argument means; a path that does not exist is a UserError."""
    if source is None:
        return str(ORGANISM)
    path = at_home(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        return str(path.resolve())
    if path.is_file() and is_gguf(path):
        return str(path.resolve())
    name = str(source)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists()
    if looks_like_a_path:
        raise UserError(
            f"no such model: {name!r} is neither a directory with config.json, nor a GGUF file, nor a hub id of the "
            "form owner/name; leave MODEL out for the embedded model"
        )
    return name


def model_alias(source: str | Path | None) -> str:
    """A folder name for a model: owner--name for a hub id, the base name of a directory or file.

    Two directories may share it; `unique_alias` tells them apart.
    """
    name = resolve_source(source)
    if name == str(ORGANISM):
        return EMBEDDED
    return Path(name).name if Path(name).exists() else name.replace("/", "--")


def unique_alias(source: str | Path | None) -> str:
    """A folder name that differs between any two models: `model_alias`, with a hash for a directory or file."""
    name = resolve_source(source)
    is_local = name != str(ORGANISM) and Path(name).exists()
    return f"{model_alias(name)}-{sha256_json(name)[:6]}" if is_local else model_alias(name)


def auto_here(device: str = "auto", dtype: str = "auto", device_map: Any = None) -> dict[str, str]:
    """Where and in which dtype `load_model` puts a model on this machine, without loading it.

    Returns:
        The device, "" of a device map; and the dtype, "stored" where it is the checkpoint's.
    """
    place = device if device != "auto" or device_map is not None else _pick_device("auto").type
    if dtype == "auto":
        on = None if device_map is not None else torch.device(place)
        dtype = "stored" if _keeps_dtype(on) else "float32"
    return {"device": "" if device_map is not None else place, "dtype": dtype}


def _keeps_dtype(device: torch.device | None) -> bool:
    """Whether the dtype of a checkpoint is kept; None is a device map."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return has_gpu if device is None else device.type != "cpu"


def _pick_device(device: DeviceName) -> torch.device:
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    check_named("device", device, get_args(DeviceName))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device]:
        raise UserError(f"device {device!r} is not available here; use --device auto")
    return torch.device(device)


def _pick_dtype(dtype: DtypeName, device: torch.device | None, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    return stored if stored is not None and _keeps_dtype(device) else torch.float32


class _WholeCheckpoint:
    """Loads as the HF class of an architecture does, and refuses weight files that lack some of the parameters."""

    def __init__(self, config: Any, **also: Any) -> None:
        """`also` is told to `from_pretrained` beside what it is given."""
        from transformer_lens.model_bridge.sources import transformers as bridge_source

        architecture = bridge_source.determine_architecture_from_hf_config(config)
        self._hf_class = bridge_source.get_hf_model_class_for_architecture(architecture)
        self._also = also

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        """The model with all of its parameters.

        Raises:
            ValueError: some are in no weight file, and HF would make them up. Tied ones are there once.
        """
        model, report = self._hf_class.from_pretrained(name, output_loading_info=True, **kwargs, **self._also)
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
    streams = [resid_hook(layer, model.cfg.n_layers) for layer in range(model.cfg.n_layers + 1)]
    missing = missing_points(model, [*write_hooks(model.cfg.n_layers), *streams])
    if missing:
        raise UserError(
            f"{name} ({model_type(model)}) has no hook point {missing[0]}: only models whose every block is attention "
            f"and an MLP are supported{nearest_type(model_type(model))}"
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
        reason = "it brings Python code of its own, which is not run without --trust-remote-code"
    if "Weights only load failed" in reason:
        reason = "its pickled weights hold more than tensors, which could run code; get them as safetensors"
    if is_gguf(name):
        reason = f"it is no whole GGUF file of a chat model ({reason})"
        if (Path(name).parent / "adapter_config.json").exists():
            reason = (
                "transformers takes the adapter_config.json beside it for its own; put the file into another folder"
            )
    if "Available architectures" in reason:
        reason = "TransformerLens does not know its architecture"
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights do not have the shapes that its config.json names"
    if "/" not in name or Path(name).exists():
        return f"cannot load the model in {where}: {reason}"
    return (
        f"cannot load {where} from the hub: {reason} "
        "(without a network pass a local directory, or leave MODEL out for the embedded model)"
    )
