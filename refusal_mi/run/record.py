"""What a run folder holds, finished or not: its files as dataclasses, written by the recipes and read back here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from ..directions import Direction
from ..files import parsed, with_values
from ..measures import LossResult
from ..model.provenance import ModelRecord
from ..search.grid import Selection
from ..search.thresholds import CandidateScore, Thresholds
from ..stats import Rate
from ..text.chat import ChatRecord
from ..text.prompts import Prompt, PromptSet
from ..values import Value
from .answers import Completion, Side, SideEffects, read_sides
from .options import RunOptions

RUN, PROMPTS, SUMMARY = "run.json", "prompts.json", "summary.json"
MEAN_DIFFS, MEAN_DIFFS_RECORD = "generate_directions/mean_diffs.pt", "generate_directions/mean_diffs.json"
LABELS = "labels.json"
MEANS = "generate_directions/means.pt"
EVALUATIONS = "select_direction/direction_evaluations.json"
SURVIVORS = "select_direction/direction_evaluations_filtered.json"
PUBLISHED_TOKENS = "select_direction/direction_evaluations_published_tokens.json"
SCORES, BASELINE = "select_direction/scores.pt", "select_direction/baseline.json"
CONTROLS = "select_direction/controls.json"
DIRECTION, DIRECTION_RECORD = "direction.pt", "direction_metadata.json"
DOES_NOT_REFUSE = "does not refuse"
"""Status of a run whose model does not."""
SPAN, PLACES = "directions_span.json", "directions_metadata.json"
"""What the folder of a combination has; a whole run has neither."""


@dataclass(frozen=True)
class TokenRecord:
    """A refusal token by id and text; where several tokens tell a refusal, all of them."""

    id: int
    text: str
    """Of all of them."""
    then: tuple[int, ...] = ()
    """Ids that follow."""

    @property
    def ids(self) -> tuple[int, ...]:
        """What the answer begins with."""
        return (self.id, *self.then)

    def describe(self) -> dict[str, Any]:
        """Id and text, and what follows where something does."""
        return {"id": self.id, "text": self.text} | ({"then": self.then} if self.then else {})


@dataclass(frozen=True)
class LabelRow:
    """A prompt of `labels.json`, with what the model did with it."""

    instruction: str
    answer: str
    token_ids: tuple[int, ...]
    is_refused: bool


@dataclass(frozen=True, eq=False, repr=False)
class LabelsRecord(Value):
    """`labels.json`: every prompt that was labelled so far, in that order."""

    key: str
    """Hash of model, template, versions and length: labels made from others are not used."""
    rows: tuple[LabelRow, ...]


@dataclass(frozen=True)
class PromptRow:
    """A prompt of `prompts.json`."""

    instruction: str
    category: str | None = None
    output: str | None = None
    refusal_score: float | None = None
    """Of the plain model, nats; None for held-out prompts."""
    kept: bool | None = None
    """Whether it passed the filter; None for held-out prompts, which are not filtered."""
    is_refused: bool | None = None
    """By the text of the model's own answer; None for held-out prompts, and where nothing was labelled."""
    answer: str | None = None
    """Its beginning."""

    def describe(self) -> dict[str, Any]:
        """All of it; a held-out prompt has no score and no filter."""
        measured: dict[str, Any] = {} if self.kept is None else {"refusal_score": self.refusal_score, "kept": self.kept}
        if self.is_refused is not None:
            measured |= {"is_refused": self.is_refused, "answer": self.answer}
        return {"instruction": self.instruction, "category": self.category, "output": self.output, **measured}


@dataclass(frozen=True, eq=False, repr=False)
class SplitRows(Value):
    """The prompts of one side."""

    train: tuple[PromptRow, ...]
    val: tuple[PromptRow, ...]
    test: tuple[PromptRow, ...]

    def kept(self, part: str) -> list[str]:
        """Instructions of "train", "val" (those that passed the filter) or "test"."""
        return self.kept_set(part).instructions

    def kept_set(self, part: str) -> PromptSet:
        """The same with their categories and reference answers."""
        rows = [row for row in getattr(self, part) if row.kept is not False]
        return PromptSet(part, tuple(Prompt(row.instruction, row.category, row.output) for row in rows))


