"""What the recipes run on where nothing is named: the embedded model's own sets, general ones for any other model."""

from pathlib import Path

from ..models import ORGANISM, model_alias
from .options import RunOptions

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
