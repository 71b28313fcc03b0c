"""`refusal-mi chat`: a conversation in the terminal, plain or with directions at work."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import in_words, position_scope, rank_numbers
from ..terminal import printable, say, tell
from .options import (
    AllowOtherModel,
    DirectionSource,
    Hook,
    Layer,
    ModelOptions,
    Multi,
    NewTokens,
    OutputDir,
    PositionsOption,
    Ranks,
    TemplateOptions,
    at_least,
    flat,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..directions import Direction
    from ..generation import Conversation
    from ..interventions import Intervention, Positions
    from ..model.points import HookedModel

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
    best: "tuple[str, Conversation] | None" = None
    """Of a published chat: the best direction alone, in words, and its conversation."""

    @property
    def label(self) -> str:
        """What is done to the model, in words."""
        return self.change.label if self.change else "plain"

    @property
    def conversations(self) -> "dict[str, Conversation]":
        """By label, in the order in which they are shown."""
        changed = {self.change.label if self.change else "unchanged": self.changed}
        beside = ({"plain": self.plain} if self.plain else {}) | (dict([self.best]) if self.best else {})
        return beside | changed

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
    from ..files import at_home, write_json

    if not argument:
        raise UserError("/save takes the name of a file")
    path = at_home(argument)
    if path.is_file() and not _is_saved_conversation(path):
        raise UserError(f"{path} is there and is no saved conversation: choose another name")
    conversations = [{"label": label} | each.describe() for label, each in session.conversations.items()]
    write_json(path, {"model": session.name, "conversations": conversations})
    return f"saved {path}"


def _is_saved_conversation(path: Path) -> bool:
    from ..files import read_json

    try:
        held = read_json(path)
    except UserError:
        return False
    return isinstance(held, dict) and set(held) == {"model", "conversations"}


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


def interact(session: Session) -> None:
    """Read prompts and commands from the terminal until /quit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    _say(f"{session.name} ({session.label}); /help lists the commands")
    _warn(session)
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D leaves")
            continue
        try:
            if line.startswith("/"):
                _say(session.obey(line))
                _warn(session)
            elif line:
                _show(session, line)
        except UserError as error:
            _say(f"error: {error}")
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("\n(stopped)")


def answer_all(session: Session, lines: Iterable[str], *, has_commands: bool) -> None:
    """One answer for every line; nothing but answers goes to stdout.

    Args:
        has_commands: whether a line that begins with a slash is a command.
    """
    _warn(session)
    for line in lines:
        if has_commands and line.startswith("/"):
            try:
                say(session.obey(line.strip()))
            except EOFError:
                return
        elif line.strip():
            _write(session, line)


def _write(session: Session, text: str) -> None:
    """Answers one below the other, labelled where there are two."""
    for label, conversation in session.conversations.items():
        if session.plain:
            print(f"[{label}]")
        for piece in conversation.ask(text):
            print(printable(piece), end="", flush=True)
        print("\n" if session.plain else "", flush=True)


def _show(session: Session, text: str) -> None:
    """The answer as it grows; two of them in columns."""
    if session.plain:
        _show_columns(session.conversations, text)
        return
    print("model> ", end="", flush=True)
    for piece in session.changed.ask(text):
        print(printable(piece), end="", flush=True)
    print()


def _show_columns(conversations: "dict[str, Conversation]", text: str) -> None:
    from rich.live import Live

    from .tables import Console, Table

    answers = dict.fromkeys(conversations, "")
    console = Console()

    def table() -> Table:
        # Not the full width: the terminal writes ^C behind the last line, and a line break there displaces the table.
        table = Table(width=max(20, console.width - 3))
        for label in answers:
            table.add_column(label, ratio=1, overflow="fold")
        table.add_row(*answers.values())
        return table

    with Live(table(), console=console, auto_refresh=False) as live:
        for label, piece in _in_turns({label: each.ask(text) for label, each in conversations.items()}):
            answers[label] += piece
            live.update(table(), refresh=True)


def _in_turns(streams: dict[str, Iterator[str]]) -> Iterator[tuple[str, str]]:
    """A piece of each stream in turn, until all have ended; all are closed when the reader stops."""
    left = dict(streams)
    try:
        while left:
            for label in list(left):
                piece = next(left[label], None)
                if piece is None:
                    del left[label]
                else:
                    yield label, piece
    finally:
        for each in streams.values():
            each.close()  # type: ignore[attr-defined]


def _warn(session: Session) -> None:
    if session.change and session.change.warning:
        say(f"warning: {session.change.warning}")


def _say(text: str) -> None:
    tell(text)


