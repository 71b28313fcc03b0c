"""`--config FILE.toml` or `.yaml`: options of a command from a file; what stands on the command line wins."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import at_home
from ..values import named_near
from .spelling import own_spelling, split_command

WRITE_UP = frozenset({"model_path", "data_path", "save_vector_path", "steering_vector_path", "target_layer"})
"""Keys of the CAA write-up's config, which `caa` reads itself."""


def with_config(words: Sequence[str], root: Any) -> list[str]:
    """The words of a command line, its spelling made one, with the options of its --config among them.

    Keys are names of options, and `model`; a table that is named after a command ("run", "caa ab") is for that command.

    Args:
        root: the command of the whole line, as `plain_command` makes it.

    Raises:
        UserError: the file cannot be read, or names an option that the command does not have.
    """
    file, rest = _taken(words)
    if file is None:
        return own_spelling(words)
    path, _ = split_command(rest)
    if path[:1] == ["caa"] and _is_write_ups(at_home(file)):
        return own_spelling([*rest, "--config", file])
    held = _read(at_home(file))
    command = root
    for word in path:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return own_spelling(rest)  # which is told that there is no such command
    spelled = own_spelling(rest)
    given = {word.partition("=")[0] for word in spelled}
    has_model = any(not word.startswith("-") for word in spelled[len(path) : len(path) + 1])
    known = {each.opts[0].removeprefix("--").replace("-", "_"): each for each in command.params if each.opts}
    added: list[str] = []
    for key, value in _of(held, " ".join(path), root).items():
        name = "model_path" if key in ("model", "model-path") else key.replace("-", "_")
        if name not in known or known[name].param_type_name != "option":
            raise UserError(f"{file} has the unknown option {key!r}; {named_near(name, sorted(known))}")
        option = known[name]
        if given & {*option.opts, *option.secondary_opts} or (name == "model_path" and has_model):
            continue
        added += _said(file, option, value)
    return own_spelling([*path, *spelled[len(path) :], *added])


def _taken(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of --config, and the other words."""
    rest = list(words)
    for index, word in enumerate(rest):
        if word == "--config" and index + 1 < len(rest):
            return rest[index + 1], rest[:index] + rest[index + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], rest[:index] + rest[index + 1 :]
    return None, rest


def _is_write_ups(path: Path) -> bool:
    """Whether `caa` is to read a file itself, and to say what is wrong with it: all but one of options."""
    try:
        return path.suffix != ".toml" and not set(_read(path)).isdisjoint(WRITE_UP)
    except UserError:
        return True


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        if path.suffix == ".toml":
            held: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            held = yaml.safe_load(text) or {}
        else:
            raise UserError(f"--config takes a file ending in .toml, .yaml or .yml, not {path}")
    except UserError:
        raise
    except Exception as error:  # foreign code
        raise UserError(f"{path} is not {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise UserError(f"{path} must hold names of options and their values")
    return held


def _of(held: Mapping[str, Any], name: str, root: Any) -> dict[str, Any]:
    """What a file says of a command: the top level, and over it the command's own table."""
    groups = {word: each for word, each in root.commands.items()}
    tables = {word for word in groups} | {
        f"{group} {word}" for group, each in groups.items() for word in getattr(each, "commands", {})
    }
    general = {key: value for key, value in held.items() if not (key in tables and isinstance(value, dict))}
    own: Any = held.get(name, {})
    group, _, word = name.partition(" ")
    if word and isinstance(held.get(group), dict):
        own = {**held[group].get(word, {}), **own}
    return general | own


def _said(file: str, option: Any, value: Any) -> Iterator[str]:
    """The words that give an option this value."""
    flag = option.opts[0]
    if value is None:
        return
    if option.is_flag:
        if not isinstance(value, bool):
            raise UserError(f"{file}: {flag} is on or off, true or false, not {value!r}")
        if value or option.secondary_opts:
            yield flag if value else option.secondary_opts[0]
        return
    if isinstance(value, dict):
        value = [
            f"{key}={'true' if each is True else 'false' if each is False else each}" for key, each in value.items()
        ]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool | dict | list) for each in values):
        raise UserError(f"{file}: {flag} takes {option.metavar}, not {value!r}")
    for text in values if option.multiple else [",".join(map(str, values))]:
        yield f"{flag}={text}"
