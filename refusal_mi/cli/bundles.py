"""Options that always come together, written once: a command takes a dataclass, its user sees one option per field."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .arguments import (
    Device,
    Dtype,
    JudgeModel,
    JudgeName,
    Model,
    ModelPath,
    Revision,
    System,
    TemplateKwargs,
    one_model,
    parse_pairs,
    quiet_load,
)

if TYPE_CHECKING:
    from ..chat import ChatFormat
    from ..judges import Judge
    from ..models import HookedModel
    from ..selection import Thresholds


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
        from ..chat import ChatFormat

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
        from ..http_judge import judge_named

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
        from ..selection import NO_THRESHOLDS, Thresholds

        if not self.thresholds:
            return NO_THRESHOLDS
        induce_min = None if self.induce_min == -math.inf else self.induce_min
        return Thresholds(limit(self.kl_max), induce_min, self.prune_layers)


def limit(value: float | None) -> float | None:
    """A largest value; inf is none."""
    return None if value == math.inf else value
