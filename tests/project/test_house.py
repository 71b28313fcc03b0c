"""The tests keep house: they share helpers, not each other, and reach the package through its public names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
PRIVATE = re.compile(r"refusal_mi(\.\w+)*\._[a-z]\w*")


def faults(source: str) -> Iterator[str]:
    """Imports of other tests, and private names of the package: imported, read off a module, or patched by name."""
    tree = ast.parse(source)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == "tests" and not node.module.startswith("tests.helpers."):
                yield f"import from {node.module}"
            if node.module.split(".")[0] == "refusal_mi":
                yield from (f"import of {name.name}" for name in node.names if name.name.startswith("_"))
                modules |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            yield f"name of {node.value}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            name = node.attr
            if name.startswith("_") and not name.startswith("__"):
                yield f"use of {node.value.id}.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_file_keeps_house(path: Path) -> None:
    assert list(faults(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.search.test_sweep import HARMFUL",
        "from tests.test_measures import TOKENS",
        "from refusal_mi.files import _x",
        "from refusal_mi import files\nfiles._x()",
        "monkeypatch.setattr('refusal_mi.model.running._path', None)",
    ],
)
def test_a_fault_is_seen(source: str) -> None:
    assert len(list(faults(source))) == 1
    assert not list(faults(source.replace("_x", "x").replace("_path", "path").replace("tests.", "tests.helpers.", 1)))
