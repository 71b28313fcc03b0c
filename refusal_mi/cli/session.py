"""What a chat in the terminal holds, and the commands that begin with a slash."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..interventions import Intervention

HELP = """\
/ablate RANKS     ablate these surviving candidates (0-2: the best and the third); /ablate off undoes it
/coefficient X    add X times the vector of --steer; negative subtracts
/system [TEXT]    set the system message; without a text, the template's own
/reset            start a new conversation
/save FILE        write the conversation as JSON
/help             this list
/quit             leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Change:
    """What is done to the model, in words and as objects."""

    label: str
    interventions: "Sequence[Intervention]"
    warning: str | None = None


@dataclass
class Session:
    """The conversation with the changed model, and the same one with the plain model where they are compared."""

    changed: "Conversation"
    plain: "Conversation | None"
    name: str
    """Of the model."""
    change: Change | None
    by_ranks: Callable[[str], Change]
    steered_by: Callable[[float], Change] | None

    @property
    def label(self) -> str:
        """What is done to the model, in words."""
        return self.change.label if self.change else "plain"

    @property
    def conversations(self) -> "dict[str, Conversation]":
        """By label, in the order in which they are shown."""
        changed = {self.change.label if self.change else "unchanged": self.changed}
        return {"plain": self.plain} | changed if self.plain else changed

    def set_change(self, change: Change | None) -> None:
        """Do something else to the model from the next answer on."""
        self.change, self.changed.interventions = change, change.interventions if change else ()

    def obey(self, line: str) -> str:
        """Carry out a command; return what there is to say about it.

        Raises:
            UserError: there is no such command, or it cannot be carried out.
            EOFError: it was /quit.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        obeyed = _COMMANDS.get(name)
        if obeyed is None:
            raise UserError(f"unknown command {name}; /help lists them")
        return obeyed(self, argument)


def _ablate(session: Session, argument: str) -> str:
    if not argument:
        raise UserError("/ablate takes ranks such as 0-2, or off")
    if argument == "off":
        session.set_change(None)
        return "nothing is ablated"
    session.set_change(session.by_ranks(argument))
    return session.label


def _coefficient(session: Session, argument: str) -> str:
    if session.steered_by is None:
        raise UserError("there is no vector to add: start the chat with --steer FILE")
    try:
        coefficient = float(argument)
    except ValueError:
        raise UserError(f"/coefficient takes a number, not {argument!r}") from None
    session.set_change(session.steered_by(coefficient))
    return session.label


def _system(session: Session, argument: str) -> str:
    for conversation in session.conversations.values():
        conversation.set_system(argument or None)
    return f"system message: {argument}" if argument else "system message: the template's own"


def _reset(session: Session, argument: str) -> str:
    for conversation in session.conversations.values():
        conversation.reset()
    return "a new conversation"


def _save(session: Session, argument: str) -> str:
    from ..files import write_json

    if not argument:
        raise UserError("/save takes the name of a file")
    path = Path(argument).expanduser()
    conversations = [{"label": label} | each.describe() for label, each in session.conversations.items()]
    write_json(path, {"model": session.name, "conversations": conversations})
    return f"saved {path}"


def _help(session: Session, argument: str) -> str:
    return HELP


def _quit(session: Session, argument: str) -> str:
    raise EOFError


_COMMANDS: dict[str, Callable[[Session, str], str]] = {
    "/ablate": _ablate,
    "/coefficient": _coefficient,
    "/system": _system,
    "/reset": _reset,
    "/save": _save,
    "/help": _help,
    "/quit": _quit,
    "/exit": _quit,
}
