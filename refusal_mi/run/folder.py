"""Run folders read back: grids, scores, directions by rank, everything that a report or an analysis asks for."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..directions import Direction, DirectionGrid
from ..errors import UserError
from ..files import as_json, at_home, read_floats, read_json, read_record
from ..measures import LossResult
from ..model.points import HookedModel, model_source
from ..model.provenance import display_name, is_embedded
from ..search.grid import ScoreGrid, Selection, select
from ..search.thresholds import Thresholds
from ..text.chat import ChatFormat
from .answers import SIDES, Evaluation, JudgedAnswer, Side, SideEffects
from .options import RunOptions
from .record import (
    BASELINE,
    DIRECTION,
    DIRECTION_RECORD,
    EVALUATIONS,
    MEAN_DIFFS,
    MEAN_DIFFS_RECORD,
    PLACES,
    PROMPTS,
    RUN,
    SCORES,
    SPAN,
    SUMMARY,
    SURVIVORS,
    AnyDirection,
    BaselineRecord,
    CombinationRecord,
    DirectionRecord,
    GridRecord,
    Losses,
    Place,
    PromptsRecord,
    RunInfo,
    RunSummary,
)
from .served import has_record, is_served
from .stages import SIGNED, Origin


def load_grid(folder: Path) -> DirectionGrid:
    """The candidates of a run folder.

    Examples:
        >>> load_grid(run.path) == run.grid
        True
    """
    record = read_record(folder / MEAN_DIFFS_RECORD, GridRecord)
    vectors = read_floats(folder / MEAN_DIFFS, len(record.positions), None, None)
    degenerate = record.is_degenerate or tuple(tuple(norm == 0 for norm in row) for row in record.norms)
    if [len(row) for row in degenerate] != [vectors.shape[1]] * len(record.positions):
        raise UserError(
            f"{folder / MEAN_DIFFS_RECORD} does not fit {MEAN_DIFFS}: it tells of other layers or positions"
        )
    return DirectionGrid(vectors, record.positions, degenerate, {"method": record.method})


def load_scores(folder: Path) -> ScoreGrid:
    """The scores of a run folder, with its baselines and per-prompt values.

    Examples:
        >>> load_scores(run.path) == run.scores
        True
    """
    baseline = read_record(folder / BASELINE, BaselineRecord)
    rows = ScoreGrid.load(folder / EVALUATIONS, baseline.n_layers).rows
    per_prompt = read_floats(folder / SCORES, len(rows), 3, None)
    return ScoreGrid(rows, baseline.n_layers, baseline.harmful, baseline.harmless, per_prompt, baseline.zero_point)


def scored_layers(path: Path) -> int | None:
    """How many blocks the model has that a score file of a run folder is about; None where the folder does not say."""
    baseline = path.with_name(Path(BASELINE).name)
    return read_record(baseline, BaselineRecord).n_layers if baseline.is_file() else None


def load_evaluations(path: Path, n_layers: int) -> ScoreGrid:
    """A saved score file, ours or a published one; with the zero point of the run whose folder it lies in."""
    grid, baseline = ScoreGrid.load(path, n_layers), Path(path).with_name(Path(BASELINE).name)
    own = Path(path).name in (Path(EVALUATIONS).name, Path(SURVIVORS).name) and baseline.is_file()
    return replace(grid, zero_point=read_record(baseline, BaselineRecord).zero_point) if own else grid


def ranked(grid: DirectionGrid, chosen: Selection, ranks: Sequence[int]) -> list[Direction]:
    """The surviving candidates of these ranks.

    Raises:
        UserError: a rank does not exist; the message says how many survive and which threshold binds.
    """
    n = len(chosen.survivors)
    missing = [rank for rank in ranks if not 0 <= rank < n]
    if missing:
        there = f"the ranks are 0..{n - 1}" if n else "there are none"
        raise UserError(f"no direction of rank {missing[0]}: {there}; {chosen.explain()}")
    rows = [chosen.survivors[rank] for rank in ranks]
    return [grid.direction(row.position, row.layer) for row in rows]


def load_ranked(folder: Path, ranks: Sequence[int]) -> list[Direction]:
    """Directions by rank from a finished run folder.

    Examples:
        >>> load_ranked(run.path, [0])[0].layer == run.selection.best.layer
        True

    Raises:
        UserError: there is no run in this folder, or it has no such rank.
    """
    if not (folder / SURVIVORS).exists() or not (folder / RUN).exists():
        raise UserError(f"{folder} holds no run with a selection")
    run = read_record(folder / RUN, RunInfo)
    grid = load_grid(folder)
    grid = replace(grid, provenance={**grid.provenance, "model": as_json(run.model)})
    return ranked(grid, select(load_scores(folder), run.options.thresholds), ranks)


@dataclass(frozen=True)
class RunRecord:
    """A run folder, or that of a combination of directions inside one; what was not reached is None or empty.

    `summary.json` says what belongs to the run so far; without it every file that is there counts. A combination has
    answers and losses of its own; its search, prompts and baselines are the run's.

    Examples:
        >>> record = RunRecord.load(run.path)
        >>> record.status, record.side("harmful").n, record.direction.layer == run.direction.layer
        ('done', 40, True)
    """

    path: Path
    """The run folder."""
    run: RunInfo
    summary: RunSummary | None
    label: str = ""
    """Of a combination: the name of its folder."""

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read a run folder.

        Raises:
            UserError: there is no `run.json`, so it is not one.
        """
        path = at_home(path)
        is_combination = (path / SPAN).is_file() and (path.parent / RUN).is_file()
        root = path.parent if is_combination else path
        if not (root / RUN).is_file():
            raise UserError(f"{path} is not a run folder: it has no run.json; give the --output-dir of refusal-mi run")
        summary = read_record(path / SUMMARY, RunSummary) if (path / SUMMARY).is_file() else None
        return cls(root, read_record(root / RUN, RunInfo), summary, path.name if is_combination else "")

    @property
    def folder(self) -> Path:
        """Where the answers and losses of this record lie."""
        return self.path / self.label

    @cached_property
    def combination(self) -> CombinationRecord | None:
        """What is ablated together; None for a whole run."""
        if not self.label:
            return None
        places = tuple(read_record(self.folder / PLACES, list[Place]))
        return replace(read_record(self.folder / SPAN, CombinationRecord), directions=places)

    @property
    def status(self) -> str:
        """How far the run came: done, no candidate survives, directions only, unfinished."""
        return "unfinished" if self.summary is None else self.summary.status

    @property
    def is_embedded(self) -> bool:
        """Whether this is a run of the embedded demonstration model."""
        return is_embedded(self.run.model.source)

    @property
    def model_name(self) -> str:
        """The model as people call it."""
        return self.run.model.name

    @property
    def thresholds(self) -> Thresholds:
        """What the run asked of a candidate."""
        return self.run.options.thresholds

    @property
    def tokens(self) -> tuple[str, ...]:
        """The post-instruction tokens; the last is position −1."""
        return self.run.chat.post_instruction_tokens

    @cached_property
    def prompts(self) -> PromptsRecord | None:
        """`prompts.json`."""
        return self._read(PROMPTS, PromptsRecord)

    @cached_property
    def scores(self) -> ScoreGrid | None:
        """The scores of every candidate."""
        is_done = self.summary is None or self.summary.selection is not None
        files = (EVALUATIONS, BASELINE, SCORES)
        return load_scores(self.path) if is_done and all((self.path / name).is_file() for name in files) else None

    @cached_property
    def selection(self) -> Selection | None:
        """The survivors, chosen again from the scores by the run's own thresholds."""
        return None if self.scores is None else select(self.scores, self.thresholds)

    @cached_property
    def direction(self) -> DirectionRecord | None:
        """The chosen direction."""
        if self.label or self.selection is None or not self.selection.survivors:
            return None
        return self._read(DIRECTION_RECORD, AnyDirection)

    @cached_property
    def norms(self) -> GridRecord | None:
        """Positions and norms of the candidates."""
        return self._read(MEAN_DIFFS_RECORD, GridRecord)

    @cached_property
    def sides(self) -> tuple[SideEffects, ...]:
        """Refusal and degenerate rates of every intervention, harmful prompts first."""
        sides = (self._side(side) for side in SIDES)
        return tuple(side for side in sides if side is not None)

    def side(self, side: Side) -> SideEffects | None:
        """The rates of one side."""
        return next((each for each in self.sides if each.side == side), None)

    def answers(self, side: SideEffects, label: str) -> tuple[JudgedAnswer, ...]:
        """The judged completions of one set under one intervention."""
        path = self._evaluations(side.set_name, label)
        return Evaluation.load(path).answers if path.is_file() else ()

    def is_served(self, label: str) -> bool:
        """Whether a server gave the answers of this label, asked as this run asked: `refusal-mi complete`."""
        options, chat = self.run.options, self.run.chat
        return not self.label and is_served(self.path, label, options.system, chat, options.max_new_tokens)

    @cached_property
    def losses(self) -> Mapping[str, Mapping[str, LossResult]]:
        """CE loss by label and text set, baseline first; empty until the baseline is there."""
        if self.summary is not None and not self.summary.ce_loss:
            return {}
        paths = [*self.path.glob("loss_evals/baseline_*.json"), *self.folder.glob("loss_evals/*.json")]
        there = {path.name.removesuffix("_loss_eval.json"): path for path in paths}
        labels = sorted(there, key=_label_order) if self.summary is None else list(self.summary.ce_loss)
        tables = {label: read_record(there[label], Losses) for label in labels if label in there}
        return tables if "baseline" in tables else {}

    def _read(self, name: str, kind: Any) -> Any:
        path = self.path / name
        return read_record(path, kind) if path.is_file() else None

    def _side(self, side: Side) -> SideEffects | None:
        measured = None if self.summary is None else self.summary.completions.get(side)
        if self.summary is not None and measured is None:
            return None
        name = self._set_name(side) if measured is None else measured.set_name
        paths = self.folder.glob(f"completions/{_glob_literal(name)}_*_evaluations.json") if name else []
        labels = {path.name.removeprefix(f"{name}_").removesuffix("_evaluations.json") for path in paths}
        if self.label and labels and self._evaluations(name, "baseline").is_file():
            labels.add("baseline")
        served = {label for label in labels if self.is_served(label)}
        if measured is not None:
            labels &= {effect.label for effect in measured.effects} | served
        elif not self.label:
            labels -= {label for label in labels - served if has_record(self.path, label)}
        labels -= {label for label in served if not self._answers_the_same(name, label)}
        effects = [
            Evaluation.load(self._evaluations(name, label)).effect(label) for label in sorted(labels, key=_label_order)
        ]
        return SideEffects(side, name, tuple(effects)) if effects else None

    def _answers_the_same(self, name: str, label: str) -> bool:
        """Whether a set's answers under a label are to the prompts of the plain model's."""
        plain, others = (self._evaluations(name, each) for each in ("baseline", label))
        if not plain.is_file():
            return False
        asked = [[answer.prompt for answer in Evaluation.load(path).answers] for path in (plain, others)]
        return asked[0] == asked[1]

    def _set_name(self, side: Side) -> str:
        """The set whose baseline answers are there; the harmless set is always called harmless."""
        if side == "harmless":
            return side
        suffix = "_baseline_evaluations.json"
        names = sorted(path.name.removesuffix(suffix) for path in self.path.glob(f"completions/*{suffix}"))
        return next((name for name in names if name != "harmless"), "")

    def _evaluations(self, name: str, label: str) -> Path:
        folder = self.path if label == "baseline" else self.folder
        return folder / f"completions/{name}_{label}_evaluations.json"


