"""`--config FILE.toml` or `.yaml`: options of a command from a file; what stands on the command line wins."""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import at_home
from ..values import named_near
from .spelling import DEFAULT_COMMANDS, RENAMED, own_spelling, split_command

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
    held = read_options(at_home(file))
    command = root
    for word in path:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return own_spelling(rest)  # which is told that there is no such command
    spelled = own_spelling(rest)
    given = {word.partition("=")[0] for word in spelled}
    has_model = _has_model(spelled[len(path) :], command)
    renamed = RENAMED.get(tuple(path), {})
    known = options_by_name(command)
    added: list[str] = []
    for key, value in _of(file, held, " ".join(path), root, known).items():
        dashed = f"--{key.replace('_', '-')}"
        name = "model_path" if key == "model" else renamed.get(dashed, dashed)[2:].replace("-", "_")
        if name not in known or known[name].param_type_name != "option":
            raise UserError(f"{file} has the unknown option {key!r}; {named_near(name, sorted(known))}")
        option = known[name]
        if given & {*option.opts, *option.secondary_opts} or (name == "model_path" and has_model):
            continue
        added += option_words(file, option, value)
    end = spelled.index("--") if "--" in spelled else len(spelled)
    return own_spelling([*path, *spelled[len(path) : end], *added, *spelled[end:]])


def _has_model(words: Sequence[str], command: Any) -> bool:
    """Whether MODEL is among the words behind a command: its place among those that are no options or their values."""
    places = [each.name for each in command.params if each.param_type_name == "argument"]
    if "model" not in places:
        return False
    takes_value = {
        flag
        for each in command.params
        if each.param_type_name == "option" and not each.is_flag
        for flag in (*each.opts, *each.secondary_opts)
    }
    n_given, rest = 0, list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            n_given += len(rest)
            break
        if not word.startswith("-"):
            n_given += 1
        elif word in takes_value:
            del rest[:1]
    return n_given > places.index("model")


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
        return path.suffix != ".toml" and not set(read_options(path)).isdisjoint(WRITE_UP)
    except UserError:
        return True


def options_by_name(command: Any) -> dict[str, Any]:
    """The options and arguments of a command, as a file names them."""
    return {each.opts[0].removeprefix("--").replace("-", "_"): each for each in command.params if each.opts}


def read_options(path: Path) -> dict[str, Any]:
    """What a .toml or .yaml file says, by key.

    Raises:
        UserError: it is missing, or no such file.
    """
    return options_of(path, read_text(path))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is missing, or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def options_of(path: Path, text: str) -> dict[str, Any]:
    """What the text of a .toml or .yaml file says, by key.

    Raises:
        UserError: it is no such text, or has a key twice, of which YAML would pass over the first.
    """
    try:
        if path.suffix == ".toml":
            held: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            _check_keys(path, yaml.compose(text, yaml.SafeLoader))
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


def _check_keys(path: Path, root: Any) -> None:
    import yaml

    seen, waiting = set[int](), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise UserError(f"{path} has the key {twice} twice: leave one out")
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _of(file: str, held: Mapping[str, Any], name: str, root: Any, options: Collection[str]) -> dict[str, Any]:
    """What a file says of a command: the top level, and over it the command's own table.

    The table of a group holds tables of its commands, and options where the group alone means one of them.

    Args:
        options: of the command; "judge" is one, and a command too.

    Raises:
        UserError: a table is none, or that of a group names a command that the group does not have.
    """
    groups = {word: each for word, each in root.commands.items()}
    tables = {word for word in groups} | {
        f"{group} {word}" for group, each in groups.items() for word in getattr(each, "commands", {})
    }
    general = {
        key: value for key, value in held.items() if not (key in tables and (value is None or isinstance(value, dict)))
    }
    group, _, word = name.partition(" ")
    inner = {} if not word else _table(file, group, held.get(group))
    own = {} if name in options and name in general else _table(file, name, held.get(name))
    of_default: dict[str, Any] = {}
    for each, table in held.items():
        commands = getattr(groups.get(each), "commands", None)
        if commands is None or not isinstance(table, dict):
            continue
        strays = {key: value for key, value in table.items() if key not in commands}
        if each in DEFAULT_COMMANDS:
            of_default = strays if (each, word) == (group, DEFAULT_COMMANDS[each][0]) else of_default
        elif strays:
            stray = next(iter(strays))
            raise UserError(f"{file}: {each} has no command {stray!r}; {named_near(stray, list(commands))}")
    return general | of_default | _table(file, f"{group}.{word}", inner.get(word)) | own


def _table(file: str, key: str, value: Any) -> dict[str, Any]:
    """The options of a table; one with nothing in it has none."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file}: {key} is a command, so it takes a table of options and their values, not {value!r}")
    return value or {}


def option_words(file: str, option: Any, value: Any) -> Iterator[str]:
    """The words that give an option this value.

    Raises:
        UserError: it takes no such value; the message names the file.
    """
    flag = option.opts[0]
    if value is None:
        return
    if option.is_flag:
        if not isinstance(value, bool):
            raise UserError(f"{file}: {flag} is on or off, true or false, not {value!r}")
        if value or option.secondary_opts:
            yield flag if value else option.secondary_opts[0]
        return
    if isinstance(value, dict) and flag == "--device-map":
        value = json.dumps(value)
    if isinstance(value, dict):
        value = [
            f"{key}={'true' if each is True else 'false' if each is False else each}" for key, each in value.items()
        ]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool | dict | list) for each in values):
        raise UserError(f"{file}: {flag} takes {option.metavar}, not {value!r}")
    for text in values if option.multiple else [",".join(map(str, values))]:
        yield f"{flag}={text}"
