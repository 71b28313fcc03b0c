"""Wordings of a request: a system message, prefix, suffix, role or language around it, and whose each token is."""

import json
import random
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..values import Value, named_near
from .chat import ChatFormat, Message
from .given import Prompts, as_prompts
from .tables import read_rows

PLACE, PLAIN = "{instruction}", "plain"
PARTS = ("context", "variant", "instruction", "template")
"""What stands before the user's words (BOS, header, a system message that is always there); the variant's own words;
the instruction; what the template puts after the user's words."""
_LONGEST_NAME = 40
_SUFFIXES = (".toml", ".json", ".jsonl", ".ndjson")
_LISTS = ("variants", "variant")
"""What a file may call its list."""
_WORDS = tuple(
    word
    for line in (
        "table window paper garden river stone lamp basket morning yellow round quiet number letter cloud",
        "bridge candle market forest sugar pencil mirror winter summer street kitchen button feather ladder",
        "orange silver carpet engine island marble pepper saddle tunnel valley wagon",
    )
    for word in line.split()
)
_FILLERS = ("a", "b", "c", "d", "e", "o", "s", "t")


@dataclass(frozen=True)
class Variant:
    """The same request in another wording.

    Examples:
        >>> polite = Variant("polite", "Please, {instruction}")
        >>> polite.wrap("bake bread."), polite.before
        ('Please, bake bread.', 'Please, ')
    """

    name: str
    template: str = PLACE
    """The user's message; {instruction} stands in it once."""
    system: str | None = None
    """The system message; None leaves it as the run has it."""

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise UserError(
                f"a variant's name has 1 to {_LONGEST_NAME} printable characters, unlike {self.name[:60]!r}"
            )
        if folder_name(self.name) == PLAIN:
            raise UserError(f"the name {PLAIN!r} is that of the request as it stands: call this variant something else")
        n = self.template.count(PLACE)
        if n != 1:
            raise UserError(f"the template of {self.name!r} has {PLACE} {n} times: it must stand in it once")
        for text in (self.template, self.system or ""):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{self.name!r} has half of a character in it (a lone surrogate): {ascii(text)[:80]}")
        if not any(each.strip() for each in (self.before, self.after, self.system or "")):
            raise UserError(
                f"{self.name!r} changes nothing or adds no words, so that it would be its own control: give it a "
                "template with other words, or a system message"
            )

    @property
    def before(self) -> str:
        """What stands before the instruction."""
        return self.template.partition(PLACE)[0]

    @property
    def after(self) -> str:
        """What stands after it."""
        return self.template.partition(PLACE)[2]

    def wrap(self, instruction: str) -> str:
        """The user's message."""
        return f"{self.before}{instruction}{self.after}"


@dataclass(frozen=True, eq=False, repr=False)
class Parts(Value):
    """A prompt as the model reads it, and which of `PARTS` each token belongs to."""

    token_ids: tuple[int, ...]
    labels: tuple[str, ...]
    n_shared: int
    """Tokens with letters of two parts, which count for the one that has more of them."""

    def count(self, part: str) -> int:
        """Tokens of a part."""
        return self.labels.count(part)


