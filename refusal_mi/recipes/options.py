"""Options of the steering recipes, defaults that depend on the model, and the config file of the CAA write-up."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..files import at_home
from ..options import (
    MEANINGS,
    AllowSpecialTokens,
    BatchSize,
    Column,
    Layers,
    NewTokens,
    NRandom,
    Option,
    Positions,
    ResponsePrefix,
    Seed,
    System,
    TemplateKwargs,
    numbers,
    position_scope,
    token_ids,
)
from ..run.options import RunOptions
from ..search.thresholds import most
from ..values import Value

EMBEDDED_NEW_TOKENS = 64
"""The embedded model's answers are short."""


def default_sets(source: str) -> tuple[str, str, str, str]:
    """Harmful, harmless, plain-text and instruction sets for a model."""
    if not _is_embedded(source):
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
        max_new_tokens=EMBEDDED_NEW_TOKENS if _is_embedded(source) else RunOptions.max_new_tokens,
    )


def default_queries(source: str) -> str:
    """Queries of a response-averaged vector: harmless ones as TRAIN,VAL,TEST, or the hub's Alpaca."""
    return default_sets(source)[1] if _is_embedded(source) else "alpaca"


def default_pairs(source: str) -> tuple[str, str, str]:
    """A/B pairs for CAA vectors, held-out pairs, and open questions."""
    if _is_embedded(source):
        return "organism_ab", "organism_ab_test", "organism_ab_test"
    return "caa_train", "caa_test", "caa_questions"


def default_folder(source: str, *, quick: bool = False) -> Path:
    """Where a run of this model lies.

    A local model has the folder of its base name, unless another model's files are there: then its alias has a hash.
    """
    from ..model.loading import EMBEDDED, model_alias, unique_alias
    from ..run.folder import models_of

    mark = "-quick" if quick else ""
    plain, unique = (Path("runs") / f"{alias(source)}{mark}" for alias in (model_alias, unique_alias))
    held = models_of(plain)
    is_anothers = plain.name.removesuffix(mark) == EMBEDDED or "--" in plain.name
    is_anothers = is_anothers or not all(each.is_at(source) for each in held)
    return unique if unique != plain and (is_anothers or unique.exists()) else plain


def _is_embedded(source: str) -> bool:
    from ..model.loading import ORGANISM

    return source == str(ORGANISM)


REFUSAL_INSTRUCTION = "You must refuse to answer this question.\n"
Dataset = Annotated[
    str,
    Option(
        "Queries: a set, or TRAIN,VAL,TEST; default alpaca, for the embedded model its own harmless.",
        takes=str | None,
        depends_on_model=True,
    ),
]


def read_instructions(texts: "list[str]") -> tuple[str, ...]:
    """Refusal instructions, each with white space at its end."""
    return tuple(text if text[-1:].isspace() else f"{text}\n" for text in texts)


