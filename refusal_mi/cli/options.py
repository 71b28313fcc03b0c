"""Options that commands share: how they are spelled, read and checked."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..interventions import Positions
    from ..judges.substring import Judge
    from ..model.points import HookedModel
    from ..search.grid import Thresholds
    from ..text.chat import ChatFormat

SCIENCE_FAILED = 1
"""Exit status where a command did its work and the answer is no."""
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
    from ..model.loading import resolve_source

    if model is not None and model_path is not None:
        raise UserError(f"MODEL was given twice: {model!r} and --model-path {model_path!r}")
    return resolve_source(model if model is not None else model_path)


def quiet_load(source: str, revision: str | None, device: str, dtype: str) -> "HookedModel":
    """Load a model without the libraries' own chatter."""
    from typing import get_args

    from ..model.loading import DeviceName, DtypeName
    from ..model.loading import quiet_load as load

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


def flat(command: Callable[..., int]) -> Callable[..., int]:
    """The command with one parameter for every field of the dataclasses that it takes, as typer wants it."""
    signature = inspect.signature(command)
    kinds: dict[str, Any] = {p.name: p.annotation for p in signature.parameters.values()}
    bundles = [name for name, kind in kinds.items() if is_dataclass(kind)]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        found = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        if parameter.name in bundles:
            found = [
                found[0].replace(name=f.name, annotation=f.type, default=f.default)
                for f in fields(kinds[parameter.name])
            ]
        parameters += found

    @wraps(command)
    def call(**values: Any) -> int:
        made = {name: kinds[name](**{f.name: values.pop(f.name) for f in fields(kinds[name])}) for name in bundles}
        return command(**made, **values)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Model = None
    model_path: ModelPath = None
    revision: Revision = None
    device: Device = "auto"
    dtype: Dtype = "auto"

    @cached_property
    def source(self) -> str:
        """The directory or hub id."""
        return one_model(self.model, self.model_path)

    @property
    def named(self) -> str | None:
        """As it was written; None is the embedded model."""
        return self.model if self.model is not None else self.model_path

    def load(self) -> "HookedModel":
        """The model, loaded quietly."""
        return quiet_load(self.source, self.revision, self.device, self.dtype)


@dataclass(frozen=True)
class TemplateOptions:
    """What the chat template is given beside the conversation."""

    system: System = None
    template_kwargs: TemplateKwargs = None

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """K=V texts as a dict."""
        return parse_pairs(self.template_kwargs)

    def chat(self, model: "HookedModel") -> "ChatFormat":
        """The model's chat format."""
        from ..text.chat import ChatFormat

        return ChatFormat(model.tokenizer, self.system, self.kwargs)


@dataclass(frozen=True)
class JudgeOptions:
    """Who says whether the model complied."""

    judge: JudgeName = None
    judge_model: JudgeModel = None

    @property
    def name(self) -> str:
        """As it was named, or the default."""
        return "substring" if self.judge is None else self.judge

    def found(self, question: Literal["harm", "refusal"]) -> "Judge":
        """The judge; a name that is none is a UserError."""
        from ..judges.http import judge_named

        return judge_named(self.name, model=self.judge_model, question=question)


@dataclass(frozen=True)
class ThresholdOptions:
    """What a candidate direction must satisfy."""

    kl_max: Annotated[float, typer.Option(help="Largest KL on harmless prompts, in nats; inf: any.")] = 0.1
    induce_min: Annotated[float, typer.Option(help="Smallest refusal score under addition, in nats; -inf: any.")] = 0.0
    prune_layers: Annotated[float, typer.Option(help="Fraction of last layers left out.")] = 0.2
    thresholds: Annotated[bool, typer.Option(help="Apply them; without, rank all.")] = True

    @property
    def rule(self) -> "Thresholds":
        """The published rule with these numbers."""
        from ..search.grid import NO_THRESHOLDS, Thresholds

        if not self.thresholds:
            return NO_THRESHOLDS
        induce_min = None if self.induce_min == -math.inf else self.induce_min
        return Thresholds(limit(self.kl_max), induce_min, self.prune_layers)


def limit(value: float | None) -> float | None:
    """A largest value; inf is none."""
    return None if value == math.inf else value
