"""Options that commands share: how they are spelled, read and checked."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import typer

from ..errors import UserError
from ..options import (
    JUDGE_METAVAR,
    MEANINGS,
    RANK_LIST,
    AllowSpecialTokens,
    JudgeLabels,
    JudgeModel,
    Option,
    Quantization,
    System,
    TemplateKwargs,
    check_choice,
    said,
)
from ..search.thresholds import PUBLISHED, Rule
from ..values import Value

if TYPE_CHECKING:
    from ..judges.substring import Judge
    from ..model.points import HookedModel
    from ..model.provenance import ModelRecord
    from ..text.chat import ChatFormat

Options = TypeVar("Options")
SCIENCE_FAILED = 1
"""Exit status: the science or the verification failed, artifacts are kept."""


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Local directory or hub id; nothing: the embedded model.")
]
ModelPath = Annotated[str | None, typer.Option(help="The same as MODEL; also --model_path, as in write-ups.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's; float32 on a CPU), float32, bfloat16, ...")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto, balanced, or a JSON object module: device; splits the model.", metavar="auto|JSON"),
]
MaxMemory = Annotated[
    str | None, typer.Option(help="Of every device, for --device-map: 0=20GiB,cpu=60GiB.", metavar="DEVICE=SIZE,...")
]
QuantizationOption = Annotated[
    str | None, typer.Option("--quantization", help="bnb-4bit or bnb-8bit (CUDA).", metavar="bnb-4bit|bnb-8bit")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that come with MODEL, as you.")
]
BatchSize = Annotated[str | None, typer.Option(help=MEANINGS["batch_size"])]
OutputDir = Annotated[Path | None, typer.Option(help=MEANINGS["output_dir"])]
Output = Annotated[Path | None, typer.Option(help=MEANINGS["output"])]
DirectionSource = Annotated[Path | None, typer.Option(help=MEANINGS["direction"])]
Ranks = Annotated[
    str | None,
    typer.Option("--directions", help=f"Candidates of a run by rank, ablated instead of the best: {RANK_LIST}."),
]
Seed = Annotated[int | None, typer.Option(help=MEANINGS["seed"])]
NPrompts = Annotated[int | None, typer.Option(help=MEANINGS["n_prompts"])]
NRandom = Annotated[int | None, typer.Option(help=MEANINGS["n_random"])]
NewTokens = Annotated[int | None, typer.Option(help=MEANINGS["max_new_tokens"])]
Multi = Annotated[str | None, typer.Option(help=MEANINGS["multi"])]
Layers = Annotated[str | None, typer.Option(help=MEANINGS["layers"])]
PositionsOption = Annotated[str | None, typer.Option("--positions", help=MEANINGS["positions"])]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")]
AllowOtherModel = Annotated[
    bool, typer.Option("--allow-other-model", help="Use directions that were read in another model.")
]
Layer = Annotated[int | None, typer.Option(help=MEANINGS["layer"])]
Hook = Annotated[str | None, typer.Option(help=MEANINGS["hook"])]
Engine = Annotated[
    str,
    typer.Option(
        help="Where the model is run; ray: in --workers processes.",
        metavar="local|ray|ray://HOST:PORT",
    ),
]
Workers = Annotated[int | None, typer.Option(help=MEANINGS["workers"])]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def at_least(option: str, value: int | None, smallest: int, default: int) -> int:
    """What was given, or the default of the command; a smaller number is a UserError."""
    if value is not None and value < smallest:
        raise UserError(f"{option} must be at least {smallest}, not {value}")
    return default if value is None else value


def one_model(model: str | None, model_path: str | None) -> str:
    """MODEL, or --model-path, resolved; both is an error."""
    from ..model.loading import resolve_source

    if model is not None and model_path is not None:
        raise UserError(f"MODEL was given twice: {model!r} and --model-path {model_path!r}")
    return resolve_source(model if model is not None else model_path)


@dataclass(frozen=True)
class Given(Generic[Options]):
    """Options as they were given: what is left to the model is not among them."""

    values: Mapping[str, Any]

    def over(self, defaults: Options) -> Options:
        """The options, with the model's own defaults where nothing was given."""
        return replace(defaults, **self.values)  # type: ignore[type-var]


