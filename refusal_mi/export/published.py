"""What of an export is for others: the files that loading it takes, without a path of this machine in them."""

import json
from pathlib import Path
from typing import Any

from ..files import read_json
from ..model.provenance import display_name

PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.*",
    "spiece.*",
    "sentencepiece*",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "embedding/adapter_*",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "README*",
    "refusal_mi*.json",
)
"""The files of an export that are uploaded; anything else that lay beside the weights may be a secret."""
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Keys of configs under which a program writes where a model was loaded from."""


def published(folder: Path) -> dict[str, Path | bytes]:
    """The files of an export that are uploaded, under their names there.

    Where one names a local source by its path, it is the text with the source's display name instead.
    """
    found = {path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}
    files = sorted(path for path in found if not path.name.startswith("."))
    sources = {source for path in folder.glob("refusal_mi*.json") if (source := _source(read_json(path)))}
    return {path.relative_to(folder).as_posix(): _without_paths(path, sources) for path in files}


def _source(record: Any) -> str | None:
    source = record.get("source") if isinstance(record, dict) else None
    return source if isinstance(source, str) and _is_path(source) else None


def _is_path(text: str) -> bool:
    return Path(text).is_absolute()


def _without_paths(path: Path, sources: set[str]) -> Path | bytes:
    if path.name.startswith("README"):
        before = path.read_text(encoding="utf-8", errors="surrogateescape")
        text = before
        for source in sorted(sources, key=len, reverse=True):
            text = text.replace(source, display_name(source))
        return path if text == before else text.encode("utf-8", errors="surrogateescape")
    is_record = path.name.startswith("refusal_mi")
    if path.suffix != ".json" or not (is_record or path.name.endswith("config.json")):
        return path
    value = read_json(path)
    named = _named(value, is_place=is_record, is_record=is_record)
    return path if named == value else (json.dumps(named, indent=4, ensure_ascii=False) + "\n").encode()


def _named(value: Any, *, is_place: bool, is_record: bool) -> Any:
    """The same with the display names of local paths: of every one in a record, in a config where a source is named."""
    if isinstance(value, dict):
        return {
            key: _named(entry, is_place=is_record or key in _PLACES, is_record=is_record)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_named(entry, is_place=is_place, is_record=is_record) for entry in value]
    return display_name(value) if is_place and isinstance(value, str) and _is_path(value) else value
