"""docs/real-models.md says what docs/real-models.json holds, and every picture in it is there with its numbers."""

import re
import sys
from pathlib import Path

import pytest

from refusal_mi.files import read_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real():
    """figures/real.py, as a module."""
    sys.path.insert(0, str(ROOT / "figures"))
    try:
        import real

        yield real
    finally:
        sys.path.remove(str(ROOT / "figures"))


def test_the_page_is_made_from_its_numbers(real):
    page = real.PAGE.read_text(encoding="utf-8")
    made = page.partition(real.START)[2].partition(real.END)[0]
    assert made == real.tables(read_json(real.KNOWN))


def test_every_picture_is_there_with_its_numbers(real):
    page = real.PAGE.read_text(encoding="utf-8")
    pictures = [real.PAGE.parent / link for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)]
    assert pictures and all(path.is_file() and path.with_suffix(".json").is_file() for path in pictures)
    assert len(pictures) == len(list(real.PICTURES.glob("*.png")))


def test_a_model_that_refuses_and_one_that_does_not_are_shown(real):
    known = read_json(real.KNOWN)["models"]
    statuses = {found["status"] for found in known.values()}
    assert statuses == {"done", "does not refuse"}
    for found in known.values():
        assert found["refused_by_text"]["harmful"]["n"] >= 150
        shown = "does not refuse**" in real.tables({"models": {"x": found}, "caa": {}, "responses": {}})
        assert shown == (found["status"] == "does not refuse")
