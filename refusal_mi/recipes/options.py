"""Defaults that depend on the model; and the config file of the CAA write-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.loading import ORGANISM, model_alias
from ..run.options import RunOptions

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
