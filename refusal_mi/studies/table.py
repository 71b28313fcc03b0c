"""The table of a study: a row for each number, with its interval and what it was computed from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import UserError, cause
from ..files import FORMAT, write_whole
from ..model.provenance import ModelRecord
from ..run.methods import MethodsResult
from ..run.record import RunSummary
from ..stats import Rate
from ..values import Value

TABLE = "study.parquet"
PLAIN = "plain"
"""Method of rows about the model as it is."""
_SHARE, _NATS = "share", "nats per token"


@dataclass(frozen=True)
class Number:
    """What was measured of a method, with its 95% interval where there is one; of controls the range of the draws."""

    stage: str
    """run or compare-methods."""
    method: str
    """plain, an intervention of the run, or a method's name."""
    k: int | None
    """Dimensions that are removed."""
    set: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    """Prompts; of CE loss tokens, of controls draws."""
    unit: str
    reason: str = ""
    """Why a method gave nothing."""


@dataclass(frozen=True, eq=False, repr=False)
class CellRows(Value):
    """`rows.json` of a cell: how its run ended, and its numbers."""

    status: str
    """done, does not refuse, no candidate survives, directions only."""
    created: str
    """When: ISO 8601, UTC."""
    model: ModelRecord
    versions: Mapping[str, str]
    quick: bool
    rows: tuple[Number, ...]


@dataclass(frozen=True)
class TableRow:
    """A row of `study.parquet`; without numbers where a model or a cell failed."""

    model: str
    data: str | None
    seed: int | None
    stage: str | None
    method: str | None
    k: int | None
    set: str | None
    metric: str | None
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    unit: str | None
    status: str
    reason: str
    source: str | None
    revision: str | None
    fingerprint: str | None
    dtype: str | None
    device: str | None
    quick: bool | None
    versions: str | None
    """JSON."""
    folder: str
    """Of the run, inside the study's."""
    created: str
    format: int = FORMAT

    @classmethod
    def failed(
        cls, model: str, folder: str, reason: str, created: str, data: str | None, seed: int | None
    ) -> "TableRow":
        """Of a model, or a cell, that failed."""
        said = {"model": model, "data": data, "seed": seed, "status": "failed", "reason": reason}
        nothing: dict[str, Any] = {each.name: None for each in fields(cls)}
        return cls(**nothing | said | {"folder": folder, "created": created, "format": FORMAT})


def table_rows(model: str, data: str, seed: int, folder: str, found: CellRows) -> list[TableRow]:
    """The rows of a cell."""
    made = found.model
    about = (made.source, made.revision, made.fingerprint, made.dtype, made.device, found.quick)
    tail = (*about, json.dumps(dict(found.versions)), folder, found.created)
    return [
        TableRow(
            model, data, seed, each.stage, each.method, each.k, each.set, each.metric,
            each.value, each.low, each.high, each.n, each.unit, found.status, each.reason, *tail
        )
        for each in found.rows
    ]  # fmt: skip


def numbers(summary: RunSummary, compared: MethodsResult | None) -> tuple[Number, ...]:
    """What a run and its methods measured, in a fixed order."""
    return (*_of_run(summary), *(_of_methods(compared) if compared else ()))


def _of_run(summary: RunSummary) -> list[Number]:
    found = [
        _rate("run", PLAIN, 0, f"{side}: train and val", "refused", rate)
        for side, rate in summary.refused_by_text.items()
    ]
    for side, effects in summary.completions.items():
        name = side if effects.set_name == side else f"{side}: {effects.set_name}"
        for effect in effects.effects:
            method, k = (PLAIN, 0) if effect.label == "baseline" else (effect.label, 1)
            for metric, rate in effect.rates.items():
                found.append(_rate("run", method, k, name, "refused" if metric == "refusal" else metric, rate))
    for label, losses in summary.ce_loss.items():
        method, k = (PLAIN, 0) if label == "baseline" else (label, 1)
        for texts, loss in losses.items():
            found.append(Number("run", method, k, texts, "ce_loss", loss.ce_loss, None, None, loss.n_tokens, _NATS))
            if loss.change is not None:
                found.append(Number("run", method, k, texts, "ce_change", *loss.change, loss.n_tokens, _NATS))
    return found


def _of_methods(compared: MethodsResult) -> list[Number]:
    stage, n = "compare-methods", compared.n_held_out
    found = [_rate(stage, PLAIN, 0, "harmful", "refused", compared.plain_refused_by_text)]
    for row in compared.rows:
        method, k = row.label.rpartition(":")[0], row.k
        at, change, matched = row.at(1.0), row.text_change, row.matched
        found += [
            _rate(stage, method, k, "harmful", "refused_short", at.refused),
            Number(stage, method, k, "harmless", "kl", *at.kl_nats, at.n_harmless, _NATS),
            Number(stage, method, k, "harmful", "matched_strength", matched.strength, None, None, n, "strength"),
            Number(stage, method, k, "harmless", "matched_kl", matched.kl_nats, None, None, n, _NATS),
            Number(stage, method, k, "harmless", "kl_ratio", *matched.ratio, n, "ratio"),
            _rate(stage, method, k, "harmful", "refused", row.refused_by_text),
            _rate(stage, method, k, "harmful", "degenerate", row.degenerate),
            Number(
                stage, method, k, "harmful", "refused_change",
                change["difference"], change["low"], change["high"], int(change["n"]), _SHARE
            ),
            Number(stage, method, k, "plain texts", "ce_change", row.ce_change, None, None, None, _NATS),
        ]  # fmt: skip
    for name, k in dict.fromkeys((each.label, each.k) for each in compared.controls):
        drawn = [each for each in compared.controls if (each.label, each.k) == (name, k)]
        for metric, unit, of_set, values in (
            ("refused_by_score", _SHARE, "harmful", [each.refused_by_score for each in drawn]),
            ("kl", _NATS, "harmless", [each.kl_nats for each in drawn]),
        ):
            mean, n_draws = fmean(values), len(values)
            least, most = (None, None) if n_draws == 1 else (min(values), max(values))
            found.append(Number(stage, f"control: {name}", k, of_set, metric, mean, least, most, n_draws, unit))
    for label, reason in compared.skipped.items():
        method, _, k_text = label.rpartition(":")
        nothing = (None, None, None, None)
        found.append(Number(stage, method, int(k_text), "harmful", "refused", *nothing, _SHARE, reason))
    return found


def _rate(stage: str, method: str, k: int, of_set: str, metric: str, rate: Rate) -> Number:
    return Number(stage, method, k, of_set, metric, rate.value, *rate.interval, rate.n, _SHARE)


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Write rows as Parquet: texts, int64, float64, booleans."""
    import pyarrow.parquet

    kinds = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    columns = [(each.name, kinds[_kind(each.type)]) for each in fields(TableRow)]
    schema = pyarrow.schema(columns, metadata={"refusal_mi.format": str(FORMAT)})
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema)
    write_whole(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def _kind(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).partition(" ")[0]


def read_table(path: str | Path) -> tuple[TableRow, ...]:
    """The rows of `study.parquet`, or of the one in this folder.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    import pyarrow.parquet

    path = Path(path)
    path = path / TABLE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no such file: {path}; refusal-mi study makes it")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        found = tuple(TableRow(**row) for row in rows)
    except Exception as error:  # foreign code: pyarrow raises many kinds
        raise UserError(f"{path} is no table of a study: {cause(error)}") from None
    other = next((row.format for row in found if row.format != FORMAT), None)
    if other is not None:
        raise UserError(f"{path} is of format {other!r}, and this version of refusal_mi reads format {FORMAT}")
    return found
