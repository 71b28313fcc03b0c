"""What is given as prompts, whatever it is, as a list of texts: the one door of everything that takes prompts."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from ..errors import UserError
from .template import Message

Prompts = Iterable[Any]
"""A text, which is one prompt; a list, a `PromptSet`, or a column of pandas, polars or datasets, of texts."""
Conversations = Iterable[Any]
"""Prompts, or conversations of messages, in any mixture; one conversation may stand alone."""
Groups = Mapping[str, Prompts] | Prompts
"""Name -> prompts; prompts alone are one group, called like their set or "prompts"."""


def as_prompts(given: Any, what: str = "prompts") -> list[str]:
    """The texts of a string (one), a list, a `PromptSet`, or a column of a table, in their order.

    Examples:
        >>> as_prompts("Hi"), as_prompts(PromptSet.from_list(["Hi", "Bye"]))
        (['Hi'], ['Hi', 'Bye'])

    Args:
        what: they are called, in errors.

    Raises:
        UserError: it is none of these, has no order, or holds something other than texts.
    """
    return [_text(item, index, what) for index, item in enumerate(_items(given, what))]


def as_prompt(given: Any) -> str:
    """The one text that is given.

    Raises:
        UserError: there are several, or none.
    """
    texts = as_prompts(given)
    if len(texts) != 1:
        raise UserError(f"expected one prompt, not {len(texts)}")
    return texts[0]


def as_conversations(given: Any) -> list[str | Sequence[Message]]:
    """Prompts or conversations; a list of messages alone is one conversation.

    Raises:
        UserError: it holds something else.
    """
    items = _items(given, "prompts")
    if items and all(map(_is_message, items)):
        return [items]
    return [item if _is_conversation(item) else _text(item, index, "prompts") for index, item in enumerate(items)]


def as_groups(given: Any) -> dict[str, list[str]]:
    """Name -> texts; of prompts alone, one group called like their set or "prompts".

    Examples:
        >>> as_groups({"mine": "Hi"}), as_groups(["Hi"])
        ({'mine': ['Hi']}, {'prompts': ['Hi']})

    Raises:
        UserError: something in it is no prompts.
    """
    if not isinstance(given, Mapping):
        name = getattr(given, "name", None)
        return {name if isinstance(name, str) and name else "prompts": as_prompts(given)}
    return {str(name): as_prompts(texts, f"the prompts of group {name!r}") for name, texts in given.items()}


def _items(given: Any, what: str) -> list[Any]:
    if isinstance(given, str):
        return [given]
    columns = _columns(given)
    if columns is not None:
        names = ", ".join(map(repr, columns))
        raise UserError(f"{what}: a table with the columns {names} was given; give one of them: table[{columns[0]!r}]")
    if isinstance(given, Mapping):
        raise UserError(f"{what}: expected texts, not texts by name ({', '.join(map(str, list(given)[:3]))}, ...)")
    if isinstance(given, Set | bytes) or not isinstance(given, Iterable):
        shown = "a set, which has no order" if isinstance(given, Set) else f"{type(given).__name__}"
        raise UserError(f"{what}: expected a text, a list of texts, a PromptSet or a column of a table, not {shown}")
    try:
        return list(given)
    except TypeError as error:  # an array of no dimension
        raise UserError(f"{what}: {type(given).__name__} is no list of texts: {error}") from None


def _columns(given: Any) -> list[str] | None:
    """The names of a table of pandas, polars or datasets; None for anything else, a column among them."""
    names = getattr(given, "column_names", None)
    if names is None and getattr(given, "ndim", 2) == 2 and not isinstance(given, Mapping):
        names = getattr(given, "columns", None)
    if names is None or callable(names) or isinstance(names, Mapping):
        return None
    return [str(name) for name in names] or ["..."]


def _text(item: Any, index: int, what: str) -> str:
    text = item if isinstance(item, str) else getattr(item, "instruction", None)
    if not isinstance(text, str):
        shown = f"{item!r}"[:60]
        raise UserError(f"{what}: number {index} is no text but {type(item).__name__} {shown}")
    return str(text)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and all(map(_is_message, item))
