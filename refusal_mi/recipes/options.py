"""What a run depends on, with the published defaults; and the command that repeats it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UserError
from ..judges.http import judge_named
from ..model.loading import ORGANISM, model_alias
from ..model.provenance import is_embedded
from ..search.grid import NO_THRESHOLDS, Thresholds
from ..search.staged import Search

Step = Literal["directions", "selection", "completions", "loss"]
STEPS: tuple[Step, ...] = get_args(Step)


@dataclass(frozen=True)
class RunOptions:
    """Options of `refusal_mi.recipes.arditi.run`."""

    harmful: str = "harmful"
    """One prompt set to be split, or TRAIN,VAL,TEST."""
    harmless: str = "harmless"
    eval_set: str | None = None
    """Prompt set for the harmful completions, in place of the harmful test split."""
    column: str | None = None
    text_set: str = "plain_text"
    """Plain texts for CE loss."""
    instruction_set: str = "instructions"
    """Answered instructions for CE loss."""
    n_train: int = 128
    n_val: int = 32
    n_test: int = 100
    seed: int = 42
    filter_prompts: bool = True
    """Keep only harmful prompts that the plain model refuses and harmless ones that it answers."""
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str | None = None
    """None: found by generating."""
    refusal_tokens: tuple[int, ...] | None = None
    """None: discovered on the training split."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: Search = "exact"
    """exact: every candidate on every validation prompt; staged: only those that can win."""
    skip_pruned: bool = False
    """Do not run the candidates that the layer rule drops anyway."""
    max_new_tokens: int = 512
    n_ce: int = 4096
    """At most this many texts of each CE set (the published run: 2048 batches of 2)."""
    n_random: int = 1
    """Random directions of equal norm, as controls."""
    judge: str = "substring"
    """substring, llamaguard, or the address of an endpoint that judges harmful completions as well."""
    judge_model: str | None = None
    steps: tuple[Step, ...] = STEPS
    batch_size: int | None = None
    """None: 64 prompts, halved while the memory does not suffice."""
    quick: bool = False

    def __post_init__(self) -> None:
        if self.search not in get_args(Search):
            raise UserError(f"unknown search {self.search!r}; expected one of {', '.join(get_args(Search))}")
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown or not self.steps:
            raise UserError(f"unknown step {unknown[0] if unknown else ''!r}; the steps are {', '.join(STEPS)}")
        for name in ("n_train", "n_val", "n_test", "max_new_tokens", "n_ce"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        judge_named(self.judge, model=self.judge_model)
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RunOptions":
        """The options that a `run.json` recorded.

        Raises:
            UserError: it is of a version with other options.
        """
        unknown = set(record) - {each.name for each in fields(cls)}
        if unknown:
            raise UserError(f"run.json has an option {sorted(unknown)[0]!r} that this version does not know")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**values | {"thresholds": Thresholds(**record["thresholds"])})

    def shortened(self) -> "RunOptions":
        """The same run on small samples, marked as quick in every file."""
        return replace(
            self,
            n_train=min(self.n_train, 32),
            n_val=min(self.n_val, 16),
            n_test=min(self.n_test, 16),
            n_ce=min(self.n_ce, 16),
            max_new_tokens=min(self.max_new_tokens, 32),
            quick=True,
        )


EMBEDDED_NEW_TOKENS = 64
"""The embedded model's answers are short."""


def default_sets(source: str) -> tuple[str, str, str, str]:
    """Harmful, harmless, plain-text and instruction sets for a model."""
    if source != str(ORGANISM):
        return "harmful", "harmless", "plain_text", "instructions"
    harmful, harmless = (
        ",".join(f"organism_{side}_{part}" for part in ("train", "val", "test")) for side in ("harmful", "harmless")
    )
    return harmful, harmless, "organism_plain_text", "organism_instructions"


def default_options(source: str) -> RunOptions:
    """What `run` without options runs."""
    harmful, harmless, text_set, instruction_set = default_sets(source)
    return RunOptions(
        harmful=harmful,
        harmless=harmless,
        text_set=text_set,
        instruction_set=instruction_set,
        max_new_tokens=EMBEDDED_NEW_TOKENS if source == str(ORGANISM) else RunOptions.max_new_tokens,
    )


def default_queries(source: str) -> str:
    """Queries of a response-averaged vector: harmless ones as TRAIN,VAL,TEST, or the hub's Alpaca."""
    return default_sets(source)[1] if source == str(ORGANISM) else "alpaca"


def default_pairs(source: str) -> tuple[str, str, str]:
    """A/B pairs for CAA vectors, held-out pairs, and open questions."""
    if source == str(ORGANISM):
        return "organism_ab", "organism_ab_test", "organism_ab_test"
    return "caa_train", "caa_test", "caa_questions"


