"""A model that is loaded already as files: those it was loaded from where it still holds them, else new ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import UserError
from ..model.families import family_of
from ..model.guards import guarded
from ..model.held import Parts, parts_of
from ..model.loading import hub_commit
from ..model.writers import build_skeleton
from .checkpoint import open_checkpoint
from .plan import local_files
from .streaming import CheckpointWeights


@contextmanager
def files_of(source: Any, revision: str | None) -> Iterator[tuple[str | Path | None, str | None, str | None]]:
    """A directory, hub id or None as it is; of a model its files, and what it is called where they are made for this.

    Files are made in the system's folder for temporary files (TMPDIR) where the model was not loaded from a checkpoint,
    or its weights, config, chat template or vocabulary were changed since.

    Raises:
        UserError: it is no model, or none whose weights can be written.
    """
    if source is None or isinstance(source, str | Path):
        yield source, revision, None
        return
    if revision is not None:
        raise UserError("a model that is loaded already has no revision: leave it out")
    parts = parts_of(source)
    commit = getattr(parts.config, "_commit_hash", None)
    if _is_in_files(parts, commit) and _is_described_there(parts, commit):
        yield parts.name, None if Path(parts.name).is_dir() else commit, None
        return
    with TemporaryDirectory() as folder:
        _write(parts, Path(folder))
        yield folder, None, f"{parts.name}, as it was in memory"


def _is_in_files(parts: Parts, commit: str | None) -> bool:
    """Whether the directory or hub id that a model names holds the very weights that it has, in any dtype."""
    try:
        is_there = (Path(parts.name) / "config.json").is_file() or hub_commit(parts.name, commit) is not None
        checkpoint = open_checkpoint(local_files(parts.name, commit)[0]) if is_there else None
        if checkpoint is None:
            return False
        names = [name for name, _ in build_skeleton(parts.config).named_parameters()]
        weights = CheckpointWeights(checkpoint, family_of(parts.config), torch.float32)
        for name in names:
            here = parts.tensors[name]
            weights.dtype = here.dtype
            there = weights.read(name)
            if there.shape != here.shape or not torch.equal(there, here.cpu()):
                return False
    except (UserError, KeyError, StopIteration):  # other files than a checkpoint that can be exported
        return False
    return True


_BOOKKEEPING = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
_SHOWN = ("output_attentions", "output_hidden_states")
"""Neither where a model comes from nor what a call of it returns changes what it computes."""


def _is_described_there(parts: Parts, commit: str | None) -> bool:
    """Whether config, generation config, chat template and vocabulary there are those that the model has."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    name, revision = parts.name, commit or "main"
    try:
        with guarded(name, is_hub_asked=False):
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
            try:
                generation = GenerationConfig.from_pretrained(name, revision=revision)
            except OSError:  # it has none of its own, and a model that is loaded there makes one of its config
                generation = GenerationConfig.from_model_config(config)
    except Exception:  # foreign code: what cannot be read cannot be the same
        return False
    if type(config) is not type(parts.config):  # the language model of one that reads images too
        config = config.get_text_config()
    held = parts.generation_config
    return (
        _said(config) == _said(parts.config)
        and (held is None or _said(generation) == _said(held))
        and tokenizer.chat_template == parts.tokenizer.chat_template
        and tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    )


def _said(config: Any) -> dict[str, Any]:
    """A config without bookkeeping and what is not set, at any depth."""

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        skipped = (*_BOOKKEEPING, *_SHOWN)
        return {key: without(entry) for key, entry in value.items() if entry is not None and key not in skipped}

    said: dict[str, Any] = without(config.to_dict())
    return said


def _write(parts: Parts, folder: Path) -> None:
    """The model as `save_pretrained` would have written it before it was wrapped."""
    model = build_skeleton(deepcopy(parts.config))
    held = {name: parts.tensors[name].cpu() for name in model.state_dict()}
    model.load_state_dict(held, assign=True)
    model.tie_weights()
    if parts.generation_config is not None:
        model.generation_config = parts.generation_config
    model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