def _label_order(label: str) -> tuple[int, str]:
    known = ("baseline", "ablation", "actadd")
    return (known.index(label) if label in known else len(known), label)


def _glob_literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@dataclass(frozen=True, init=False)
class RunInputs:
    """A finished run, with its model loaded; every analysis has a `from_run` that takes one.

    Made of a path or its text.

    Examples:
        >>> inputs = RunInputs(model, run.path)
        >>> inputs.direction == run.direction, inputs.scores == run.scores
        (True, True)
    """

    model: HookedModel
    path: Path
    """The run folder."""
    max_prompts: int = 128
    """A side, at most."""
    batch_size: int = 32
    seed: int = 0

    def __init__(
        self, model: HookedModel, path: str | Path, max_prompts: int = 128, batch_size: int = 32, seed: int = 0
    ) -> None:
        given = {"model": model, "path": at_home(path), "max_prompts": max_prompts}
        for name, value in (given | {"batch_size": batch_size, "seed": seed}).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        of = display_name(model_source(self.model))
        return f"RunInputs({of}, {str(self.path)!r}, up to {self.max_prompts} prompts a side, seed {self.seed})"

    @cached_property
    def record(self) -> PromptsRecord:
        """`prompts.json`."""
        return read_record(self.path / PROMPTS, PromptsRecord)

    @cached_property
    def options(self) -> RunOptions:
        """The options of the run."""
        return read_record(self.path / RUN, RunInfo).options

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format of the run, with its response prefix."""
        prefix = self.record.response_prefix
        return ChatFormat(
            self.model.tokenizer,
            self.options.system,
            self.options.template_kwargs,
            prefix,
            self.options.allow_special_tokens,
        )

    @cached_property
    def direction(self) -> Direction:
        """The chosen direction.

        Raises:
            UserError: the run chose none.
        """
        if not (self.path / DIRECTION).exists():
            raise UserError(f"{self.path} has no direction.pt: its run is not finished, or no candidate survived")
        return Direction.load(self.path / DIRECTION)

    @cached_property
    def grid(self) -> DirectionGrid:
        """Every candidate direction."""
        return load_grid(self.path)

    @cached_property
    def scores(self) -> ScoreGrid:
        """The candidates' scores."""
        return load_scores(self.path)

    @property
    def refusal_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that refusals begin with, for what reads one token; of a prefix of several the first."""
        return self.record.token_ids

    @property
    def refusal_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """What the run's refusal score is read from."""
        return self.record.prefixes

    def prompts(self, side: str, part: str = "test") -> list[str]:
        """Instructions of "harmful" or "harmless" in "train", "val" (those that passed the filter) or "test"."""
        return self.record.side(side).kept(part)[: self.max_prompts]

    def labelled(self, side: str, part: str) -> dict[str, bool]:
        """Training or validation instructions, kept or not, and whether the model refuses them by text.

        Empty where nothing was labelled.
        """
        rows = getattr(self.record.side(side), part)
        flags = {row.instruction: row.is_refused for row in rows if row.is_refused is not None}
        return dict(list(flags.items())[: self.max_prompts])


def models_of(path: Path) -> set[Origin]:
    """The models that the files of a folder name: of its runs, and of what CAA made; a damaged file names none."""
    found: set[Origin] = set()
    records = [place for name in (RUN, SIGNED) for place in (path / name, *sorted(path.glob(f"*/{name}")))]
    for file in [*records, *sorted(path.glob("caa/vec_layer_*_metadata.json"))[:1]]:
        with suppress(UserError):
            held = read_json(file)
            named = held.get("model") if isinstance(held, dict) else None
            named = {"source": named} if isinstance(named, str) else named
            if isinstance(named, dict) and isinstance(named.get("source"), str):
                found.add(Origin(named["source"], fingerprint=named.get("fingerprint")))
    return found


def check_model_of_run(path: Path, source: str) -> None:
    """Make sure that a run folder is about this model.

    Raises:
        UserError: there is no run, or it is about another model.
    """
    if not (path / RUN).exists():
        raise UserError(f"{path} is not a run folder: it has no run.json; make one with refusal-mi run")
    before = read_record(path / RUN, RunInfo).model
    if not Origin(before.source, before.revision, before.fingerprint).is_at(source):
        raise UserError(f"{path} holds a run of {before.source}, not of {source}: name that MODEL")
