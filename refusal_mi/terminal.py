"""What is shown on a terminal: text of models, tokenizers, templates and files cannot steer it."""

import sys
import unicodedata
from typing import Any

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_KEPT = frozenset("\n\t")


def is_shown(character: str) -> bool:
    """Whether a character is text: no control character, none that reorders the line, no half of a character."""
    if character in _KEPT:
        return True
    return character not in _BIDI and unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """Text that cannot move the cursor, change colors or reorder a line: such characters are replaced."""
    return text if text.isascii() and text.isprintable() else "".join(c if is_shown(c) else "�" for c in text)


def shown(value: Any) -> Any:
    """A text as rich is to show it, as it is and without markup; other things stay."""
    from rich.text import Text

    return Text(printable(value)) if isinstance(value, str) else value


def say(message: object) -> None:
    """A line on stderr: what happens."""
    _write(sys.stderr, message)


def tell(message: object) -> None:
    """A line on stdout: what came out."""
    _write(sys.stdout, message)


def _write(stream: Any, message: object) -> None:
    stream.write(printable(str(message)) + "\n")
    stream.flush()
