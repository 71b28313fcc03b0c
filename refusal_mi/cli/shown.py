"""What --help shows of options and arguments: words for their types, and nothing of how they are parsed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

WORDS: dict[Any, str] = {str: "TEXT", int: "N", float: "X", Path: "PATH"}


def plain_command(app: typer.Typer) -> Any:
    """The command of an app, with its help in words."""
    root = typer.main.get_command(app)
    for command in _commands(root):
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                name = str(parameter.metavar or parameter.name)
                pieces = [name if parameter.required else f"[{name}]"]
                parameter.get_usage_pieces = lambda ctx, pieces=pieces: pieces
                parameter.display_type_rich = lambda ctx: ""
            elif parameter.metavar is None and not parameter.is_flag:
                parameter.metavar = WORDS.get(_kind(parameter), "TEXT")
    return root


def _commands(command: Any) -> Iterator[Any]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def _kind(parameter: Any) -> Any:
    annotation = parameter.type_descriptor.annotation
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation
