"""What a study asks: a cell is one model, with one set of prompts and one seed, by all methods."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..files import at_home
from ..judges.named import identify, judge_named
from ..model.loading import auto_here, hub_commit, resolve_source
from ..model.provenance import fingerprint, versions
from ..recipes.localize import KL_TOKENS, NEW_TOKENS
from ..recipes.methods import N_PLACES, N_RANDOM
from ..run.options import RunOptions
from ..text.tables import exists
from ..values import Value

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
_PROMPTS = ("harmful", "harmless", "eval_set", "harmless_eval_set", "text_set", "instruction_set")
_PLACES = ("device", "dtype", "device_map")


@dataclass(frozen=True, eq=False, repr=False)
class StudyModel(Value):
    """A model under a short name."""

    name: str
    source: str | None
    """Directory or hub id, as it was written; None is the embedded model."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """What `load_model` takes beside it."""

    def __post_init__(self) -> None:
        _check_name("model", self.name)

    def contents(self) -> str | None:
        """What its files hold now, by their hash; of a hub id the commit that lies here, None where none does.

        Raises:
            UserError: there is no such model.
        """
        source = resolve_source(self.source)
        path = at_home(source)
        return fingerprint(path) if path.exists() else hub_commit(source, self.how.get("revision"))


@dataclass(frozen=True)
class MethodsOptions:
    """Options of `compare_methods`."""

    kl_tokens: int = KL_TOKENS
    n_places: int = N_PLACES
    n_random: int = N_RANDOM
    n_prompts: int = 100
    """Held-out prompts a side, at most."""
    max_new_tokens: int = NEW_TOKENS
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"kl_tokens": 1, "n_places": 1, "n_random": 1, "n_prompts": 2, "max_new_tokens": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True, eq=False, repr=False)
class Cell(Value):
    """A run, and the methods that are compared in it."""

    model: StudyModel
    data: str
    """What its prompts are called."""
    options: RunOptions
    """With the seed."""
    methods: tuple[tuple[str, int], ...] = ()
    """As `estimators.names.parse_methods` gives them; without any, the run is all."""
    compared: MethodsOptions = MethodsOptions()

    def __post_init__(self) -> None:
        _check_name("set of prompts", self.data)
        if self.methods and set(self.options.steps) == {"directions"}:
            raise UserError("methods are compared in a run with a selection: add selection to steps")

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def folder(self) -> str:
        """Of the run, inside the study's."""
        return f"{self.model.name}/{self.data}/seed-{self.seed}"

    @property
    def name(self) -> str:
        return self.folder.replace("/", " ")

    def inputs(self, contents: str | None) -> dict[str, Any]:
        """Everything that its numbers depend on, without loading the model.

        Args:
            contents: the model's.
        """
        sets = [text for name in _PROMPTS for text in (getattr(self.options, name) or "").split(",")]
        files = {text: fingerprint(at_home(text)) for text in map(str.strip, sets) if text and exists(text)}
        return {
            "model": {
                "source": self.model.source,
                "contents": contents,
                "how": {k: str(v) for k, v in self.model.how.items()},
                "here": auto_here(**{k: v for k, v in self.model.how.items() if k in _PLACES}),
            },
            "judge": self.judge,
            "versions": versions(),
            "prompts": files,
            "options": self.options,
            "methods": self.methods,
            "compared": self.compared,
        }

    @property
    def judge(self) -> dict[str, str] | None:
        """What the verdicts depend on; None where there is no such judge, which the run says."""
        options = self.options
        try:
            return identify(judge_named(options.judge, model=options.judge_model, labels=options.judge_labels))
        except UserError:
            return None

    @property
    def is_repeatable(self) -> bool:
        """Whether what it depends on can be told: a function of the user's own may have changed."""
        return ":" not in "".join([self.options.estimator or "", *(name for name, _ in self.methods)])


@dataclass(frozen=True, eq=False, repr=False)
class Study(Value):
    """Cells, those of one model after each other."""

    name: str
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        _check_name("study", self.name)
        if not self.cells:
            raise UserError("a study needs at least one model and one seed")
        folders = [cell.folder for cell in self.cells]
        twice = next((each for each in folders if folders.count(each) > 1), None)
        if twice is not None:
            raise UserError(f"the study has {twice} twice: give each model and set of prompts its own name")

    @property
    def by_model(self) -> dict[str, list[Cell]]:
        """Cells by the name of their model."""
        return {
            name: [cell for cell in self.cells if cell.model.name == name]
            for name in dict.fromkeys(cell.model.name for cell in self.cells)
        }


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"the {what} is a folder's name of letters, digits, _, . and -, not {name!r}")