@flat
def chat(
    *,
    model: ModelOptions,
    directions: Ranks = None,
    vectors_ablated: Annotated[
        str | None,
        typer.Option(help="The same ranks, as published: the plain answer, the best direction's, and theirs."),
    ] = None,
    direction: DirectionSource = None,
    steer: Annotated[Path | None, typer.Option(help="Add the vector in this .pt file or run folder.")] = None,
    coefficient: Annotated[
        float | None, typer.Option(help="How much of --steer to add, default 1; negative subtracts.")
    ] = None,
    layer: Layer = None,
    hook: Hook = None,
    positions: PositionsOption = None,
    multi: Multi = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the plain model's answer beside it.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Say this instead of reading the terminal, and exit; repeatable.")
    ] = None,
    template: TemplateOptions,
    max_new_tokens: NewTokens = None,
    allow_other_model: AllowOtherModel = False,
    output_dir: OutputDir = None,
) -> int:
    """Chat with a model, plain or with directions at work.

    Directions are ablated (--directions, --direction) or added (--steer).

    Prompts also come from --prompt or from a pipe, one a line: each is the next turn of one conversation and gets
    one answer; a line /reset starts a new one.
    """
    from ..directions import Direction
    from ..generation import Conversation
    from ..interventions import Add
    from ..model.provenance import check_origin, display_name
    from ..recipes.combinations import check_multi
    from ..recipes.options import default_folder
    from ..run.directions import read_directions

    if sum(option is not None for option in (directions, vectors_ablated, direction, steer)) > 1:
        raise UserError("give one of --directions, --vectors-ablated, --direction and --steer")
    ablate = directions if vectors_ablated is None else vectors_ablated
    where = position_scope(positions or "all")
    about_steering = {"--coefficient": coefficient, "--positions": positions}
    lost = [name for name, value in about_steering.items() if value is not None]
    if steer is None and lost:
        raise UserError(f"{lost[0]} says how to add --steer FILE, which is missing")
    for option, value in {"--layer": layer, "--hook": hook}.items():
        if value is not None and steer is None and direction is None:
            raise UserError(
                f"{option} says where the vector of --steer FILE or --direction FILE was read, which is missing"
            )
    if prompt and not all(text.strip() for text in prompt):
        raise UserError("--prompt takes a text that is not empty")
    check_multi(multi := multi or "span")
    tokens = at_least("--max-new-tokens", max_new_tokens, 1, 512)
    run_folder = output_dir or default_folder(model.source)
    if ablate is not None:
        _check_run(run_folder, model.named, output_dir)
    loaded = model.load()
    chat = template.chat(loaded)
    chat.render("?")

    def by_ranks(text: str) -> Change:
        _check_run(run_folder, model.named, output_dir)
        return _ablation_by_ranks(loaded, model.source, run_folder, text, multi)

    n_layers, change = loaded.cfg.n_layers, None
    file = direction or steer
    used = [] if file is None else read_directions(file, n_layers, layer=layer, moves=steer is not None, hook=hook)
    placed = [each for each in used if isinstance(each, Direction)]
    for each in placed:
        Add(each).hooks(loaded)
    steering = None if steer is None else _Steering(placed[0], steer.name, layer, where)
    check_origin([each.provenance for each in placed], model.source, model.revision, allowed=allow_other_model)
    if ablate is not None:
        change = by_ranks(ablate)
    elif direction is not None:
        change = _ablation_of(loaded, used[0], direction.name)
    elif steering is not None:
        change = steering(1.0 if coefficient is None else coefficient)
    interventions = change.interventions if change else ()
    session = Session(
        changed=Conversation(loaded, chat, interventions, tokens),
        plain=Conversation(loaded, chat, (), tokens) if compare or vectors_ablated is not None else None,
        name=display_name(model.source),
        change=change,
        by_ranks=by_ranks,
        steered_by=steering,
    )
    if vectors_ablated is not None and rank_numbers(vectors_ablated) != (0,):
        best = by_ranks("0")
        session.best = best.label, Conversation(loaded, chat, best.interventions, tokens)
    if prompt:
        answer_all(session, prompt, has_commands=False)
    elif sys.stdin.isatty():
        interact(session)
    else:
        answer_all(session, (line.rstrip("\r\n") for line in sys.stdin), has_commands=True)
    return 0


@dataclass(frozen=True)
class _Steering:
    """Coefficient -> the addition of a vector."""

    direction: "Direction"
    file: str
    layer: int | None
    positions: "Positions"

    def __call__(self, coefficient: float) -> Change:
        from ..interventions import Add

        added = Add(self.direction, coefficient, self.layer, self.positions)
        place = f"layer {added.target}" if added.point is None else added.point
        return Change(f"{coefficient:+g} × {self.file} at {place}", (added,))


def _check_run(folder: Path, model: str | None, output_dir: Path | None) -> None:
    from ..run.record import SURVIVORS

    if not (folder / SURVIVORS).exists() or not (folder / "run.json").exists():
        parts = ["refusal-mi", "run", *([model] if model else []), "--steps", "directions,selection"]
        parts += ["--output-dir", str(output_dir)] if output_dir else []
        raise UserError(f"{folder} holds no ranked directions of this model; first run: {shlex.join(parts)}")


def _ablation_by_ranks(model: "HookedModel", source: str, folder: Path, text: str, multi: str) -> Change:
    from ..model.provenance import describe_model
    from ..recipes.combinations import combine
    from ..run.folder import load_ranked
    from ..run.stages import RunFolder

    RunFolder(folder).check_weights(describe_model(model, source))
    ranks = rank_numbers(text)
    combination = combine(ranks, load_ranked(folder, ranks), multi)  # type: ignore[arg-type]
    places = ", ".join(f"({place.pos}, {place.layer})" for place in combination.places)
    how = "" if multi == "span" else f", {multi}"
    return Change(
        f"ablated {in_words(ranks)} at (position, layer) {places}{how}", combination.interventions, combination.warning
    )


def _ablation_of(model: "HookedModel", direction: "Direction | Tensor", name: str) -> Change:
    from ..interventions import Ablate

    ablation = Ablate(direction)
    ablation.hooks(model)
    return Change(f"ablated {name}", (ablation,))
