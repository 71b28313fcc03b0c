"""The spellings that published write-ups use, turned into this program's own."""

import re
from collections.abc import Sequence

LISTS = frozenset({"--coefficients", "--layers", "--multipliers"})
"""Options that take several values, with commas or with spaces between them."""

_VALUE = re.compile(r"[-+]?[\d.][\d.,eE+-]*|all")


def own_spelling(arguments: Sequence[str]) -> list[str]:
    """--model_path becomes --model-path; --multipliers -1 0 1 becomes --multipliers=-1,0,1, also when repeated."""
    found: list[str] = []
    lists: dict[str, tuple[int, list[str]]] = {}
    rest = list(arguments)
    while rest:
        argument = _dashed(rest.pop(0))
        name, equals, value = argument.partition("=")
        if name not in LISTS:
            found.append(argument)
            continue
        given = [value] if equals else []
        while not equals and rest and _VALUE.fullmatch(rest[0]):
            given.append(rest.pop(0).strip(","))
        if not given:
            found.append(argument)
            continue
        place, values = lists.setdefault(name, (len(found), []))
        values += given
        found[place : place + 1] = [f"{name}={','.join(values)}"]
    return found


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
