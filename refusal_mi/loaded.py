"""A run folder as one object: `load_run("runs/x")`, whose parts are read when they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from .directions import Direction, DirectionGrid
from .errors import UserError
from .figures.effects import plot_losses, plot_rates
from .figures.scores import plot_score_panels, plot_scores
from .files import read_record
from .measures import LossResult
from .model.points import HookedModel
from .run.answers import SIDES, Evaluation, SideEffects
from .run.combos import CombosResult
from .run.folder import RunInputs, RunRecord, load_grid, load_ranked
from .run.record import DIRECTION, MEAN_DIFFS, MEAN_DIFFS_RECORD, SPAN
from .search.grid import ScoreGrid, Selection
from .text.prompts import Prompt, PromptSet
from .values import Value, check_named, frame, html_table

COMBOS = "combos.json"
FIGURES = ("scores", "bypass", "induce", "kl", "rates", "loss")
"""Of a run: the three scores by layer and position together and each alone, rates of refusal, CE losses."""


@dataclass(frozen=True, eq=False, repr=False)
class Rates(Value, Mapping[str, SideEffects]):
    """Refusal and degenerate rates of every intervention, by side.

    Examples:
        >>> list(run.rates), len(run.rates.to_frame())
        (['harmful', 'harmless'], 16)
    """

    by_side: Mapping[str, SideEffects]

    def __getitem__(self, side: str) -> SideEffects:
        check_named("side", side, self.by_side)
        return self.by_side[side]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_side)

    def __len__(self) -> int:
        return len(self.by_side)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.by_side.values())) or "no rates"

    def _repr_html_(self) -> str:
        return "".join(each._repr_html_() for each in self.by_side.values())

    def to_frame(self) -> Any:
        """A pandas table with a row for each side, intervention and rate.

        Raises:
            UserError: pandas is not installed.
        """
        tables = [each.to_frame().to_dict("records") for each in self.by_side.values()]
        return frame([row for rows in tables for row in rows])


@dataclass(frozen=True, eq=False, repr=False)
class LossTable(Value, Mapping[str, Mapping[str, LossResult]]):
    """CE loss (nats per token) by intervention and text set; the plain model is "baseline".

    Examples:
        >>> run.losses["ablation"]["plain_text"].ce_loss > run.losses["baseline"]["plain_text"].ce_loss
        True
    """

    by_label: Mapping[str, Mapping[str, LossResult]]

    def __getitem__(self, label: str) -> Mapping[str, LossResult]:
        check_named("intervention", label, self.by_label)
        return self.by_label[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_label)

    def __len__(self) -> int:
        return len(self.by_label)

    def _repr_html_(self) -> str:
        rows = [
            (label, name, f"{loss.ce_loss:.4f}", f"{loss.n_tokens}")
            for label, table in self.by_label.items()
            for name, loss in table.items()
        ]
        return html_table("CE loss", ("", "texts", "nats per token", "tokens"), rows)

    def to_frame(self) -> Any:
        """A pandas table with a row for each intervention and text set: label, texts, ce_loss, perplexity, n_tokens.

        Raises:
            UserError: pandas is not installed.
        """
        return frame(
            [
                {"label": label, "texts": name, **loss.describe()}
                for label, table in self.by_label.items()
                for name, loss in table.items()
            ]
        )


@dataclass(frozen=True)
class Figures(Mapping[str, go.Figure]):
    """The figures of a run by name, drawn when they are asked for: those whose numbers it has.

    Examples:
        >>> run.figures["rates"].layout.title.text
        'Refusals and degenerate text'
    """

    record: RunRecord

    def __getitem__(self, name: str) -> go.Figure:
        check_named("figure", name, FIGURES)
        record, model = self.record, self.record.model_name
        if name == "rates":
            if not record.sides:
                raise UserError(f"{record.path} has no judged completions: run its step completions first")
            return plot_rates(record.sides, model=model)
        if name == "loss":
            if not record.losses:
                raise UserError(f"{record.path} has no CE losses: run its step loss first")
            return plot_losses(record.losses, model=model)
        if record.scores is None or record.selection is None:
            raise UserError(f"{record.path} has no scores: run its step selection first")
        chosen = record.selection.survivors[0] if record.selection.survivors else None
        rule, tokens = record.thresholds, record.tokens
        if name == "scores":
            return plot_score_panels(record.scores, chosen=chosen, thresholds=rule, tokens=tokens, model=model)
        measure: Any = name
        return plot_scores(record.scores, measure=measure, chosen=chosen, thresholds=rule, tokens=tokens, model=model)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        has = {"rates": bool(self.record.sides), "loss": bool(self.record.losses)}
        return (name for name in FIGURES if has.get(name, self.record.selection is not None))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"Figures({', '.join(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run folder; what the run did not reach is an error in one line, or empty where it is a table.

    Examples:
        >>> run.direction.layer == run.selection.best.layer
        True
        >>> list(run.figures)
        ['scores', 'bypass', 'induce', 'kl', 'rates', 'loss']
    """

    record: RunRecord

    @property
    def path(self) -> Path:
        """Its folder, or that of the combination."""
        return self.record.folder

    @property
    def status(self) -> str:
        """How far it came: done, no candidate survives, does not refuse, directions only, unfinished."""
        return self.record.status

    @property
    def model(self) -> str:
        """What `load_model` takes: hub id, folder or file; "embedded" is the embedded model's."""
        return self.record.run.model.source

    @cached_property
    def direction(self) -> Direction:
        """The chosen direction.

        Raises:
            UserError: the run chose none.
        """
        if self.record.label:
            raise UserError(f"{self.path} ablates several directions together: load_run(...).directions has them")
        return Direction.load(self._file(DIRECTION, "direction"))

    @cached_property
    def directions(self) -> tuple[Direction, ...]:
        """Those of a combination; of a run the chosen one alone.

        Raises:
            UserError: there are none.
        """
        if self.record.combination is None:
            return (self.direction,)
        return tuple(load_ranked(self.record.path, self.record.combination.ranks))

    def ranked(self, *ranks: int) -> list[Direction]:
        """The survivors of these ranks, the best is 0.

        Raises:
            UserError: there is no such rank.
        """
        return load_ranked(self.record.path, ranks)

    @cached_property
    def grid(self) -> DirectionGrid:
        """Every candidate direction.

        Raises:
            UserError: the run has none yet.
        """
        self._file(MEAN_DIFFS, "candidates")
        self._file(MEAN_DIFFS_RECORD, "candidates")
        return load_grid(self.record.path)

    @property
    def scores(self) -> ScoreGrid:
        """The scores of every candidate.

        Raises:
            UserError: the run has none yet.
        """
        return self._there(self.record.scores, "scores")

    @property
    def selection(self) -> Selection:
        """The survivors, best first, by the thresholds of the run.

        Raises:
            UserError: the run has no scores yet.
        """
        return self._there(self.record.selection, "scores")

    @cached_property
    def rates(self) -> Rates:
        """Refusal and degenerate rates by side and intervention; empty where nothing was answered."""
        return Rates({each.side: each for each in self.record.sides})

    @cached_property
    def losses(self) -> LossTable:
        """CE loss by intervention and text set; empty where none was measured."""
        return LossTable(self.record.losses)

    @property
    def figures(self) -> Figures:
        """Its figures by name, such as "scores", "rates", "loss": plotly figures, which show and save themselves."""
        return Figures(self.record)

    def completions(self, side: str = "harmful", label: str = "baseline") -> Evaluation:
        """The judged answers to the held-out prompts of a side under an intervention.

        Args:
            side: "harmful" or "harmless".
            label: "baseline" (the plain model), "ablation", "actadd", "random_ablation_0", ...

        Raises:
            UserError: there are no such answers; the message says which there are.
        """
        check_named("side", side, SIDES)
        if side not in self.rates:
            steps = ", ".join(self.record.run.options.steps)
            raise UserError(f"{self.path} has no completions of {side} prompts ({self.status}; its steps: {steps})")
        effects = self.rates[side]
        check_named("intervention", label, [effect.label for effect in effects.effects])
        return Evaluation(self.record.answers(effects, label))

    def prompts(self, side: str = "harmful", part: str = "test") -> PromptSet:
        """The prompts of a side in "train", "val" (those that passed the filter) or "test".

        Raises:
            UserError: there are none.
        """
        check_named("side", side, SIDES)
        check_named("part", part, ("train", "val", "test"))
        rows = getattr(self._there(self.record.prompts, "prompts").side(side), part)
        kept = tuple(Prompt(row.instruction, row.category, row.output) for row in rows if row.kept is not False)
        return PromptSet(f"{side} {part}", kept)

    @cached_property
    def combinations(self) -> dict[str, "Run"]:
        """The folders of directions ablated together, by label, such as "0-2"; empty where there are none."""
        root = self.record.path
        folders = sorted(path.parent for path in root.glob(f"*/{SPAN}")) if not self.record.label else []
        return {folder.name: load_run(folder) for folder in folders}

    @cached_property
    def combos(self) -> CombosResult | None:
        """What `refusal-mi combos` found; None where it was not run."""
        path = self.record.path / COMBOS
        return read_record(path, CombosResult) if path.is_file() else None

    def inputs(self, model: HookedModel, *, max_prompts: int = 128, batch_size: int = 32, seed: int = 0) -> RunInputs:
        """What every analysis' `from_run` takes: this run, with its model loaded."""
        return RunInputs(model, self.record.path, max_prompts, batch_size, seed)

    def _there(self, value: Any, what: str) -> Any:
        if value is None:
            raise UserError(f"{self.path} has no {what}: its run is {self.status}")
        return value

    def _file(self, name: str, what: str) -> Path:
        path = self.record.path / name
        return path if path.is_file() else self._there(None, what)

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("model", self.record.model_name), ("status", self.status)]
        if self.record.direction is not None:
            facts.append(("direction", repr(self.direction)))
        if self.record.selection is not None:
            facts.append(("selection", self.record.selection.explain()))
        for side in self.rates.values():
            shown = ", ".join(f"{each.label} {each.refusal}" for each in side.effects if "random" not in each.label)
            facts.append((f"refused, {side.side}", shown))
        return facts

    def __repr__(self) -> str:
        return "\n".join([f"Run {self.path}", *(f"  {name}: {value}" for name, value in self._facts())])

    def _repr_html_(self) -> str:
        return html_table(f"Run {self.path}", ("", ""), self._facts())


def load_run(path: str | Path) -> Run:
    """A run folder, finished or not, or that of a combination inside one; its files are read when they are asked for.

    Examples:
        >>> again = load_run(run.path)
        >>> again.status, again.direction == run.direction
        ('done', True)

    Raises:
        UserError: it is no run folder.
    """
    return Run(RunRecord.load(path))
