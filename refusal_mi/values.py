"""Frozen values that hold tensors or tables: equal where their contents are, and shown in a few lines."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields
from difflib import get_close_matches
from html import escape
from typing import Any

from .errors import NoSuchName, UserError

_LONGEST, _MOST_ITEMS = 60, 3


class Value:
    """Base of frozen dataclasses whose fields cannot simply be compared; they say `eq=False, repr=False`.

    Two are equal where they are of one class and every field is: tensors of one dtype by their numbers, NaN equal to
    NaN. Equal ones have equal hashes. `repr` names shapes instead of numbers, and `_repr_html_` is a small table.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(a, b) for (_, a), (_, b) in zip(_compared(self), _compared(other), strict=True))

    def __hash__(self) -> int:
        return hash((type(self).__qualname__, *(_key(value) for _, value in _compared(self))))

    def __repr__(self) -> str:
        shown = (f"{each.name}={short(getattr(self, each.name))}" for each in fields(self) if each.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str | None:
        rows = [(each.name, short(getattr(self, each.name))) for each in fields(self) if each.repr]  # type: ignore[arg-type]
        return html_table(type(self).__name__, ("", ""), rows)


def short(value: Any) -> str:
    """A value in at most a line: the dtype and shape of a tensor, the beginning of what is long."""
    if _is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {short(item)}" for key, item in list(value.items())[:_MOST_ITEMS]]
        return f"{{{', '.join(_rest(shown, len(value)))}}}"
    if isinstance(value, Sequence | Set) and not isinstance(value, Value) and not hasattr(value, "prompts"):
        shown = [short(item) for item in list(value)[:_MOST_ITEMS]]
        alone = "," if isinstance(value, tuple) and len(value) == 1 else ""
        opening, closing = "[]" if isinstance(value, list) else "()"
        return f"{opening}{', '.join(_rest(shown, len(value)))}{alone}{closing}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 4 * _LONGEST else f"{text[: 4 * _LONGEST - 1]}…"


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A small HTML table; all of it is text, whatever it looks like."""
    line = lambda cells, tag: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)  # noqa: E731
    heads = f"<tr>{line(head, 'th')}</tr>" if any(head) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    below = f"<div>{escape(note)}</div>" if note else ""
    return f"<div><b>{escape(title)}</b><table>{heads}{body}</table>{below}</div>"


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """The same in aligned columns of text."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in lines]
    return "\n".join([title, *(f"  {row}".rstrip() for row in shown), *([note] if note else [])])


def named_near(name: str, names: Sequence[str]) -> str:
    """ "did you mean 'prompt'?" where one is near, and what there is."""
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}expected one of {', '.join(names)}"


def check_named(what: str, value: Any, names: Iterable[Any]) -> None:
    """Refuse a name that is none of those there are, and say the near one.

    Raises:
        NoSuchName: it is none of them, a UserError.
    """
    known = tuple(names)
    if value in known:
        return
    texts = [str(name) for name in known if name is not None]
    raise NoSuchName(f"unknown {what} {value!r}; {named_near(str(value), texts)}")


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas table of rows of equal keys.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("to_frame needs pandas: pip install pandas") from None
    return pandas.DataFrame(list(rows), columns=list(rows[0]) if rows else None)


def _rest(shown: list[str], n: int) -> list[str]:
    return [*shown, f"… {n - len(shown)} more"] if n > len(shown) else shown


def _compared(value: Any) -> list[tuple[str, Any]]:
    return [(each.name, getattr(value, each.name)) for each in fields(value) if each.compare]


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "isnan")


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if _is_tensor(a) or _is_tensor(b):
        return _is_tensor(a) and _is_tensor(b) and _same_tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if _is_list(a) and _is_list(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return bool(a == b)


def _same_tensors(a: Any, b: Any) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _key(value: Any) -> Any:
    """What equal values share and can be hashed."""
    if _is_tensor(value):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, Mapping):
        return frozenset(map(str, value))
    if _is_list(value):
        return tuple(map(_key, value))
    if isinstance(value, float) and value != value:
        return None
    try:
        hash(value)
    except TypeError:
        return type(value).__name__
    return value