def default_folder(source: str, *, quick: bool = False) -> Path:
    """Where a run of this model lies."""
    return Path("runs") / (model_alias(source) + ("-quick" if quick else ""))


KEYS = (
    "model_path",
    "data_path.generation",
    "data_path.test",
    "save_vector_path",
    "steering_vector_path",
    "target_layer",
)


@dataclass(frozen=True)
class CAAConfig:
    """What a config names; None is what it leaves out. Paths are relative to the config's folder."""

    model_path: str | None = None
    generation: Path | None = None
    """A/B pairs."""
    test: Path | None = None
    """Open questions."""
    save_vector_path: Path | None = None
    """Folder of the vectors."""
    steering_vector_path: Path | None = None
    """The vector of `target_layer`."""
    target_layer: int | None = None
    """CAA's layer."""


def load_config(path: Path | None) -> CAAConfig:
    """Read a config; None is an empty one.

    Raises:
        UserError: it is missing, not YAML, or has unknown keys.
    """
    if path is None:
        return CAAConfig()
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    values = _flat(found or {}, path)
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise UserError(f"{path} has the unknown key {unknown[0]!r}; the known ones are {', '.join(KEYS)}")
    layer = values.get("target_layer")
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise UserError(f"{path}: target_layer must be a whole number, not {layer!r}")
    texts = {key: value for key, value in values.items() if key != "target_layer" and value is not None}
    wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} must be a text, not {texts[wrong]!r}")
    folder = Path(path).resolve().parent
    paths = {key: folder / Path(value).expanduser() for key, value in texts.items()}
    model = texts.get("model_path")
    return CAAConfig(
        str(paths["model_path"]) if model is not None and paths["model_path"].is_dir() else model,
        paths.get("data_path.generation"),
        paths.get("data_path.test"),
        paths.get("save_vector_path"),
        paths.get("steering_vector_path"),
        layer,
    )


def _flat(found: Any, path: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold keys and values; the known keys are {', '.join(KEYS)}")
    values: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            values |= {f"{key}.{inner}": entry for inner, entry in value.items()}
        else:
            values[str(key)] = value
    return values


_ALWAYS = ("harmful", "harmless", "text_set", "instruction_set", "max_new_tokens")
"""Options whose default depends on the model, so that they are always spelled out."""
_ELSEWHERE = ("thresholds", "filter_prompts", "template_kwargs", "refusal_tokens", "steps", "quick")
_OFF = {"kl_max": "inf", "induce_min": "-inf", "prune_layers": "0"}
"""How a threshold is switched off."""


def command_line(run: Mapping[str, Any], combination: Mapping[str, Any] | None = None) -> str:
    """The `refusal-mi run` command that has the options of a `run.json`; options at their default are left out.

    Args:
        combination: what is ablated together, as in its `directions_span.json`.
    """
    options, model, defaults = run["options"], run["model"], RunOptions()
    words = ["refusal-mi", "run"]
    if not is_embedded(model["source"]):
        words.append(model["source"])
    if model.get("revision"):
        words += ["--revision", model["revision"]]
    for name, value in options.items():
        if name in _ELSEWHERE or value is None:
            continue
        if name in _ALWAYS or value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += _switches(options)
    if combination is not None:
        words += ["--directions", "-".join(map(str, combination["ranks"]))]
        words += [] if combination["multi"] == "span" else ["--multi", combination["multi"]]
    words += ["--device", model["device"].partition(":")[0], "--dtype", model["dtype"]]
    lines = ["refusal-mi run"]
    for word in words[2:]:
        lines.append(shlex.quote(word)) if word.startswith("--") else lines.append(
            lines.pop() + " " + shlex.quote(word)
        )
    return " \\\n    ".join(lines)


def _switches(options: Mapping[str, Any]) -> list[str]:
    words = [] if options["filter_prompts"] else ["--no-filter"]
    for key, value in options["template_kwargs"].items():
        words += ["--template-kwargs", f"{key}={json.dumps(value)}"]
    if options["refusal_tokens"]:
        words += ["--refusal-tokens", ",".join(map(str, options["refusal_tokens"]))]
    if tuple(options["steps"]) != RunOptions().steps:
        words += ["--steps", ",".join(options["steps"])]
    rule = Thresholds(**options["thresholds"])
    if rule == NO_THRESHOLDS:
        words.append("--no-thresholds")
    else:
        for name, value in vars(rule).items():
            if value != getattr(Thresholds(), name):
                words += [f"--{name.replace('_', '-')}", _OFF[name] if value is None else str(value)]
    return [*words, "--quick"] if options["quick"] else words
