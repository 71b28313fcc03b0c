"""Puts the figures of notebooks into the page of the analyses, while the site is built (`hooks` of mkdocs.yml).

A section that ends with **Figure.** and a notebook gets the first figure of the cell that calls its function.
"""

import json
import re
from pathlib import Path
from typing import Any

PAGE, FOLDER = "docs/analyses.md", "docs/pictures"
SECTION = re.compile(r"^### (?P<kind>\w+)$.*?^\*\*Call\.\*\* \[`(?P<function>\w+)\(", re.DOTALL | re.MULTILINE)
NOTEBOOK = re.compile(r"^\*\*Figure\.\*\* \[[^]]*\]\((?P<path>[^)]*\.ipynb)\).*$", re.MULTILINE)


def pictures(page: Path) -> dict[str, str]:
    """Analysis -> its figure as SVG, of those that name a notebook."""
    found = {}
    for kind, function, text in _sections(page.read_text("utf-8")):
        if named := NOTEBOOK.search(text):
            found[kind] = first_figure(page.parent / named["path"], function)
    return found


def first_figure(notebook: Path, function: str) -> str:
    """The first figure of the first cell that calls a function.

    Raises:
        ValueError: no cell calls it and shows one.
    """
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code" and f"{function}(" in "".join(cell["source"]):
            for output in cell["outputs"]:
                if svg := output.get("data", {}).get("image/svg+xml"):
                    return "".join(svg)
    raise ValueError(f"no cell of {notebook.name} calls {function} and shows a figure")


def with_pictures(text: str) -> str:
    """The page's text with an image after every line that names a notebook."""
    for kind, _, section in _sections(text):
        image = f"![{kind}, of the embedded model](pictures/{kind}.svg)"
        text = text.replace(section, NOTEBOOK.sub(lambda line, image=image: f"{line[0]}\n\n{image}", section))
    return text


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the pictures are files of the site."""
    from mkdocs.structure.files import File

    for kind, svg in pictures(Path(config.docs_dir) / PAGE).items():
        files.append(File.generated(config, f"{FOLDER}/{kind}.svg", content=svg))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: they stand in their sections."""
    return with_pictures(markdown) if page.file.src_uri == PAGE else markdown


def _sections(text: str) -> list[tuple[str, str, str]]:
    starts = list(SECTION.finditer(text))
    ends = [each.start() for each in starts[1:]] + [len(text)]
    return [(at["kind"], at["function"], text[at.start() : end]) for at, end in zip(starts, ends, strict=True)]
