"""What every analysis returns: a frozen result that says its units, names its model, saves and draws itself."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Unpack, get_args, get_origin

import plotly.graph_objects as go
import torch
from torch import Tensor

from ..errors import UserError
from ..figures.style import Look
from ..files import (
    as_json,
    at_home,
    checked,
    read_json,
    read_record,
    read_tensors,
    sha256_json,
    write_json,
    write_tensors,
)
from ..interventions import check_width
from ..loaded import Run, load_run
from ..model.loading import ORGANISM
from ..model.points import HookedModel, model_source
from ..model.provenance import check_same_weights, describe_model, versions
from ..run.folder import RunInputs
from ..run.record import RUN, RunInfo
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..values import Value, frame, html_table, named_near, short

FORMAT = 1
_RECORD_KEYS = {"kind", "format", "fields", "provenance"}


_SHORT = 60


@dataclass(frozen=True)
class Finding:
    """A quantity of a result, as text."""

    name: str
    unit: str
    value: str
    """Of one number or word; of several the least and the most, and where."""
    least: str = ""
    least_at: str = ""
    most: str = ""
    most_at: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class AnalysisResult(Value):
    """Base of all results: tensors are saved to `.pt`, everything else to the JSON beside it.

    A subclass is a frozen dataclass whose fields are tensors, dicts of tensors, or JSON values with tuples for
    lists; it sets `kind` (the name of its module) and `units` (field -> unit). Numbers that do not exist are None
    in JSON fields and NaN in tensors.

    Examples:
        >>> compared = compare_directions({"one": direction, "another": other})
        >>> compared.to_frame("norms").columns.tolist()
        ['direction', 'norms']
        >>> [each.name for each in compared.findings()]
        ['cosines', 'norms', 'null_p95', 'd_model']
    """

    kind: ClassVar[str]
    units: ClassVar[Mapping[str, str]]

    provenance: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What it was computed from; see `provenance_of`."""

    @property
    def model_name(self) -> str:
        """The model's short name, for titles; empty where no model took part."""
        return str(self.provenance.get("model", {}).get("name", ""))

    def __repr__(self) -> str:
        shown = [f"{name} {text}" for name, text, _ in self._rows() if "[" in text][:3]
        about = f" of {self.model_name}" if self.model_name else ""
        return f"{type(self).__name__}{about}: {'; '.join(shown)}"

    def _repr_html_(self) -> str:
        title = f"{type(self).__name__} of {self.model_name}" if self.model_name else type(self).__name__
        return html_table(title, ("field", "value", "unit"), self._rows())

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, value in short and unit of every field but the provenance."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "provenance"}
        axes = self._axes({name: value for name, value in values.items() if _holds_tensors(value)})
        return [
            (name, f"[{' '.join(axes[name].split())}] {short(value)}" if axes.get(name) else short(value), unit)
            for name, value in values.items()
            for unit in [self.units.get(name, "")]
        ]

    def to_frame(self, field: str | None = None) -> Any:
        """A pandas table of one tensor, a row for each of its numbers; its first by default.

        Columns are its axes, by name where the result names them, and the group of a prompt; "of" where the field has
        several tensors by name; its numbers, and those of the fields that have the same axes.

        Raises:
            UserError: there is no such tensor, or pandas is not installed.
        """
        tables = {item.name: value for item in fields(self) if _holds_tensors(value := getattr(self, item.name))}
        name = next(iter(tables), None) if field is None else field
        if name is None or name not in tables:
            raise UserError(f"{type(self).__name__} has no tensor {name!r}; {named_near(str(name), list(tables))}")
        axes = self._axes(tables)
        if isinstance(tables[name], dict):
            parts = [(key, {name: value}) for key, value in tables[name].items()]
            return frame([row for key, part in parts for row in self._long(part, [], {"of": key})])
        beside = {
            other: value
            for other, value in tables.items()
            if other == name or (axes[other] == axes[name] and getattr(value, "shape", None) == tables[name].shape)
        }
        return frame(self._long(beside, axes[name].split(), {}))

    def findings(self) -> list[Finding]:
        """What the result holds, in one row for each quantity: its numbers, or the least and the most and where.

        Over prompts it is the mean of every group.
        """
        found: list[Finding] = []
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "provenance"}
        axes = self._axes({name: value for name, value in values.items() if _holds_tensors(value)})
        for name, value in values.items():
            unit = self.units.get(name, "")
            if isinstance(value, bool | int | float | str) and len(str(value)) <= _SHORT:
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                found.append(Finding(name, unit, shown))
            elif name in axes:
                parts = value if isinstance(value, dict) else {"": value}
                for of, tensor in parts.items():
                    found += self._extremes(f"{name}, {of}" if of else name, unit, tensor, axes[name].split())
        return found

    def _extremes(self, name: str, unit: str, tensor: Tensor, axes: Sequence[str]) -> Iterator[Finding]:
        """The least and the most of a tensor of numbers, of every group of prompts."""
        if not tensor.is_floating_point() or not bool(tensor.isfinite().any()):
            return
        named, groups = [*axes, *("" for _ in range(tensor.ndim - len(axes)))], getattr(self, "groups", None)
        tensor = tensor.double().masked_fill(~tensor.isfinite(), math.nan)
        if "prompt" in named and groups and tensor.shape[named.index("prompt")] == len(groups):
            axis = named.index("prompt")
            rest = [each for each in named if each != "prompt"]
            for group in dict.fromkeys(groups):
                rows = [index for index, each in enumerate(groups) if each == group]
                mean = tensor.index_select(axis, torch.tensor(rows)).nanmean(dim=axis)
                yield from self._extremes(f"{name}, {group}", unit, mean, rest)
            return
        ends = [tensor.nan_to_num(math.inf).argmin().item(), tensor.nan_to_num(-math.inf).argmax().item()]
        shown = [f"{tensor.flatten()[int(at)].item():.4g}" for at in ends]
        if tensor.numel() == 1:
            yield Finding(name, unit, shown[0])
            return
        places = [", ".join(self._places(named, tensor.shape, int(at))) for at in ends]
        yield Finding(name, unit, "", shown[0], places[0], shown[1], places[1])

    def _places(self, axes: Sequence[str], shape: Sequence[int], at: int) -> Iterator[str]:
        """The labels of a place, of axes that have a name."""
        where = [int(index) for index in torch.unravel_index(torch.tensor(at), tuple(shape))]
        for axis, size, index in zip(axes, shape, where, strict=True):
            if axis:
                yield from (f"{name} {label}" for name, label in self._label(axis, size, index).items())

    def _long(self, columns: Mapping[str, Tensor], axes: Sequence[str], constant: Mapping[str, Any]) -> list[Any]:
        """A row for each place in tensors of one shape."""
        shape = next(iter(columns.values())).shape
        flat = {name: value.flatten().tolist() for name, value in columns.items()}
        rows = []
        for index, place in enumerate(product(*map(range, shape))):
            row = dict(constant)
            for axis, at in enumerate(place):
                row |= self._label(axes[axis] if axis < len(axes) else f"axis {axis}", shape[axis], at)
            rows.append(row | {name: values[index] for name, values in flat.items()})
        return rows

    def _label(self, axis: str, size: int, at: int) -> dict[str, Any]:
        """What stands at a place of an axis: a prompt with its group, a position, a layer of those that were read."""
        labels = getattr(self, {"pos": "positions"}.get(axis, f"{axis}s"), None)
        is_named = isinstance(labels, tuple) and len(labels) == size
        label = {axis: labels[at] if is_named and labels is not None else at}
        groups = getattr(self, "groups", None)
        return {"group": groups[at], **label} if axis == "prompt" and groups and len(groups) == size else label

    def save(self, path: str | Path) -> None:
        """Write `path` (.json) and the tensors beside it (.pt)."""
        path = at_home(path).with_suffix(".json")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "provenance"}
        tensors = {name: value for name, value in values.items() if _holds_tensors(value)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        record = {
            "kind": self.kind,
            "format": FORMAT,
            "units": dict(self.units),
            "tensors": {"file": path.with_suffix(".pt").name, "axes": self._axes(tensors)},
            "fields": plain,
            "provenance": dict(self.provenance),
        }
        write_tensors(path.with_suffix(".pt"), tensors)
        write_json(path, record)

    @classmethod
    def _load(cls, record: Mapping[str, Any], tensors: Mapping[str, Any]) -> "AnalysisResult":
        kinds = {item.name: item.type for item in fields(cls)}
        plain = {name: _checked(kinds.get(name, Any), value) for name, value in record["fields"].items()}
        if not all(map(_holds_tensors, tensors.values())):
            raise ValueError("something other than tensors stands among the tensors")
        return cls(**plain, **tensors, provenance=record["provenance"])

    @classmethod
    def _axes(cls, tensors: Mapping[str, Any]) -> dict[str, str]:
        """The axes of each tensor, read from its annotation."""
        annotated = {item.name: getattr(item.type, "dim_str", "") for item in fields(cls)}
        return {name: annotated[name].strip() for name in tensors}


def provenance_of(
    model: HookedModel,
    chat: ChatFormat | None,
    prompts: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a result was computed from: the model, the template, prompts by count and hash, settings, versions."""
    source = model_source(model)
    name = "the embedded model" if source == str(ORGANISM) else Path(source).name if Path(source).is_dir() else source
    record = describe_model(model, source)
    return {
        "model": {**as_json(record), "name": name, "source": "embedded" if source == str(ORGANISM) else source},
        "chat": None if chat is None else as_json(chat.record()),
        "prompts": {side: {"n": len(texts), "sha256": sha256_json(list(texts))} for side, texts in prompts.items()},
        "settings": dict(settings or {}),
        "versions": versions(),
    }


def each_group(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The group of every prompt."""
    return tuple(name for name, texts in groups.items() for _ in texts)


def prompts_of(run: RunInputs, part: str = "test", n: int | None = None) -> dict[str, list[str]]:
    """The harmful and harmless prompts of a run, the first `n` of them."""
    return {side: run.prompts(side, part)[:n] for side in ("harmful", "harmless")}


def template_tokens(chat: ChatFormat) -> tuple[str, ...]:
    """The vocabulary entries at the post-instruction positions."""
    return tuple(chat.tokenizer.convert_ids_to_tokens(list(chat.post_instruction_ids)))


def check_position(chat: ChatFormat, position: int) -> None:
    """Refuse what is no post-instruction position.

    Raises:
        UserError: it is none.
    """
    if position not in chat.positions:
        raise UserError(f"no position {position}: the post-instruction positions are {chat.positions}")


def load_result(path: str | Path) -> AnalysisResult:
    """Read what `save` wrote: RESULT.json, or its .pt.

    Examples:
        >>> found = compare_directions({"one": direction, "another": other})
        >>> found.save("comparison.json")
        >>> load_result("comparison.json") == found
        True

    Raises:
        UserError: the file is missing or holds no analysis result.
    """
    path = at_home(path).with_suffix(".json")
    record = read_json(path)
    if not is_result_record(record):
        raise UserError(f"{path} is not an analysis result: expected a JSON object with {sorted(_RECORD_KEYS)}")
    tensors, kind = read_tensors(path.with_suffix(".pt")), result_class(record["kind"])
    if not isinstance(tensors, dict):
        raise UserError(f"{path.with_suffix('.pt')} does not hold the tensors of an analysis result by name")
    try:
        return kind._load(record, tensors)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or was saved by another version of this analysis: {error}") from None


def is_result_record(record: Any) -> bool:
    """Whether a JSON value is a saved analysis result."""
    if not isinstance(record, dict) or not record.keys() >= _RECORD_KEYS:
        return False
    return isinstance(record["fields"], dict) and isinstance(record["provenance"], dict)


def result_class(kind: str) -> type[AnalysisResult]:
    """The result class of an analysis: the one in `refusal_mi.analysis.<kind>` that carries its name.

    Raises:
        UserError: there is no such analysis.
    """
    classes = [value for value in vars(analysis_module(kind)).values() if isinstance(value, type)]
    return next(each for each in classes if issubclass(each, AnalysisResult) and getattr(each, "kind", None) == kind)


def analysis_module(kind: str) -> Any:
    """The module of an analysis.

    Raises:
        UserError: there is no such analysis.
    """
    from . import KINDS

    if kind not in KINDS:
        raise UserError(f"no such analysis: {kind!r}; expected some of {', '.join(KINDS)}")
    return import_module(f"refusal_mi.analysis.{kind}")


class CalledWithARun(ModuleType):
    """The module of an analysis, which is called with a model and a run: `analysis.attribution(model, "runs/x")`."""

    def __call__(
        self,
        model: HookedModel,
        run: Run | RunInputs | str | Path,
        *,
        max_prompts: int = 128,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> AnalysisResult:
        """The analysis with the run's own direction, prompts, chat format and refusal tokens, as `analyze` does it.

        Args:
            run: its folder, or what `load_run` gives; `RunInputs` bring their own settings.
            max_prompts: held-out prompts a side, at most.
            batch_size: texts per forward pass; None: as many as the memory holds.
            seed: of the controls.

        Raises:
            UserError: there is no such run, it does not have what the analysis needs, or the model is another one.
        """
        if isinstance(run, RunInputs):
            inputs, batch_size = replace(run, model=model), run.batch_size if batch_size is None else batch_size
        else:
            found = run if isinstance(run, Run) else load_run(run)
            inputs = found.inputs(model, max_prompts=max_prompts, seed=seed)
        check_width(len(inputs.direction.vector), model.cfg.d_model)
        check_same_weights(read_record(inputs.path / RUN, RunInfo).model, model, str(inputs.path))
        return with_smaller_batches(lambda size: self.from_run(replace(inputs, batch_size=size)), batch_size)


def call_with_a_run(module: str) -> None:
    """Make the module of an analysis one that can be called."""
    sys.modules[module].__class__ = CalledWithARun


def finite_or_none(value: float) -> float | None:
    """A number for a JSON field."""
    return value if math.isfinite(value) else None


def _checked(kind: Any, value: Any) -> Any:
    """The JSON value of a field of this type; of tensors JSON holds no more than an empty dict.

    Raises:
        ValueError: it does not hold what the type says.
    """
    is_dict = get_origin(kind) is dict and Tensor in get_args(kind)
    if not is_dict and not hasattr(kind, "dim_str"):
        return checked(kind, value)
    if is_dict and value == {}:
        return {}
    raise ValueError("a tensor stands among the numbers and words")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(entry, Tensor) for entry in value.values())
    return isinstance(value, Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class Drawn(Value):
    """The figures of a result."""

    figures: dict[str, go.Figure | str]
    """By name, the main one first; a complete HTML page where plotly has no such view."""
    left_out: dict[str, str]
    """Name -> why the result has no such figure."""


def plot(result: AnalysisResult, **look: Unpack[Look]) -> go.Figure | str:
    """The main figure of a result; a complete HTML page where plotly has no such view.

    Examples:
        >>> figure = plot(compare_directions({"one": direction, "another": other}), width=600)
    """
    return next(iter(_figures_of(result).values()))(result, **look)


def figures(result: AnalysisResult) -> dict[str, go.Figure | str]:
    """Every figure that a result has, by name; the main one first. A warning says which are missing, and why.

    Examples:
        >>> list(figures(compare_directions({"one": direction, "another": other})))
        ['comparison']
    """
    drawn = draw_all(result)
    for name, why in drawn.left_out.items():
        warnings.warn(f"no figure {name}: {why}", stacklevel=2)
    return drawn.figures


def draw_all(result: AnalysisResult) -> Drawn:
    """Every figure that a result has, and why it has no others."""
    drawn, left_out = {}, {}
    for name, draw in _figures_of(result).items():
        try:
            drawn[name] = draw(result)
        except UserError as error:
            left_out[name] = str(error)
    return Drawn(drawn, left_out)


def _figures_of(result: AnalysisResult) -> dict[str, Callable[..., go.Figure | str]]:
    return analysis_module(result.kind).FIGURES
