"""How a command line may be spelled: names of before and of the write-ups, lists with spaces, empty values."""

import re
from collections.abc import Mapping, Sequence

from ..errors import UserError

COMMANDS_OF_BEFORE: Mapping[str, tuple[str, str]] = {
    "vector": ("responses", "extract"),
    "vector-eval": ("responses", "eval"),
    "export-vector": ("export", "vector"),
}
DEFAULT_COMMANDS = {"export": ("checkpoint", ("checkpoint", "vector"))}
"""Group -> the command that it means without one, and all of them."""
GROUPS = ("caa", "responses")
RENAMED: Mapping[tuple[str, ...], Mapping[str, str]] = {
    ("responses", "eval"): {"--layer": "--choose-layer"},
    ("plot",): {"--what": "--figure"},
    ("export", "checkpoint"): {"--dtype": "--stored-dtype"},
    ("run",): {"--vectors-ablated": "--directions"},
    ("chat",): {"--ablate": "--directions"},
}
"""Options of before, by command."""
LISTS = frozenset({"--coefficients", "--layers", "--multipliers"})
"""Options that take several values, with commas or with spaces between them."""
MAY_BE_EMPTY = frozenset({"--system", "--response-prefix", "--prompt", "--refusal-instruction"})
"""Options whose empty text means something: every other one is a shell variable that was not set."""
_VALUE = re.compile(r"[-+]?[\d.][\d.,:eE+-]*|all")


def own_spelling(arguments: Sequence[str]) -> list[str]:
    """Names of before become those of now, --model_path --model-path, --multipliers -1 0 1 --multipliers=-1,0,1."""
    command, rest = split_command(arguments)
    renamed = RENAMED.get(tuple(command), {})
    spread: list[str] = list(command)
    lists: dict[str, tuple[int, list[str]]] = {}
    while rest:
        argument = _dashed(rest.pop(0))
        name, equals, value = argument.partition("=")
        name = renamed.get(name, name)
        argument = f"{name}{equals}{value}"
        is_empty = not value.strip() if equals else bool(rest) and not rest[0].strip()
        if is_empty and name.startswith("--") and name not in MAY_BE_EMPTY:
            raise UserError(f"{name} was given an empty value; leave the option out, or say what is meant")
        if name not in LISTS:
            spread.append(argument)
            continue
        given = [value] if equals else []
        while not equals and rest and _VALUE.fullmatch(rest[0]):
            given.append(rest.pop(0).strip(","))
        if not given:
            spread.append(argument)
            continue
        place, values = lists.setdefault(name, (len(spread), []))
        values += given
        spread[place : place + 1] = [f"{name}={','.join(values)}"]
    return spread


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that name the command, as they are called now, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        return [], list(arguments)
    first, rest = arguments[0], list(arguments[1:])
    command = list(COMMANDS_OF_BEFORE.get(first, (first,)))
    if command[0] in DEFAULT_COMMANDS and len(command) == 1:
        default, others = DEFAULT_COMMANDS[first]
        if rest[:1] and rest[0] in others:
            return [first, rest[0]], rest[1:]
        return (command if rest == ["--help"] else [first, default]), rest
    if command[0] in GROUPS and len(command) == 1 and rest and not rest[0].startswith("-"):
        return [first, rest[0]], rest[1:]
    return command, rest


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
