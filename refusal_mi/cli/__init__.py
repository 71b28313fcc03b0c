"""The command line: it parses, calls, prints. Nothing here imports torch before a command runs."""

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import UserError, cause
from ..terminal import printable, say
from . import (
    analyze,
    audit,
    capability,
    chat,
    complete,
    export,
    judge,
    localize,
    methods,
    run,
    select,
    steering,
    study,
    variants,
)
from .config import with_config
from .shown import plain_command

INTERRUPTED = 130
BAD_INPUT = 2
app = typer.Typer(
    name="refusal-mi",
    help="Find, test and see the direction that mediates refusal in a chat model. "
    "MODEL is a local directory or a hub id; leave it out for the embedded model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


GROUPS: dict[str, tuple[str, dict[str, Callable[..., int]]]] = {
    "caa": (
        "CAA steering vectors. A layer here is the output of a block.",
        {"vectors": steering.vectors, "test": steering.test, "ab": steering.ab},
    ),
    "responses": (
        "Refusal vectors from the model's own answers.",
        {"extract": steering.make, "eval": steering.evaluate},
    ),
    "export": (
        "Write what hooks do as files. Alone it means checkpoint.",
        {"checkpoint": export.export, "vector": export.export_vector},
    ),
}
COMMANDS: dict[str, Callable[..., int]] = {
    "run": run.run,
    "combos": run.combos,
    "reproduce": run.reproduce,
    "chat": chat.chat,
    "select": select.select_saved,
    "localize": localize.localize,
    "compare-methods": methods.compare_methods,
    "study": study.study,
    "variants": variants.variants,
    "audit": audit.audit,
    "capability": capability.capability,
    "analyze": analyze.analyze,
    "plot": analyze.plot,
    "compare": analyze.compare,
    "complete": complete.complete,
    "judge": judge.judge,
    "model-info": run.model_info,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
for name, (about, commands) in GROUPS.items():
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
    for each, command in commands.items():
        group.command(each)(command)
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"refusal-mi {version('refusal_mi')}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Options from a .toml or .yaml file; may stand behind a command as well, whose other options win.",
        ),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand behind a command as well.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit 0 done, 1 the science failed, 2 bad input, 130 interrupted."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(' '.join(str(message).split()))}\n"
    sys.exit(exit_status(sys.argv[1:] if arguments is None else arguments))


def exit_status(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; a user's mistake is one line on stderr.

    Args:
        arguments: --debug among them shows the traceback of what went wrong.
    """
    words = [word for word in arguments if word != "--debug"]
    try:
        root = plain_command(app)
        status = root.main(with_config(words, root), prog_name="refusal-mi", standalone_mode=False)
    except UserError as error:
        return _fail(str(error), error if len(words) < len(arguments) else None)
    except typer.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group without its command: the message is its help
            say(message)
            return BAD_INPUT
        return _fail(message)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED  # some versions of typer return it themselves
    except Exception as error:  # a defect
        if len(words) < len(arguments):
            raise
        return _fail(
            f"{type(error).__name__}: {cause(error)} (a defect: --debug shows where; finished stages are kept)"
        )
    if status == INTERRUPTED:
        say("interrupted; finished stages are kept")
    return status if isinstance(status, int) else 0


def _fail(message: str, error: BaseException | None = None) -> int:
    if error is not None:
        say("".join(traceback.format_exception(error)))
    say("error: " + " ".join(message.split()))
    return BAD_INPUT