def read_variants(path: str | Path) -> tuple[Variant, ...]:
    """The variants of a file: JSON or TOML with a list of them, alone or under "variants", or JSON Lines.

    Each has a name, and a template, a system message or both. Keys that mean nothing are refused.

    Examples:
        >>> n = Path("variants.json").write_text('[{"name": "polite", "template": "Please, {instruction}"}]')
        >>> read_variants("variants.json")[0].wrap("bake bread.")
        'Please, bake bread.'

    Raises:
        UserError: there is no such file, or one of them is not as it should be.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--variants takes a file that ends in {', '.join(_SUFFIXES)}, not {path}")
    rows = _toml_rows(path) if path.suffix.lower() == ".toml" else read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no variant")
    variants = tuple(_variant(path, number, row) for number, row in enumerate(rows, start=1))
    return checked_variants(variants, str(path))


def checked_variants(variants: Iterable[Variant], where: str = "the variants") -> tuple[Variant, ...]:
    """The same, if their names differ by more than case and punctuation, as the names of their folders must.

    Raises:
        UserError: two of them do not, or there are none.
    """
    found = tuple(variants)
    if not found:
        raise UserError(f"{where}: there is none; give at least one variant")
    seen: dict[str, str] = {}
    for each in found:
        other = seen.setdefault(folder_name(each.name), each.name)
        if other is not each.name or sum(one.name == each.name for one in found) > 1:
            raise UserError(f"{where}: two variants are called {other!r} and {each.name!r}; give them other names")
    return found


def folder_name(name: str) -> str:
    """A name as that of a folder."""
    return "-".join("".join(each if each.isalnum() else " " for each in name.casefold()).split()) or "variant"


def neutral(variant: Variant, count: Callable[[str], int], seed: int, index: int = 0) -> Variant:
    """The control of a variant: everyday words drawn at random in place of its own, as many tokens in each place.

    White space around them stays, and a blank parts them from the instruction if the tokens allow it. The system
    message is the same for every prompt, the other words are drawn anew.

    Examples:
        >>> count = lambda text: len(text.split())
        >>> control = neutral(Variant("polite", "Please, {instruction}"), count, seed=0)
        >>> count(control.before), "Please" in control.before
        (1, False)

    Args:
        count: how many tokens a text has.
        index: of the prompt.
    """
    own, shared = (random.Random(f"{seed}/{variant.name}/{each}") for each in (index, "system"))
    system = None if variant.system is None else _refilled(variant.system, count, shared)
    before, after = _apart(variant.before, count, own, is_before=True), _apart(variant.after, count, own)
    return Variant(f"{variant.name[: _LONGEST_NAME - 10]} (control)", f"{before}{PLACE}{after}", system)


def label_parts(chat: ChatFormat, instructions: Prompts, variants: Sequence[Variant | None] = ()) -> list[Parts]:
    """Token ids of prompts in a wording each, and the part of every token: exact, by the characters it is made from.

    White space counts with the word that it is tokenized with.

    Examples:
        >>> (parts,) = label_parts(chat, "Why?", [Variant("polite", "Please, {instruction}")])
        >>> chat.tokenizer.decode([t for t, p in zip(parts.token_ids, parts.labels) if p == "variant"]).strip()
        'Please,'

    Args:
        chat: with the variants' system message where they have one.
        variants: of each prompt; None, and nothing at all, is the plain request.

    Raises:
        UserError: the tokenizer does not say which characters a token is made from, or the template rewrites messages.
    """
    asked = as_prompts(instructions)
    wordings = list(variants) or [None] * len(asked)
    if not getattr(chat.tokenizer, "is_fast", False):
        raise UserError("the parts of a prompt can be told only with a fast tokenizer (tokenizer.json)")
    messages = [
        chat.messages(instruction if each is None else each.wrap(instruction))
        for instruction, each in zip(asked, wordings, strict=True)
    ]
    marked = [[{**each, "content": _mark(index)} for index, each in enumerate(one)] for one in messages]
    columns = messages, chat.render_all(messages), chat.render_all(marked), chat.encode_all(messages), asked, wordings
    return [_labelled(chat, *each) for each in zip(*columns, strict=True)]


def _labelled(
    chat: ChatFormat,
    messages: Sequence[Message],
    text: str,
    marked: str,
    ids: Sequence[int],
    instruction: str,
    variant: Variant | None,
) -> Parts:
    read = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if read["input_ids"] != list(ids):
        raise UserError(f"special tokens are written out in this prompt, whose parts cannot be told: {text[:80]!r}")
    owners = _owners(messages, text, marked, instruction, variant)
    labels, n_shared, end = [], 0, 0
    for first, last in read["offset_mapping"]:
        span = slice(min(first, end), max(last, min(first, end) + 1))  # some tokenizers leave out the space before
        end = max(end, last)
        pairs = list(zip(owners[span], text[span], strict=True))
        letters = Counter(owner for owner, letter in pairs if not letter.isspace())
        n_shared += len(letters) > 1
        counts = letters or Counter(owner for owner, _ in pairs)
        labels.append(PARTS[max(counts, key=lambda owner: (counts[owner], owner))])
    return Parts(tuple(ids), tuple(labels), n_shared)


def _owners(
    messages: Sequence[Message], text: str, marked: str, instruction: str, variant: Variant | None
) -> list[int]:
    """For every character of a rendered prompt, the index of its part; `marked` has marks in place of its messages."""
    context, own, asked, template = range(len(PARTS))
    owners: list[int] = []
    rest = marked
    for index, message in enumerate(messages):
        head, found, rest = rest.partition(_mark(index))
        content = message["content"]
        owners += [context] * len(head)
        inside = [own if variant and variant.system is not None else context] * len(content)
        if index == len(messages) - 1:
            inside = [own] * len(variant.before) if variant else []
            inside += [asked] * len(instruction) + [own] * (len(content) - len(inside) - len(instruction))
        shown = next((each for each in (content, content.strip()) if text.startswith(each, len(owners))), None)
        if not found or shown is None:
            break
        left = 0 if shown == content else len(content) - len(content.lstrip())
        owners += inside[left : left + len(shown)]
    else:
        if len(owners) + len(rest) == len(text) and text.endswith(rest):
            return owners + [template] * len(rest)
    raise UserError(
        f"the chat template rewrites its messages, so that the parts of a prompt cannot be told: {text[:80]!r}"
    )


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def _apart(text: str, count: Callable[[str], int], rng: random.Random, is_before: bool = False) -> str:
    """`_refilled`, with a blank between drawn words and the instruction where the text is as long with it."""
    touches = text.strip() and not (text[-1:] if is_before else text[:1]).isspace()
    if not touches:
        return _refilled(text, count, rng)
    probe = _WORDS[0] if is_before else ""  # the blank behind words is counted with the word that follows

    def in_place(part: str) -> int:
        return count(f"{part}{probe}") - (count(probe) if probe else 0)

    found = _refilled(f"{text} " if is_before else f" {text}", in_place, rng, in_place(text))
    return found if in_place(found) == in_place(text) else _refilled(text, count, rng)


def _refilled(text: str, count: Callable[[str], int], rng: random.Random, n_tokens: int | None = None) -> str:
    """White space as it was, and words in between, so that the text has as many tokens, or `n_tokens`."""
    inside = text.strip()
    if not inside:
        return text
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    n, found = count(text) if n_tokens is None else n_tokens, ""
    while not found or count(f"{left}{found}{right}") < n:
        words = [*rng.sample(_WORDS, 8), *_FILLERS]
        longer = [f"{found} {each}" for each in words] + [f"{found}{each}" for each in _FILLERS] if found else words
        fits = next((each for each in longer if count(f"{left}{each}{right}") <= n), None)
        if fits is None:
            return f"{left}{found or _FILLERS[0]}{right}"
        found = fits
    return f"{left}{found}{right}"


def _toml_rows(path: Path) -> list[Any]:
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"{path} is not TOML: {error}") from None
    if not held:
        return []
    name = next((each for each in _LISTS if isinstance(held.get(each), list)), None)
    if name is None or len(held) > 1:
        other = next(key for key in held if key != name)
        raise UserError(f"{path} holds {other!r}: expected tables [[variants]] and nothing else")
    rows: list[Any] = held[name]
    return rows


def _variant(path: Path, number: int, row: Any) -> Variant:
    where = f"{path}, variant {number}"
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with a name and a template, not {json.dumps(row)[:60]}")
    known = [each.name for each in fields(Variant)]
    for key, value in row.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {named_near(str(key), known)}")
        if not isinstance(value, str) and not (value is None and key == "system"):
            raise UserError(f"{where}: {key} must be a text, not {type(value).__name__}")
    if "name" not in row:
        raise UserError(f"{where}: it has no name")
    try:
        return Variant(**row)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
