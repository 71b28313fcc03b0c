"""docs/families.md says what is so: rows of it are made again."""

import re
import warnings
from pathlib import Path

import pytest

from benchmarks.families import PAGE, TYPES, page, try_type
from refusal_mi.model.families import FAMILIES
from tests.helpers.tiers import first_is_fast

TRIED = (
    "llama",
    "gpt2",
    "gemma2",
    "flex_olmo",
    "bloom",
    "llava",
    "qwen2_5_vl",
    "falcon_h1",
    "qwen3_next",
    "openai-gpt",
    "glm4_moe",
)


def committed() -> dict[str, str]:
    """The page's lines by type."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if re.match(r"\| [a-z]", line)}


def outcome(line: str) -> list[object]:
    """Which of the three numbers are there, and the reason."""
    _, _, *numbers, reason, _ = (part.strip() for part in line.split("|"))
    return [*(each != "–" for each in numbers), reason]


def test_every_type_has_a_line_and_every_family_is_tried():
    lines = committed()
    assert set(lines) - {"type"} == set(TYPES) and len(set(TYPES)) >= 60
    assert {name.removesuffix("_text") for name in FAMILIES} <= {name.removesuffix("_text") for name in TYPES}


def test_whatever_runs_runs_exactly():
    for name, line in committed().items():
        if name != "type":
            numbers = [float(part) for part in line.split("|")[2:4] if part.strip() != "–"]
            assert numbers == [] or max(numbers) <= 1e-5
            assert numbers or len(line) < 160, "refused in one short line"


@pytest.mark.parametrize("model_type", first_is_fast(TRIED))
def test_a_line_is_made_again(model_type, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = try_type(model_type, tmp_path)
    (line,) = [each for each in page([row]).splitlines() if each.startswith(f"| {model_type} |")]
    assert outcome(line) == outcome(committed()[model_type])
    if row.difference is not None:
        assert row.difference <= 1e-5 and row.left <= 1e-5