def flat(command: Callable[..., int]) -> Callable[..., int]:
    """The command as typer wants it: one parameter for every option of the dataclasses that it takes.

    A parameter that is a dataclass, or `Given` of one, stands for all of its fields; what they say of themselves
    (`refusal_mi.options.Option`, or typer's own annotations) is what the command line shows.
    """
    signature = inspect.signature(command)
    bundles = {p.name for p in signature.parameters.values() if _dataclass_of(p.annotation)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in bundles:
            parameters += _parameters(_dataclass_of(parameter.annotation))
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def call(**values: Any) -> int:
        return command(**bundled(command, values))

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def bundled(command: Callable[..., int], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command as it is written, from the values of its command line.

    Raises:
        UserError: an option does not take its value.
    """
    rest = dict(values)
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(inspect.unwrap(command)).parameters.items():
        kind: Any = _dataclass_of(parameter.annotation)
        if kind is not None:
            given = _given(kind, rest)
            made[name] = Given(given) if get_origin(parameter.annotation) is Given else kind(**given)
    return made | rest


def _dataclass_of(annotation: Any) -> Any:
    """The dataclass that a parameter stands for, or None."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Given else annotation
    return kind if is_dataclass(kind) else None


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    options = {each.name: each for each in said(kind)}
    for each in fields(kind):
        if each.name not in options:
            yield _parameter(each.name, each.type, each.default)
            continue
        spoken, option = options[each.name], options[each.name].option
        if is_dataclass(spoken.kind):
            yield from _parameters(spoken.kind)
            yield _parameter(each.name, Annotated[bool, typer.Option(help=option.help)], True)
            continue
        names = () if option.flags is None else (option.flags,)
        shown = typer.Option(*names, help=option.help, metavar=option.metavar, hidden=option.hidden)
        takes = spoken.kind if option.takes is None else option.takes
        takes = takes | None if option.own_default else takes
        default = None if option.depends_on_model or option.own_default else spoken.default
        if option.write is not None and not (default is None and NoneType in get_args(takes)):
            written = option.write(default)
            default = written if written or not isinstance(written, list) else None
        yield _parameter(each.name, Annotated[takes, shown], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _given(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from the values of the command line, which are taken out of them."""
    options: dict[str, Any] = {each.name: each for each in said(kind)}
    given: dict[str, Any] = {}
    for each in fields(kind):
        if each.name not in options:
            given[each.name] = values.pop(each.name)
            continue
        option = options[each.name].option
        inner_kind: Any = options[each.name].kind
        if isinstance(inner_kind, type) and is_dataclass(inner_kind):
            inner = _given(inner_kind, values)
            given[each.name] = inner_kind(**inner) if values.pop(each.name) else option.off
            continue
        value = values.pop(each.name)
        if value is not None or not (option.depends_on_model or option.own_default):
            given[each.name] = value if option.read is None else option.read(value)
    return given


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Model = None
    model_path: ModelPath = None
    revision: Revision = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    quantization: QuantizationOption = None
    trust_remote_code: TrustRemoteCode = False

    @classmethod
    def of_run(cls, made: "ModelRecord", device: str) -> "ModelOptions":
        """The model that a run was made of, loaded in the same way."""
        from ..model.provenance import is_embedded

        return cls(
            model=None if is_embedded(made.source) else made.source,
            revision=made.revision,
            device=device,
            dtype=made.dtype,
            device_map="auto" if made.is_split else None,
            quantization=made.quantization if made.quantization in get_args(Quantization) else None,
            trust_remote_code=made.remote_code,
        )

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
        from ..model.loading import quiet_load

        return quiet_load(self.source, **self.how())

    def how(self) -> dict[str, Any]:
        """What `load_model` takes beside the source; a value that is none of an option's is a UserError."""
        from ..model.loading import DeviceName, DtypeName

        for option, value, known in (
            ("--device", self.device, get_args(DeviceName)),
            ("--dtype", self.dtype, get_args(DtypeName)),
            ("--quantization", self.quantization, get_args(Quantization)),
        ):
            if value is not None:
                check_choice(option, value, known)
        return {
            "revision": self.revision,
            "device": self.device,
            "dtype": self.dtype,
            "device_map": parse_device_map(self.device_map),
            "max_memory": parse_memory(self.max_memory),
            "quantization": self.quantization,
            "trust_remote_code": self.trust_remote_code,
        }


def parse_device_map(text: str | None) -> str | dict[str, str | int] | None:
    """A name such as auto, or a JSON object from modules to devices."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        where = json.loads(text)
    except ValueError as error:
        raise UserError(f"--device-map is no JSON object: {error}") from None
    if not all(isinstance(device, str | int) and not isinstance(device, bool) for device in where.values()):
        raise UserError('--device-map takes a device for every module, as in {"": "cpu"}')
    return where  # type: ignore[no-any-return]


def parse_memory(text: str | None) -> dict[str | int, str | int] | None:
    """DEVICE=SIZE, comma-separated; devices are GPU numbers or cpu."""
    if text is None:
        return None
    sizes: dict[str | int, str | int] = {}
    for part in text.split(","):
        device, equals, size = (each.strip() for each in part.partition("="))
        if (
            not equals
            or not re.fullmatch(r"\d+|cpu|mps", device)
            or not re.fullmatch(r"\d+(\.\d+)? *[KMGT]i?B|\d+", size)
        ):
            raise UserError(f"--max-memory takes DEVICE=SIZE as in 0=20GiB,cpu=60GiB, not {part!r}")
        sizes[int(device) if device.isdecimal() else device] = int(size) if size.isdecimal() else size
    return sizes


@dataclass(frozen=True, eq=False, repr=False)
class TemplateOptions(Value):
    """What the chat template is given beside the conversation."""

    system: System = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    allow_special_tokens: AllowSpecialTokens = False

    def chat(self, model: "HookedModel") -> "ChatFormat":
        """The model's chat format."""
        from ..text.chat import ChatFormat

        return ChatFormat(
            model.tokenizer,
            self.system,
            self.template_kwargs,
            allow_special_tokens=self.allow_special_tokens,
        )


@dataclass(frozen=True)
class JudgeOptions:
    """Who says whether the model complied."""

    judge: Annotated[
        str | None,
        Option(MEANINGS["judge"], metavar=JUDGE_METAVAR),
    ] = None
    judge_model: JudgeModel = None
    judge_labels: JudgeLabels = None

    @property
    def name(self) -> str:
        """As it was named, or the default."""
        return "substring" if self.judge is None else self.judge

    def build(self, question: Literal["harm", "refusal"]) -> "Judge":
        """The judge; a name that is none, or of refusals a judge of harm, is a UserError."""
        from ..judges.named import check_says_refusal, judge_named

        judge = judge_named(self.name, model=self.judge_model, labels=self.judge_labels, question=question)
        if question == "refusal":
            check_says_refusal(judge)
        return judge


@dataclass(frozen=True)
class ThresholdOptions:
    """What a candidate direction must satisfy."""

    thresholds: Rule = PUBLISHED
