"""`methods.json`: what methods of removing refusal cost where all leave as few refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_record
from ..model.provenance import ModelRecord
from ..search.methods import Matched
from ..stats import Rate
from ..values import Value, frame
from .capability import TaskEffect

FILE = "methods.json"


@dataclass(frozen=True, eq=False, repr=False)
class AtStrength(Value):
    """What a removal does on held-out prompts."""

    strength: float
    refused: Rate
    """Short answers (the run's `label_tokens`), judged by text."""
    refused_by_score: Rate
    kl_nats: tuple[float, float, float]
    """Over all held-out harmless prompts, which may be more or fewer than the harmful ones."""
    n_harmless: int | None = None
    """How many these are; None in files of before."""


@dataclass(frozen=True, eq=False, repr=False)
class MethodRow(Value):
    """A method with so many directions, at the place where it was best on validation prompts."""

    label: str
    """Method and number of directions: "peel:2"."""
    k: int
    """Dimensions of what is removed."""
    layer: int
    position: int | None
    """Of the first direction, for ranks, which come from several places."""
    curve: tuple[AtStrength, ...]
    matched: Matched
    over_single: tuple[float | None, float | None, float | None]
    """Of several directions: KL over that of one direction of the same method, matched in the same way."""
    read_at: float
    """Strength at which longer answers were read: the matched one, or 1."""
    refused_by_text: Rate
    degenerate: Rate
    text_change: Mapping[str, float | int]
    """Refused answers minus those of the reference at its own matched strength, the same prompts."""
    ce_change: float
    """CE on plain texts minus that of the plain model (nats per token)."""

    def at(self, strength: float) -> AtStrength:
        """What was measured at one strength."""
        return next(each for each in self.curve if each.strength == strength)


@dataclass(frozen=True, eq=False, repr=False)
class ControlRow(Value):
    """A subspace that no method chose, at strength 1."""

    label: str
    """random: isotropic; within: random halves of one class."""
    k: int
    seed: int
    refused_by_score: float
    """Counted smoothly (`search.localize.expected_refused`)."""
    kl_nats: float


@dataclass(frozen=True, eq=False, repr=False)
class SetRefusals(Value):
    """What is refused of a set of harmless prompts."""

    set_name: str
    """held-out: the run's own."""
    refused: Rate
    """By text, in longer answers (`max_new_tokens`)."""
    degenerate: Rate
    change: Mapping[str, float | int]
    """Refused minus that of the plain model, the same prompts (`Paired.describe`)."""


@dataclass(frozen=True, eq=False, repr=False)
class BesideRow(Value):
    """What a removal does where nothing harmful is asked: over-refusal and tasks, beside the plain model."""

    label: str
    """A method's, plain, or of the control random:k, a whole random subspace of so many dimensions."""
    strength: float
    """`MethodRow.read_at`; of a control 1."""
    over_refusal: tuple[SetRefusals, ...]
    capability: tuple[TaskEffect, ...] = ()
    """Of each task; of the plain model against itself."""


@dataclass(frozen=True, eq=False, repr=False)
class DrawsRow(Value):
    """A method found again from drawn training prompts, compared with one that was found from the same."""

    label: str
    over: str
    """Whose cost the ratios are to: the reference, or one direction of the same method."""
    layers: tuple[int | None, ...]
    """Of the place that was best on validation prompts, for each draw; None: it gave no directions."""
    ratios: tuple[float | None, ...]
    """KL over that of the other at equal refusal, for each draw, the run's own training prompts first; None: never as
    few refusals, or no directions."""
    one_fit: tuple[float | None, float | None, float | None] = (None, None, None)
    """That of all training prompts with its 95% interval over held-out and training prompts (`match_draws`); None in
    files of before, which had a mean over draws."""
    sd_draws: float | None = None
    """Distance of the drawn ratios from the first, on the log scale."""
    se_prompts: float | None = None
    """Standard error of the first over held-out prompts, on the log scale."""


@dataclass(frozen=True)
class Opened:
    """When held-out prompts were looked at, after everything had been chosen."""

    created: str | None
    """UTC; None: before this was written down."""
    methods: tuple[str, ...]
    """Chosen by then."""
    n_draws: int
    chosen: str
    """Hash of what was chosen."""


@dataclass(frozen=True, eq=False, repr=False)
class MethodsResult(Value):
    """`methods.json`."""

    model: ModelRecord
    kl_tokens: int
    zero_point_nats: float
    n_validation: int
    n_held_out: int
    plain_refused_by_text: Rate
    """As `MethodRow.refused_by_text`."""
    target: float
    """The share of refused short answers that is matched: `Curve.target` of the reference."""
    rows: tuple[MethodRow, ...]
    """The reference, mean:1, first."""
    controls: tuple[ControlRow, ...]
    overlaps: tuple[tuple[float, ...], ...]
    """Of the rows' subspaces: ‖Q₁Q₂ᵀ‖² / min(k₁, k₂)."""
    d_model: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Methods that gave no directions, and why."""
    opened: tuple[Opened, ...] = ()
    """More than one: methods were added to the folder after held-out prompts had been used."""
    beside: tuple[BesideRow, ...] = ()
    """The plain model first, then the methods, then controls; empty in files of before."""
    draws: tuple[DrawsRow, ...] = ()
    """Empty where the training prompts were not drawn again."""
    dependence: tuple[tuple[float, ...], ...] = ()
    """Of single directions (`estimators.repind.dependence`), the ablated one by row, on validation prompts."""
    dependence_of: tuple[str, ...] = ()
    """Labels of its rows and columns; the last is the control, a random direction."""

    @classmethod
    def load(cls, path: str | Path) -> "MethodsResult":
        """Read `methods.json`, or the one in this folder."""
        path = Path(path)
        return read_record(path / FILE if path.is_dir() else path, cls)

    def row(self, label: str) -> MethodRow:
        """One method's, such as "peel:2"."""
        return next(each for each in self.rows if each.label == label)

    def dependent(self, label: str, other: str | None = None) -> float | None:
        """The larger of how much ablating either direction changes the cosines with the other; None: not measured.

        Args:
            other: by default the reference.
        """
        names = list(self.dependence_of)
        pair = label, self.rows[0].label if other is None else other
        if not set(pair) <= set(names):
            return None
        one, two = map(names.index, pair)
        return max(self.dependence[one][two], self.dependence[two][one])

    def to_frame(self) -> Any:
        """A pandas table with a row for each method and strength."""
        rows = [(row, each) for row in self.rows for each in row.curve]
        return frame(
            [
                {"label": row.label, "k": row.k, "strength": each.strength, "refused": each.refused.value}
                | {"refused_by_score": each.refused_by_score.value, "kl": each.kl_nats[0]}
                for row, each in rows
            ]
        )
