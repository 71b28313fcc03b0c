"""What a run folder holds, finished or not, read from its files alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..candidates import ScoreGrid
from ..errors import UserError
from ..files import read_json
from ..loss import LossResult
from ..pipelines.search import EVALUATIONS, load_scores
from ..plots import Effect, SideEffects
from ..plots.effects import Side
from ..provenance import display_name, is_embedded
from ..selection import Selection, Thresholds, select
from ..stats import Rate

SPAN = "directions_span.json"
"""What only the folder of a combination has."""
SIDES: tuple[Side, Side] = ("harmful", "harmless")
_SCORE_FILES = (EVALUATIONS, "select_direction/baseline.json", "select_direction/scores.pt")


@dataclass(frozen=True)
class RunRecord:
    """A run folder, or that of a combination of directions inside one; what was not reached is None or empty.

    `summary.json` says what belongs to the run so far; without it every file that is there counts. A combination has
    answers and losses of its own; its search, prompts and baselines are the run's.
    """

    path: Path
    """The run folder."""
    run: Mapping[str, Any]
    """`run.json`"""
    summary: Mapping[str, Any]
    """`summary.json`, or empty."""
    label: str = ""
    """Of a combination: the name of its folder."""

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a run folder.

        Raises:
            UserError: there is no `run.json`, so it is not one.
        """
        path = Path(path)
        is_combination = (path / SPAN).is_file() and (path.parent / "run.json").is_file()
        root = path.parent if is_combination else path
        if not (root / "run.json").is_file():
            raise UserError(f"{path} is not a run folder: it has no run.json; give the --output-dir of refusal-mi run")
        summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
        return cls(root, read_json(root / "run.json"), summary, path.name if is_combination else "")

    @property
    def folder(self) -> Path:
        """Where the answers and losses of this record lie."""
        return self.path / self.label

    @cached_property
    def combination(self) -> Mapping[str, Any] | None:
        """Ranks, hook points, norms and rank of the directions that are ablated together; None for a whole run."""
        if not self.label:
            return None
        return {**read_json(self.folder / SPAN), "places": read_json(self.folder / "directions_metadata.json")}

    @property
    def status(self) -> str:
        """How far the run came: done, no candidate survives, directions only, unfinished."""
        return self.summary.get("status", "unfinished")

    @property
    def is_quick(self) -> bool:
        return bool(self.run.get("quick", False))

    @property
    def is_embedded(self) -> bool:
        """Whether this is a run of the embedded demonstration model."""
        return is_embedded(self.run["model"]["source"])

    @property
    def model_name(self) -> str:
        """The model as people call it."""
        return display_name(self.run["model"]["source"])

    @property
    def tokens(self) -> list[str]:
        """The post-instruction tokens; the last is position −1."""
        return self.run["chat"]["post_instruction_tokens"]

    @cached_property
    def prompts(self) -> Mapping[str, Any]:
        """`prompts.json`, or empty."""
        path = self.path / "prompts.json"
        return read_json(path) if path.is_file() else {}

    @property
    def thresholds(self) -> Thresholds:
        """What the run asked of a candidate."""
        return Thresholds(**self.run["options"]["thresholds"])

    @cached_property
    def scores(self) -> ScoreGrid | None:
        """The scores of every candidate."""
        if self.summary and "selection" not in self.summary:
            return None
        return load_scores(self.path) if all((self.path / name).is_file() for name in _SCORE_FILES) else None

    @cached_property
    def selection(self) -> Selection | None:
        """The survivors, chosen again from the scores by the run's own thresholds."""
        return None if self.scores is None else select(self.scores, self.thresholds)

    @cached_property
    def direction(self) -> Mapping[str, Any] | None:
        """Position, layer, hook point and norm of the chosen direction."""
        path = self.path / "direction_metadata.json"
        if self.label or self.selection is None or not self.selection.survivors or not path.is_file():
            return None
        return read_json(path)

    @cached_property
    def norms(self) -> Mapping[str, Any] | None:
        """`mean_diffs.json`: positions and norms of the candidates."""
        path = self.path / "generate_directions/mean_diffs.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def sides(self) -> tuple[SideEffects, ...]:
        """Refusal and degenerate rates of every intervention, harmful prompts first."""
        found = (self._side(side) for side in SIDES)
        return tuple(side for side in found if side is not None)

    def side(self, side: Side) -> SideEffects | None:
        """The rates of one side."""
        return next((found for found in self.sides if found.side == side), None)

    def answers(self, side: SideEffects, label: str) -> list[Mapping[str, Any]]:
        """The judged completions of one set under one intervention."""
        path = self._evaluations(side.set_name, label)
        return read_json(path)["completions"] if path.is_file() else []

    @cached_property
    def losses(self) -> Mapping[str, Mapping[str, LossResult]]:
        """CE loss by label and text set, baseline first; empty until the baseline is there."""
        if self.summary and "ce_loss" not in self.summary:
            return {}
        paths = [*self.path.glob("loss_evals/baseline_*.json"), *self.folder.glob("loss_evals/*.json")]
        found = {path.name.removesuffix("_loss_eval.json"): path for path in paths}
        labels = list(self.summary.get("ce_loss", sorted(found, key=_label_order)))
        tables = {label: _losses(read_json(found[label])) for label in labels if label in found}
        return tables if "baseline" in tables else {}

    def _side(self, side: Side) -> SideEffects | None:
        if self.summary and side not in self.summary.get("completions", {}):
            return None
        name = self.summary["completions"][side]["set"] if self.summary else self._set_name(side)
        paths = self.folder.glob(f"completions/{_glob_literal(name)}_*_evaluations.json") if name else []
        labels = {path.name.removeprefix(f"{name}_").removesuffix("_evaluations.json") for path in paths}
        if self.label and labels and self._evaluations(name, "baseline").is_file():
            labels.add("baseline")
        if self.summary:
            labels = {label for label in labels if label in self.summary["completions"][side]}
        effects = tuple(_effect(label, self._evaluations(name, label)) for label in sorted(labels, key=_label_order))
        return SideEffects(side, name, effects) if effects else None

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


def _effect(label: str, path: Path) -> Effect:
    record = read_json(path)
    rates = [Rate(record[key]["count"], record[key]["n"]) for key in ("refusal_rate", "degenerate_rate")]
    return Effect(label, *rates)


def _losses(record: Mapping[str, Any]) -> dict[str, LossResult]:
    return {name: LossResult(**found) for name, found in record.items() if isinstance(found, Mapping)}


def _label_order(label: str) -> tuple[int, str]:
    known = ("baseline", "ablation", "actadd")
    return (known.index(label) if label in known else len(known), label)


def _glob_literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
