"""What a run folder holds, finished or not: the names of its files, and what is read back from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..directions import Direction, DirectionGrid
from ..errors import UserError
from ..files import read_json, read_tensors
from ..measures import LossResult
from ..model.loading import model_alias
from ..model.points import HookedModel
from ..model.provenance import display_name, is_embedded
from ..search.grid import ScoreGrid, Selection, Thresholds, select
from ..stats import Rate
from ..text.chat import ChatFormat

Side = Literal["harmful", "harmless"]


@dataclass(frozen=True)
class Effect:
    """What one intervention did to the answers to one set of prompts."""

    label: str
    """As in the names of the files: baseline, ablation, actadd, random_ablation_0, ..."""
    refusal: Rate
    degenerate: Rate


@dataclass(frozen=True)
class SideEffects:
    """The answers to one set of held-out prompts under every intervention."""

    side: Side
    set_name: str
    effects: tuple[Effect, ...]

    @property
    def title(self) -> str:
        """harmful prompts (advbench); the set is left out where it is called like its side."""
        return f"{self.side} prompts" + ("" if self.set_name == self.side else f" ({self.set_name})")

    def find(self, label: str) -> Effect | None:
        """The effect of this label, if it was measured."""
        return next((effect for effect in self.effects if effect.label == label), None)

    @property
    def controls(self) -> tuple[Effect, ...]:
        """The effects of random directions of equal norm."""
        return tuple(effect for effect in self.effects if effect.label.startswith("random"))


MEAN_DIFFS = "generate_directions/mean_diffs.pt"
EVALUATIONS = "select_direction/direction_evaluations.json"
SURVIVORS = "select_direction/direction_evaluations_filtered.json"
PUBLISHED_TOKENS = "select_direction/direction_evaluations_published_tokens.json"
DIRECTION = "direction.pt"
MEANS = "generate_directions/means.pt"


def load_grid(folder: Path) -> DirectionGrid:
    """The candidates of a run folder."""
    record = read_json(folder / "generate_directions/mean_diffs.json")
    degenerate = tuple(map(tuple, record["is_degenerate"]))
    vectors = read_tensors(folder / MEAN_DIFFS)
    return DirectionGrid(vectors, tuple(record["positions"]), degenerate, {"method": record["method"]})


def load_scores(folder: Path) -> ScoreGrid:
    """The scores of a run folder, with its baselines and per-prompt values."""
    baseline = read_json(folder / "select_direction/baseline.json")
    rows = ScoreGrid.load(folder / EVALUATIONS, baseline["n_layers"]).rows
    per_prompt = read_tensors(folder / "select_direction/scores.pt")
    return ScoreGrid(rows, baseline["n_layers"], baseline["harmful"], baseline["harmless"], per_prompt)


def parse_directions(text: str) -> tuple[int, ...]:
    """Ranks written as "0-2" (the published form: ranks 0 and 2), in the order in which they are ablated.

    Raises:
        UserError: this is not a list of different ranks.
    """
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise UserError(f"--directions takes ranks joined by hyphens, such as 0-2 for ranks 0 and 2, not {text!r}")
    ranks = tuple(map(int, text.split("-")))
    if len(set(ranks)) < len(ranks):
        raise UserError(f"--directions {text} names a rank twice")
    return ranks


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

    Raises:
        UserError: there is no run in this folder, or it has no such rank.
    """
    if not (folder / SURVIVORS).exists() or not (folder / "run.json").exists():
        raise UserError(f"{folder} holds no run with a selection")
    thresholds = Thresholds(**read_json(folder / "run.json")["options"]["thresholds"])
    return ranked(load_grid(folder), select(load_scores(folder), thresholds), ranks)


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


@dataclass(frozen=True)
class RunInputs:
    """A finished run, with its model loaded; every analysis has a `from_run` that takes one."""

    model: HookedModel
    path: Path
    """The run folder."""
    max_prompts: int = 128
    """A side, at most."""
    batch_size: int = 32
    seed: int = 0

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """`prompts.json`."""
        return read_json(self.path / "prompts.json")

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format of the run, with its response prefix."""
        options = read_json(self.path / "run.json")["options"]
        prefix = self.record["response_prefix"]
        return ChatFormat(self.model.tokenizer, options["system"], options["template_kwargs"], prefix)

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

    @cached_property
    def refusal_tokens(self) -> tuple[int, ...]:
        """Token ids of the refusal score."""
        return tuple(token["id"] for token in self.record["refusal_tokens"])

    def prompts(self, side: str, part: str = "test") -> list[str]:
        """Instructions of "harmful" or "harmless" in "train", "val" (those that passed the filter) or "test"."""
        rows = self.record[side][part]
        return [row["instruction"] for row in rows if row.get("kept", True)][: self.max_prompts]


def check_model_of_run(path: Path, source: str) -> None:
    """Make sure that a run folder is about this model.

    Raises:
        UserError: there is no run, or it is about another model.
    """
    if not (path / "run.json").exists():
        raise UserError(f"{path} is not a run folder: it has no run.json; make one with refusal-mi run")
    before = read_json(path / "run.json")["model"]["source"]
    if before != source:
        raise UserError(f"{path} holds a run of {before} ({model_alias(before)}), not of {source}: name that MODEL")


def read_directions(source: Path, ranks: str | None = None) -> list[Direction]:
    """The directions of a file or a run folder.

    Args:
        source: a `direction.pt` (its metadata JSON beside it), or a run folder.
        ranks: of a run folder's candidates, best is 0: "0-2" is ranks 0 and 2.

    Raises:
        UserError: there is no such file, run or rank.
    """
    if source.is_dir():
        if ranks is not None:
            return load_ranked(source, parse_directions(ranks))
        if not (source / DIRECTION).is_file():
            raise UserError(f"{source} has no {DIRECTION}: finish the run with refusal-mi run, or name another run")
        return [Direction.load(source / DIRECTION)]
    if ranks is not None:
        raise UserError(f"--directions ranks the candidates of a run folder, and {source} is not a folder")
    return [Direction.load(source)]


def harmless_components(source: Path, directions: list[Direction]) -> list[float]:
    """Per direction, the component along it of the harmless mean at its own layer and position.

    Raises:
        UserError: the source is no run folder with means, or a direction does not say where it was read.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / MEANS).is_file():
        raise UserError(f"--affine harmless-mean needs a run folder with {MEANS}, and {folder} has none; give a number")
    means = read_tensors(folder / MEANS)["harmless"].double()
    found = []
    for direction in directions:
        if direction.position is None or not -means.shape[0] <= direction.position < 0:
            raise UserError("--affine harmless-mean needs directions that say at which prompt position they were read")
        if not 0 <= direction.layer < means.shape[1]:
            raise UserError(f"there is no harmless mean at layer {direction.layer}; give a number")
        found.append((means[direction.position, direction.layer] @ direction.unit).item())
    return found