@dataclass(frozen=True, eq=False, repr=False)
class PromptsRecord(Value):
    """`prompts.json`: refusal tokens, response prefix, every prompt with its score and whether it was kept."""

    quick: bool
    response_prefix: str
    chat: ChatRecord
    refusal_tokens: tuple[TokenRecord, ...]
    refusal_tokens_origin: str
    published_refusal_tokens: tuple[TokenRecord, ...]
    """Those of the model's family, where its tokenizer has them."""
    harmful: SplitRows
    harmless: SplitRows
    zero_point_nats: float | None = None
    """The refusal score that tells refused from answered training prompts best; None where it is the published 0."""
    refuses: bool = True
    """False where the model all but never refuses: the run ends here, and the harmless prompts were not tried."""
    judge_caution: str | None = None
    """What the phrases that labels are made with cannot read in these prompts and answers."""

    @property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the refusal tokens, each a prefix of answers."""
        return tuple(token.ids for token in self.refusal_tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """First ids of the refusal tokens: all there is of them, where none needs several."""
        return tuple(dict.fromkeys(token.id for token in self.refusal_tokens))

    def refused(self, side: str) -> Rate | None:
        """How many training and validation prompts the model refuses by the text of its answers, where labelled."""
        rows = self.side(side)
        flags = [row.is_refused for row in (*rows.train, *rows.val) if row.is_refused is not None]
        return Rate.of(flags) if flags else None

    def side(self, side: str) -> SplitRows:
        """The prompts of "harmful" or "harmless"."""
        return self.harmful if side == "harmful" else self.harmless


@dataclass(frozen=True, eq=False, repr=False)
class RunInfo(Value):
    """`run.json`: everything that identifies a run."""

    model: ModelRecord
    options: Annotated[RunOptions, with_values(RunOptions, {"calibration": "published"})]
    """Runs of before there was a calibration were published ones."""
    chat: ChatRecord
    refusal_tokens: tuple[TokenRecord, ...]
    refusal_tokens_origin: str
    published_refusal_tokens: tuple[TokenRecord, ...]
    prompt_sets_sha256: Mapping[str, Mapping[str, str]]
    """Side -> split -> hash."""
    versions: Mapping[str, str]
    quick: bool = False


def _losses(table: Any) -> dict[str, LossResult]:
    return {name: LossResult(**entry) for name, entry in table.items() if isinstance(entry, Mapping)}


def _all_losses(tables: Any) -> dict[str, dict[str, LossResult]]:
    return {label: _losses(table) for label, table in tables.items()}


def _rates(table: Any) -> dict[str, Rate]:
    return {side: Rate(rate["count"], rate["n"]) for side, rate in table.items()}


Losses = Annotated[Mapping[str, LossResult], parsed(_losses)]
"""Text set -> CE loss: `loss_evals/{label}_loss_eval.json`."""


@dataclass(frozen=True, eq=False, repr=False)
class GridRecord(Value):
    """`generate_directions/mean_diffs.json`."""

    method: str
    positions: tuple[int, ...]
    norms: tuple[tuple[float, ...], ...]
    """`[position][layer]`, raw."""
    n_harmful: int
    n_harmless: int
    is_degenerate: tuple[tuple[bool, ...], ...] = ()
    hook_names: tuple[str, ...] = ()
    axes: tuple[str, ...] = ("position", "layer", "d_model")
    quick: bool = False


@dataclass(frozen=True)
class BaselineRecord:
    """`select_direction/baseline.json`: refusal scores of the plain model, nats."""

    harmful: float | None
    harmless: float | None
    n_layers: int
    n_harmful: int = 0
    n_harmless: int = 0
    zero_point: float | None = None
    """What half of the harmless prompts must reach under addition; None where it was not calibrated."""
    unit: str = "refusal score, nats"
    axes_of_scores: tuple[str, ...] = ("candidate", "bypass, induce, KL", "prompt")
    quick: bool = False


ControlKind = Literal["chosen", "random", "within harmful", "within harmless"]
"""The direction itself; isotropic; the difference of two random halves of one class."""


@dataclass(frozen=True)
class ControlRow:
    """What a direction of the chosen one's place and norm does to the first validation prompts."""

    kind: ControlKind
    seed: int | None
    share_of_stream: float
    """Of the plain stream's squared length, that lies along it."""
    bypass: float | None
    """Scores as of candidates, nats; None where they are not finite."""
    induce: float | None
    kl_nats: float | None


