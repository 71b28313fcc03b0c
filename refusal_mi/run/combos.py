"""`combos.json` and `combos/`: what ablating directions together did, on validation and on held-out prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from pydantic import TypeAdapter

from ..files import as_json, parsed
from ..measures import LossResult
from ..model.provenance import ModelRecord
from ..stats import Rate
from ..values import Value, frame
from .answers import Effect, read_effect
from .options import CombosOptions
from .record import CombinationRecord


@dataclass(frozen=True, eq=False, repr=False)
class ValidationRow(Value):
    """`combos/{label}.json`: what one ablation did on validation prompts."""

    label: str
    bypass: float
    """Mean refusal score on harmful prompts, nats."""
    bypass_interval: tuple[float, float]
    kl_nats: float
    refusal: Rate
    """Of short answers to harmful prompts."""
    degenerate: Rate
    ce_loss: Mapping[str, LossResult]
    quick: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class CombinationRow(Value):
    """A combination and what ablating it did."""

    combination: CombinationRecord
    measured: ValidationRow

    def describe(self) -> dict[str, Any]:
        """Both in one table."""
        return {**as_json(self.combination), **as_json(self.measured)}


def _row(row: CombinationRow) -> dict[str, Any]:
    made, found = row.combination, row.measured
    low, high = found.refusal.interval
    rates = {"refusal": found.refusal.value, "low": low, "high": high, "degenerate": found.degenerate.value}
    losses = {f"ce_loss ({name})": loss.ce_loss for name, loss in found.ce_loss.items()}
    return {"label": made.label, "ranks": made.ranks, "multi": made.multi, "effective_rank": made.effective_rank} | {
        "bypass": found.bypass,
        "kl_nats": found.kl_nats,
        **rates,
        **losses,
    }


def _combination_rows(tables: Any) -> tuple[CombinationRow, ...]:
    combination, measured = TypeAdapter(CombinationRecord), TypeAdapter(ValidationRow)
    return tuple(
        CombinationRow(combination.validate_python(table), measured.validate_python(table)) for table in tables
    )


@dataclass(frozen=True)
class Skipped:
    """Ranks that are not a combination, and why."""

    ranks: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Difference:
    """A difference of two rates on the same prompts, with its 95% interval."""

    refusal_rate: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class CombosTest(Value):
    """The winner on held-out prompts, beside the plain model, the best single direction and random spans."""

    set_name: str
    n: int
    baseline: Effect
    winner: Effect
    random: tuple[Effect, ...]
    single_best: Effect | None = None
    winner_minus_single: Difference | None = None

    def describe(self) -> dict[str, Any]:
        """What was measured."""
        record = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}
        return {"set": record.pop("set_name"), **record}


def _combos_test(table: Any) -> CombosTest | None:
    if table is None:
        return None
    single, gap = table.get("single_best"), table.get("winner_minus_single")
    return CombosTest(
        table["set"],
        table["n"],
        read_effect("baseline", table["baseline"]),
        read_effect("ablation", table["winner"]),
        tuple(read_effect(f"random_ablation_{seed}", rates) for seed, rates in enumerate(table["random"])),
        None if single is None else read_effect("ablation", single),
        None if gap is None else Difference(**gap),
    )


@dataclass(frozen=True, eq=False, repr=False)
class CombosResult(Value):
    """`combos.json`: single directions and combinations on validation prompts, the winner on held-out ones."""

    model: ModelRecord
    quick: bool
    status: str
    """done, no candidate survives, does not refuse, or why there is no winner."""
    options: CombosOptions
    explanation: str | None = None
    """Why there are no combinations."""
    text_set: str = ""
    """What CE loss decides ties on."""
    n_validation: Mapping[str, int] = field(default_factory=dict)
    """By side."""
    baseline: ValidationRow | None = None
    """The plain model."""
    combinations: Annotated[tuple[CombinationRow, ...], parsed(_combination_rows)] = ()
    skipped: tuple[Skipped, ...] = ()
    random: tuple[ValidationRow, ...] = ()
    """Random spans of the winner's rank."""
    winner: str | None = None
    """Label."""
    single_best: str | None = None
    test: Annotated[CombosTest | None, parsed(_combos_test)] = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_frame(self) -> Any:
        """A pandas table with a row for each combination on validation prompts: ranks, scores, refusals, CE loss.

        Raises:
            UserError: pandas is not installed.
        """
        return frame([_row(each) for each in self.combinations])

    def describe(self) -> dict[str, Any]:
        """What was reached; with a baseline also what is empty so far."""
        always = {"combinations", "skipped"} if self.baseline is not None else set()
        always |= {"random", "single_best"} if self.winner is not None else set()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if name in always or value not in (None, {}, (), "")}
