"""Text from outside in Markdown: it is shown as it is, and loads nothing."""

import re
from html import escape

from .terminal import printable

_JOINER = "\u2060"
"""A word joiner: invisible, without width, and it parts what is markup only in one piece."""
_MARKS = re.compile(r"[\\`*~$]|!(?=\[)|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.")
"""What begins code, emphasis, math, pictures and links; an underscore inside a word begins nothing."""
_LOADS = re.compile(r"!(?=\[)|\](?=[(\[:])|<(?=[A-Za-z/!?])")
"""What begins pictures, links and HTML."""


def literal(text: str) -> str:
    """A text on one line, of which no character is Markdown, HTML or the border of a table's cell."""
    flat = escape(" ".join(printable(text).split()), quote=False)
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", flat).replace("|", "\\|")


def without_media(markdown: str) -> str:
    """Markdown in which pictures, links and HTML are shown as text; emphasis, code and tables stay what they are.

    Inside of code it changes nothing that is seen, so that it need not be known where code begins and ends.
    """
    return _LOADS.sub(lambda mark: mark[0] + _JOINER, printable(markdown))
