"""Text from outside in figures: it is shown as it is, and none of it is markup."""

import html
import re

from ..terminal import is_shown, printable

_JOINER = "\u2060"
"""A word joiner: invisible, without width, and no part of a tag or an entity."""


def plain(text: str) -> str:
    """Text as plotly shows it literally; whatever comes from outside passes here on its way into a figure.

    Plotly reads HTML and entities in labels (`<|im_end|>` would vanish, `<a href=…>` be a link), TeX between dollars
    and `%{…}` in hover templates. What would reorder the rest of a line is replaced.
    """
    return html.escape(printable(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def unparsed(text: str) -> str:
    """Text that shows itself both where it is parsed as HTML and where it is not: an unseen joiner parts its tags."""
    return re.sub(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])", lambda sign: sign[0] + _JOINER, printable(text))


def token_text(token: str) -> str:
    """A vocabulary entry as people read it: byte-level and sentencepiece spaces, newlines as \\n."""
    text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("ĉ", "\t")
    return "".join(c if is_shown(c) and c not in "\n\t" else _escaped(c) for c in text)


def quoted(token: str) -> str:
    """A vocabulary entry in quotes."""
    return plain(f"'{token_text(token)}'")


def shortened(text: str, width: int = 90) -> str:
    """A prompt in a hover label."""
    flat = " ".join(text.split())
    return plain(flat if len(flat) <= width else flat[: width - 1] + "…")


def _escaped(c: str) -> str:
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return named.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}")