@dataclass(frozen=True, eq=False, repr=False)
class VectorOptions(Value):
    """Options of `responses extract`, with the published defaults."""

    dataset: Dataset = "alpaca"
    """TRAIN is used here."""
    column: Column = None
    n_samples: Annotated[int, Option("Queries.")] = 20
    n_completions: Annotated[int, Option("Sampled answers to each query, in each mode.")] = 10
    max_new_tokens: NewTokens = 64
    batch_size: Annotated[
        int, Option("Prompts per batch; sampled text depends on it.", flags="--generation-batch-size")
    ] = 8
    seed: Seed = 42
    """Of the queries and the sampling."""
    refusal_instructions: Annotated[
        tuple[str, ...],
        Option(
            "Put in front of the query; repeatable, their means are averaged.",
            flags="--refusal-instruction",
            takes=list[str] | None,
            read=read_instructions,
            depends_on_model=True,
        ),
    ] = (REFUSAL_INSTRUCTION,)
    token_weights: Annotated[
        Literal["mean", "first"], Option("mean over a response's tokens, or its first.", takes=str)
    ] = "mean"
    layers: Layers = None
    """Rows to keep, the others are zero; None is all of 0..n_layers."""
    normalize: Annotated[
        bool, Option("Give every response the same norm, per layer, before averaging.", flags="--normalize")
    ] = False
    system: System = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    allow_special_tokens: AllowSpecialTokens = False
    response_prefix: ResponsePrefix = None

    def __post_init__(self) -> None:
        for name in ("n_samples", "n_completions", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.refusal_instructions:
            raise UserError("a refusal vector needs at least one refusal instruction")
        if self.token_weights not in ("mean", "first"):
            raise UserError(f"token weights are mean or first, not {self.token_weights!r}")


LayerChoice = int | Literal["auto", "sound"]
"""A row; the one with the highest steering score; or the best that is neither late nor degenerate."""


def read_layer(text: str) -> LayerChoice:
    """auto, sound or a number."""
    if text == "auto":
        return "auto"
    if text == "sound":
        return "sound"
    if not text.isdecimal():
        raise UserError(f"--choose-layer takes auto, sound or a number, not {text!r}")
    return int(text)


@dataclass(frozen=True, eq=False, repr=False)
class EvalOptions(Value):
    """Options of `evaluate_vector`, with the published defaults."""

    dataset: Dataset = "alpaca"
    """VAL and TEST are used here."""
    column: Column = None
    n_validation_samples: Annotated[int, Option("Queries that choose the layer.")] = 32
    n_test_samples: Annotated[int, Option("Queries that are reported on.")] = 20
    coefficients: Annotated[
        tuple[float, ...],
        Option(
            "How often the vector is added, such as 0.0 0.5 1.0.",
            takes=str,
            read=numbers("--coefficients"),
            write=lambda values: ",".join(map(str, values)),
        ),
    ] = (0.0, 0.5, 1.0, 2.0, 5.0)
    max_new_tokens: NewTokens = 64
    batch_size: BatchSize = 8
    """None: 64, halved while the memory does not suffice."""
    validation_seed: Annotated[int, Option("Of the validation sample.")] = 200
    test_seed: Annotated[int, Option("Of the test sample.")] = 100
    layer: Annotated[
        LayerChoice,
        Option(
            "auto (highest steering score), sound (best that is neither late nor degenerate), or N.",
            flags="--choose-layer",
            takes=str,
            read=read_layer,
            write=str,
        ),
    ] = "auto"
    layers: Layers = None
    """Rows to choose from; None is all that are not zero."""
    kl_max: Annotated[
        float | None,
        Option(
            MEANINGS["kl_max"],
            takes=float | None,
            read=lambda value: None if value is None else most(value),
        ),
    ] = None
    """Of ablating the row, on validation queries."""
    refusal_tokens: Annotated[
        tuple[int, ...] | None,
        Option(MEANINGS["refusal_tokens"], takes=str | None, read=token_ids),
    ] = None
    """None: found from the responses."""
    positions: Annotated[Positions, Option(MEANINGS["positions"], takes=str, read=position_scope, own_default=True)] = (
        "all"
    )
    n_random: NRandom = 1
    """Vectors of equal norm."""
    system: System = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    allow_special_tokens: AllowSpecialTokens = False

    def __post_init__(self) -> None:
        for name in ("n_validation_samples", "n_test_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")
        if not self.coefficients:
            raise UserError("at least one coefficient is needed")
        if len(set(self.coefficients)) < len(self.coefficients):
            raise UserError(f"a coefficient was given twice: {self.coefficients}")
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if not isinstance(self.layer, int):
            read_layer(self.layer)
        if self.kl_max is not None and not 0 <= self.kl_max < math.inf:
            raise UserError(f"kl_max must be a number from 0 on, not {self.kl_max}")


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
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # foreign code
        raise UserError(f"{path} is not YAML: {error}") from None
    values = _flat(content or {}, path)
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
    paths = {key: folder / at_home(value) for key, value in texts.items()}
    model = texts.get("model_path")
    return CAAConfig(
        str(paths["model_path"]) if model is not None and paths["model_path"].is_dir() else model,
        paths.get("data_path.generation"),
        paths.get("data_path.test"),
        paths.get("save_vector_path"),
        paths.get("steering_vector_path"),
        layer,
    )


def _flat(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values; the known keys are {', '.join(KEYS)}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            values |= {f"{key}.{inner}": entry for inner, entry in value.items()}
        else:
            values[str(key)] = value
    return values
