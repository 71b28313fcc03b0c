"""Views of circuitsvis as complete pages that need no network and run no script but their own."""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import at_home, write_text
from ..terminal import printable
from .style import FONT, INK, MUTED
from .text import token_text, unparsed

_OPEN = '<script crossorigin type="module">'
_CALL = "CircuitsVis.render("
_STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; background: white; max-width: 1080px; margin: 24px auto; padding: 0 16px; }}
h1 {{ font-size: 20px; margin-bottom: 4px; }}
p {{ color: {MUTED}; font-size: 13px; }}
h2 {{ font-size: 15px; margin: 24px 0 0; overflow-wrap: anywhere; }}
"""

SIGNS = "blue positive, red negative"
"""The colors that circuitsvis uses."""


class Page(str):
    """The text of a complete HTML page, which shows itself in a notebook; `save` writes it."""

    about: str
    """What is on it."""

    def __new__(cls, text: str, about: str) -> "Page":
        page = super().__new__(cls, text)
        page.about = about
        return page

    def __repr__(self) -> str:
        return f"Page({self.about!r}, {len(self) / 1e6:.1f} MB of HTML; save(path) writes it)"

    def _repr_html_(self) -> str:
        """In a frame of its own, whose script reaches nothing of the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" style="width: 100%; height: 480px; border: 0" '
            f'srcdoc="{html.escape(self)}"></iframe>'
        )

    def save(self, path: str | Path) -> None:
        """Write it as an .html file."""
        write_text(at_home(path), self)


@dataclass(frozen=True)
class View:
    """One circuitsvis view under a heading."""

    heading: str
    rendered: Any
    """What a function of circuitsvis returned."""


def shown_tokens(tokens: Sequence[str]) -> list[str]:
    """Vocabulary entries as circuitsvis shows them: it parses tokens as HTML, and shows them as text on hover."""
    return [unparsed(token_text(token)) for token in tokens]


def page(title: str, about: str, views: Sequence[View]) -> Page:
    """A complete page; text of prompts and tokens cannot end the script or add markup.

    Its content security policy names the hash of its one script, so that nothing else could run or be loaded.
    """
    library, calls, bodies = "", [], []
    for view in views:
        place, library, call = _parts(view.rendered.local_src)
        calls.append(call.replace("</", "<\\/").replace("<!--", "<\\u0021--"))
        bodies.append(f'<h2>{_literal(view.heading)}</h2>\n<div id="{place}"></div>')
    script = "\n".join(["", library, *calls, ""])
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
    head = f'<meta charset="utf-8">{policy}<title>{_literal(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{_literal(title)}</h1>", f"<p>{_literal(about)}</p>", *bodies])
    text = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n'
        f'<script type="module">{script}</script>\n</body></html>\n'
    )
    return Page(text, title)


def _parts(source: str) -> tuple[str, str, str]:
    """The id of a view's place, the library, and the call that draws it.

    Raises:
        ValueError: circuitsvis writes its views in another form than this.
    """
    place = re.match(r'<div id="(circuits-vis-[^"]+)"', source)
    head, found, call = source.partition(_CALL)  # the first: a token may hold the same words
    if place is None or not found or _OPEN not in head:
        raise ValueError("a view of circuitsvis is not of the expected form: is its version the one in pyproject.toml?")
    return place[1], head.partition(_OPEN)[2], _CALL + call.rpartition("</script>")[0]


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _literal(text: str) -> str:
    return html.escape(printable(text))
