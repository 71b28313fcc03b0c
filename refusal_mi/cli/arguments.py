"""Options that several commands share: one name and one meaning everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..interventions import Positions
    from ..models import HookedModel

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Local directory or hub id; nothing: the embedded model.")
]
ModelPath = Annotated[str | None, typer.Option(help="The same as MODEL.", hidden=True)]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's; float32 on a CPU), float32, bfloat16, ...")]
BatchSize = Annotated[str, typer.Option(help="Prompts per forward pass; auto: as many as fit.")]
OutputDir = Annotated[Path | None, typer.Option(help="The run folder itself; default runs/{alias}.")]
System = Annotated[str | None, typer.Option(help="System message; default: what the template does without one.")]
TemplateKwargs = Annotated[
    list[str] | None, typer.Option("--template-kwargs", metavar="K=V", help="Passed to the chat template; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="substring|llamaguard|URL", help="Who says whether the model complied; default substring."
    ),
]
JudgeModel = Annotated[str | None, typer.Option(help="Model name that the judge's endpoint is asked for.")]


def one_model(model: str | None, model_path: str | None) -> str:
    """MODEL, or --model-path, resolved; both is an error."""
    from ..models import resolve_source

    if model is not None and model_path is not None:
        raise UserError(f"MODEL was given twice: {model!r} and --model-path {model_path!r}")
    return resolve_source(model if model is not None else model_path)


def quiet_load(source: str, revision: str | None, device: str, dtype: str) -> "HookedModel":
    """Load a model without the libraries' own chatter."""
    from typing import get_args

    from ..models import DeviceName, DtypeName
    from ..models import quiet_load as load

    for option, value, known in (("--device", device, get_args(DeviceName)), ("--dtype", dtype, get_args(DtypeName))):
        if value not in known:
            raise UserError(f"{option} takes one of {', '.join(known)}, not {value!r}")
    return load(source, revision=revision, device=device, dtype=dtype)  # type: ignore[arg-type]


def parse_batch_size(text: str) -> int | None:
    """A positive number, or None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch-size takes auto or a positive number, not {text!r}")
    return int(text)


def parse_pairs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """K=V texts; true, false and numbers become values of their type."""
    import json

    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--template-kwargs takes K=V, not {pair!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def parse_tokens(text: str | None) -> tuple[int, ...] | None:
    """Comma-separated token ids."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--refusal-tokens takes token ids such as 40,2121, not {text!r}")
    return tuple(map(int, parts))


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas or spaces."""
    import math

    try:
        found = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"{option} takes numbers such as 0 0.5 1, not {text!r}")
    return found


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers such as 3,5-7; None or "all" is all of them."""
    import re

    if text is None or text == "all":
        return None
    found: list[int] = []
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"--layers takes all, or numbers and ranges such as 3,5-7, not {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"--layers {part!r} counts down; write {last}-{first}")
        found += range(first, last + 1)
    if not found:
        raise UserError(f"--layers {text!r} names no layer")
    return tuple(sorted(set(found)))


def parse_positions(text: str) -> "Positions":
    """all, prompt or response."""
    from typing import get_args

    from ..interventions import Positions

    if text not in get_args(Positions):
        raise UserError(f"--positions takes one of {', '.join(get_args(Positions))}, not {text!r}")
    return text  # type: ignore[return-value]
