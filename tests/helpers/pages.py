"""The pages of the site: their blocks of Python, and where their links lead."""

import re
import unicodedata
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?[^()\s]*)\)")


def blocks(page: Path) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, names: dict[str, Any], which: slice = slice(None)) -> dict[str, Any]:
    """The names after a page's blocks have run one after the other."""
    names.setdefault("__name__", "__main__")
    for block in blocks(page)[which]:
        exec(compile(block, str(page), "exec"), names)
    return names


def broken_links(page: Path, text: str) -> Iterator[str]:
    """The links of a page's text that lead to no file of the repository, no heading, or no name of the package."""
    for link in _LINK.findall(_FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://", "mailto:")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not (target == page or target.is_file()):
            yield link
        elif anchor.startswith("refusal_mi."):
            if not _is_shown(anchor, target.read_text("utf-8")):
                yield link
        elif anchor and anchor not in _headings(text if target == page else target.read_text("utf-8")):
            yield link


def _headings(text: str) -> set[str]:
    return {_slug(title) for title in re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)}


def _slug(title: str) -> str:
    # As Python-Markdown makes them; code hosts agree on titles of plain words.
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def _is_shown(name: str, text: str) -> bool:
    module, _, member = name.rpartition(".")
    return f"::: {module}\n" in text and hasattr(import_module(module), member)