@dataclass(frozen=True, eq=False, repr=False)
class ControlsRecord(Value):
    """`select_direction/controls.json`: the chosen direction first, measured on the same prompts."""

    rows: tuple[ControlRow, ...]
    quick: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class DirectionRecord(Value):
    """`direction_metadata.json`: where a direction was read, how long it is, and what it was made from."""

    pos: int | None
    layer: int
    hook_name: str
    norm: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, direction: Direction) -> "DirectionRecord":
        """What is recorded of a direction."""
        return cls(direction.position, direction.layer, direction.hook_name, direction.norm, direction.provenance)

    def describe(self) -> dict[str, Any]:
        """One flat table, as in the file."""
        place = {"pos": self.pos, "layer": self.layer, "hook_name": self.hook_name, "norm": self.norm}
        return {**place, **self.provenance}


def _direction(record: Any) -> DirectionRecord:
    place = ("pos", "layer", "hook_name", "norm")
    provenance = {key: value for key, value in record.items() if key not in place}
    return DirectionRecord(record["pos"], record["layer"], record["hook_name"], record["norm"], provenance)


AnyDirection = Annotated[DirectionRecord, parsed(_direction)]


@dataclass(frozen=True)
class Place:
    """Where a candidate was read, under the published keys."""

    pos: int | None
    layer: int


@dataclass(frozen=True)
class CombinationRecord:
    """`directions_span.json` with `directions_metadata.json`: what is ablated together."""

    label: str
    ranks: tuple[int, ...]
    multi: str
    """span, or sequential."""
    hook_names: tuple[str, ...]
    norms: tuple[float, ...]
    effective_rank: int
    relative_singular_values: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    warning: str | None = None
    directions: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Kept:
    """How many prompts passed the filter."""

    kept: int
    of: int


@dataclass(frozen=True)
class PromptCounts:
    """Prompts of one side."""

    train: Kept
    val: Kept
    test: int


@dataclass(frozen=True, eq=False, repr=False)
class SelectionRecord(Value):
    """What the thresholds left of the candidates."""

    n_candidates: int
    n_survivors: int
    explanation: str
    thresholds: Thresholds
    best: Annotated[CandidateScore | None, parsed(lambda row: None if row is None else CandidateScore.read(row))]

    @classmethod
    def of(cls, chosen: Selection) -> "SelectionRecord":
        """What is recorded of a selection."""
        n, best = len(chosen.survivors), chosen.survivors[0] if chosen.survivors else None
        return cls(n + len(chosen.rejected), n, chosen.explain(), chosen.thresholds, best)


@dataclass(frozen=True, eq=False, repr=False)
class RunSummary(Value):
    """`summary.json`: the results of a run, or of a combination of directions; what was not reached is empty."""

    model: ModelRecord
    quick: bool
    status: str
    """done, no candidate survives, does not refuse, directions only, unfinished."""
    refusal_tokens: tuple[TokenRecord, ...]
    n_prompts: Mapping[str, PromptCounts]
    """By side."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of every finished stage."""
    refused_by_text: Annotated[Mapping[str, Rate], parsed(_rates)] = field(default_factory=dict)
    """Side -> rate of refusals among the plain model's short answers to training and validation prompts."""
    zero_point_nats: float | None = None
    """The refusal score above which a prompt counts as refused, where it was calibrated."""
    judge_caution: str | None = None
    """What the phrases that labels are made with cannot read in the prompts and answers."""
    examples: tuple[Completion, ...] = ()
    """Two answers of a model that does not refuse."""
    baseline_scores_nats: Mapping[str, float | None] | None = None
    """Side -> mean refusal score of the plain model on validation prompts."""
    selection: SelectionRecord | None = None
    direction: Annotated[DirectionRecord | None, parsed(lambda x: None if x is None else _direction(x))] = None
    controls: tuple[ControlRow, ...] = ()
    """The chosen direction and those beside it."""
    completions: Annotated[Mapping[Side, SideEffects], parsed(read_sides)] = field(default_factory=dict)
    ce_loss: Annotated[Mapping[str, Mapping[str, LossResult]], parsed(_all_losses)] = field(default_factory=dict)
    """Label -> text set -> CE loss."""
    combination: CombinationRecord | None = None
    peak_mib: float | None = None
    """The most memory that the process of a stage held, on the CPU's side."""

    def describe(self) -> dict[str, Any]:
        """What was reached."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        always = ("n_prompts", "refusal_tokens")
        return {name: value for name, value in values.items() if name in always or value not in (None, {}, ())}
