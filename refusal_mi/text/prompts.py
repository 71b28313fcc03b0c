"""Prompt and text sets: bundled, from the hub, or from a local file; sampled and split with a seed."""

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any, overload

from ..errors import UserError, cause
from ..files import at_home, read_json, sha256_json
from ..hub import hub_or_cache
from ..values import Value
from .given import as_prompts
from .tables import SUFFIXES, exists, is_file_name, read_rows

DATA = Path(__file__).parents[1] / "data"
ORGANISM_DATA = Path(__file__).parents[1] / "organism"
_FILES = {
    **{name: DATA / f"{name}.json" for name in ("harmful", "harmless", "instructions", "plain_text")},
    "organism_instructions": ORGANISM_DATA / "instructions.json",
    "organism_plain_text": ORGANISM_DATA / "plain_text.json",
}

_ORGANISM_SPLITS = tuple(f"{side}_{part}" for side in ("harmful", "harmless") for part in ("train", "val", "test"))
BUNDLED_SETS = (*_FILES, *(f"organism_{split}" for split in _ORGANISM_SPLITS))
"""Names of the sets that ship with the package: general ones, and the embedded model's own."""


@dataclass(frozen=True)
class HubSet:
    """Where a known dataset lies on the hub, and which of its columns hold what."""

    path: str
    split: str
    column: str
    config: str | None = None
    category: str | None = None
    output: str | None = None
    must_be_empty: str | None = None
    """Rows with something in this column are left out (Alpaca's rows with an input)."""
    only: tuple[str, str] | None = None
    """A column, and what it holds in the rows that belong to the set."""

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the dataset belongs to the set.

        Raises:
            UserError: the dataset has no such column.
        """
        if self.only is None:
            return True
        column, value = self.only
        if column not in row:
            raise UserError(f"{self.path} has no column {column!r}; it has {', '.join(map(str, row))}")
        return bool(row[column] == value)


KNOWN_HUB_SETS = {
    "advbench": HubSet("walledai/AdvBench", "train", "prompt"),
    "harmbench": HubSet("walledai/HarmBench", "train", "prompt", config="standard", category="category"),
    "jailbreakbench": HubSet(
        "JailbreakBench/JBB-Behaviors", "harmful", "Goal", config="behaviors", category="Category"
    ),
    "strongreject": HubSet("walledai/StrongREJECT", "train", "prompt", category="category"),
    "maliciousinstruct": HubSet("walledai/MaliciousInstruct", "train", "prompt"),
    "xstest": HubSet("walledai/XSTest", "test", "prompt", category="type", only=("label", "safe")),
    "xstest-unsafe": HubSet("walledai/XSTest", "test", "prompt", category="type", only=("label", "unsafe")),
    "or-bench": HubSet("bench-llm/or-bench", "train", "prompt", config="or-bench-hard-1k", category="category"),
    "or-bench-80k": HubSet("bench-llm/or-bench", "train", "prompt", config="or-bench-80k", category="category"),
    "or-bench-toxic": HubSet("bench-llm/or-bench", "train", "prompt", config="or-bench-toxic", category="category"),
    "alpaca": HubSet("tatsu-lab/alpaca", "train", "instruction", output="output", must_be_empty="input"),
    "pile": HubSet("monology/pile-uncopyrighted", "train", "text"),
}
"""Names accepted wherever a set is asked for.

Harmless prompts that look harmful, which a model should answer: "xstest" (Röttger et al. 2023, 250 of its 450 rows) and
"or-bench" (Cui et al. 2024, the hard 1,319; "or-bench-80k" are all). Their harmful counterparts, which belong beside
them: "xstest-unsafe" (the other 200) and "or-bench-toxic" (655).
"""
_TEXT_COLUMNS = ("instruction", "prompt", "goal", "question", "query", "behavior", "forbidden_prompt", "text")
_CATEGORY_COLUMNS = ("category", "semantic_category", "SemanticCategory")
_OUTPUT_COLUMNS = ("output", "response", "completion", "answer")
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_CONTEXT_COLUMNS = ("input", "contextstring", "context_string", "context")
"""Where Alpaca, HarmBench and Dolly write the other half of an instruction."""


@dataclass(frozen=True)
class Prompt:
    """One instruction, with its harm category where there is one, and a reference answer where there is one.

    Examples:
        >>> Prompt("Why is the sky blue?", category="physics").category
        'physics'
    """

    instruction: str
    category: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class PromptSet(Sequence[str]):
    """Named, ordered, distinct prompts; a sequence of their texts, of which a slice is a set again.

    Examples:
        >>> asked = PromptSet.from_list(["Why is the sky blue?", "Bake bread", "Bake bread"])
        >>> len(asked), asked[0]
        (2, 'Why is the sky blue?')
        >>> asked.without(asked[:1]).instructions
        ['Bake bread']
    """

    name: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def from_list(cls, prompts: Iterable[Any], name: str = "prompts") -> "PromptSet":
        """A set of texts or `Prompt`s: a list, or a column of pandas, polars or datasets; repeated ones count once.

        Raises:
            UserError: there are none, or something else stands among them.
        """
        held = list(prompts) if isinstance(prompts, list | tuple) else []
        with_more = held and all(isinstance(each, Prompt) for each in held)
        found = held if with_more else [Prompt(text) for text in as_prompts(prompts)]
        if not found:
            raise UserError(f"{name} has 0 prompts")
        by_instruction: dict[str, Prompt] = {}
        for each in found:
            by_instruction.setdefault(each.instruction, each)
        return cls(name, tuple(by_instruction.values()))

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.instructions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...
    def __getitem__(self, index: int | slice) -> "str | PromptSet":
        if isinstance(index, slice):
            return replace(self, prompts=self.prompts[index])
        return self.prompts[index].instruction

    def __repr__(self) -> str:
        first = f", the first {self.prompts[0].instruction[:60]!r}" if self.prompts else ""
        return f"PromptSet({self.name!r}, {len(self)} prompts{first})"

    @property
    def instructions(self) -> list[str]:
        return [prompt.instruction for prompt in self.prompts]

    @property
    def categories(self) -> tuple[str | None, ...]:
        """Of every prompt; None where it has none."""
        return tuple(prompt.category for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the prompts in order."""
        return sha256_json([[prompt.instruction, prompt.category, prompt.output] for prompt in self.prompts])

    def sample(self, n: int, seed: int) -> "PromptSet":
        """`n` prompts in random order.

        Raises:
            UserError: there are fewer than `n`.
        """
        if n > len(self):
            raise UserError(f"{self.name} has {len(self)} prompts, but {n} were asked for")
        return replace(self, prompts=tuple(random.Random(seed).sample(self.prompts, n)))

    def without(self, *others: "PromptSet") -> "PromptSet":
        """The prompts that occur in none of the others."""
        seen = {prompt.instruction for other in others for prompt in other.prompts}
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt.instruction not in seen))

    def where(self, keep: Sequence[bool]) -> "PromptSet":
        """The prompts whose flag is true."""
        kept = tuple(prompt for prompt, flag in zip(self.prompts, keep, strict=True) if flag)
        return replace(self, prompts=kept)


@dataclass(frozen=True, eq=False, repr=False)
class Splits(Value):
    """Disjoint prompts for finding a direction, choosing it, and reporting on it.

    Examples:
        >>> splits = load_splits("organism_harmful_train", n_train=4, n_val=2, n_test=2, seed=0)
        >>> list(splits.parts), set(splits.train) & set(splits.test)
        (['train', 'val', 'test'], set())
    """

    train: PromptSet
    val: PromptSet
    test: PromptSet
    spare: Mapping[tuple[str, ...], PromptSet] = field(default_factory=dict)
    """What the sources of "train", "val" or both have left, in random order; none of it is in the test source."""

    @property
    def parts(self) -> dict[str, PromptSet]:
        """The three splits by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def load_prompts(source: str | Path, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Load a set of prompts; repeated instructions are kept once.

    Examples:
        >>> load_prompts("harmless", limit=3).instructions == load_prompts("harmless").instructions[:3]
        True

    Args:
        source: a bundled name ("harmful", "harmless", ...), a known hub set ("advbench", "harmbench",
            "jailbreakbench", "strongreject", "maliciousinstruct", "xstest", "or-bench", "alpaca", "pile", ...), a hub
            id owner/name, or a local JSON, JSONL, CSV, TSV, Parquet or TXT file, maybe gzipped, or a folder of such
            files.
        column: the column that holds the instruction in a local file or an unknown hub set; by default the first
            of the usual names, or the first user message of a column of chats. The named sets know theirs. What
            Alpaca's "input" and HarmBench's "ContextString" hold is joined to it, with a warning that says how often.
        limit: read at most this many rows (of a hub set without downloading the rest).

    Raises:
        UserError: there is no such set or column, or it is empty.
    """
    name = str(source)
    if name in BUNDLED_SETS:
        return _to_set(name, _bundled_rows(name)[:limit], None, None)
    if name.lower() in KNOWN_HUB_SETS:
        known = KNOWN_HUB_SETS[name.lower()]
        return _to_set(name.lower(), _hub_rows(known, limit), known.column, known)
    if is_file_name(name):
        path = at_home(source)
        return _to_set(path.name.split(".")[0] or path.name, read_rows(path)[:limit], column, None)
    if name.count("/") == 1:
        hub = HubSet(name, "train", column or "")
        return _to_set(name.split("/")[1], _hub_rows(hub, limit), column, None)
    names = [*BUNDLED_SETS, *KNOWN_HUB_SETS]
    near = get_close_matches(name.lower(), names, n=1)
    raise UserError(
        f"no such prompt set: {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; expected one of "
        f"{', '.join(names)}, a hub id owner/name, or a {', '.join(SUFFIXES)} file"
    )


def load_splits(source: str, *, n_train: int, n_val: int, n_test: int, seed: int, column: str | None = None) -> Splits:
    """Split one set, or sample each of TRAIN,VAL,TEST; the three never share an instruction.

    Examples:
        >>> splits = load_splits("organism_harmful_train", n_train=4, n_val=2, n_test=2, seed=0)
        >>> len(splits.train), len(splits.val), len(splits.test)
        (4, 2, 2)

    Raises:
        UserError: there are too few prompts, or the source is neither one set nor three.
    """
    if min(n_train, n_val, n_test) < 1:
        raise UserError(f"every split needs at least 1 prompt, not {n_train}, {n_val}, {n_test}")
    names = _names(source)
    if len(names) == 3:
        train, val, test = (load_prompts(name, column=column) for name in names)
        val, train = val.without(test), train.without(val, test)
        train_sample, val_sample = train.sample(n_train, seed), val.sample(n_val, seed + 1)
        left = {"train": train.without(train_sample), "val": val.without(val_sample)}
        spare: dict[tuple[str, ...], PromptSet] = {
            (part,): rest.sample(len(rest), seed + 3) for part, rest in left.items()
        }
        return Splits(train_sample, val_sample, test.sample(n_test, seed + 2), spare)
    if len(names) != 1:
        raise UserError(f"expected one prompt set or TRAIN,VAL,TEST, not {len(names)} sets: {source!r}")
    whole = load_prompts(names[0], column=column)
    wanted = n_train + n_val + n_test
    if wanted > len(whole):
        scaled = [max(1, n * len(whole) // wanted) for n in (n_train, n_val, n_test)]
        raise UserError(
            f"{whole.name} has {len(whole)} prompts, but {n_train} + {n_val} + {n_test} were asked for; "
            f"try --n-train {scaled[0]} --n-val {scaled[1]} --n-test {scaled[2]}"
        )
    sample = whole.sample(wanted, seed)
    bounds = (0, n_train, n_train + n_val, wanted)
    parts = [replace(whole, prompts=sample.prompts[start:end]) for start, end in pairwise(bounds)]
    rest = whole.without(sample)
    return Splits(parts[0], parts[1], parts[2], {("train", "val"): rest.sample(len(rest), seed + 3)})


def _names(source: str) -> list[str]:
    """One set or three; a comma may belong to the name of a file."""
    parts = source.split(",")
    if len(parts) == 1 or exists(source):
        return [source.strip()]
    cuts = ((0, *cut, len(parts)) for cut in combinations(range(1, len(parts)), 2))
    ways = ([",".join(parts[start:end]).strip() for start, end in pairwise(cut)] for cut in cuts)
    return next((way for way in ways if all(map(_is_known, way))), [part.strip() for part in parts])


def _is_known(name: str) -> bool:
    return name in BUNDLED_SETS or name.lower() in KNOWN_HUB_SETS or exists(name)


def _to_set(name: str, rows: Sequence[Any], column: str | None, known: HubSet | None) -> PromptSet:
    records = [row if isinstance(row, dict) else {"instruction": row} for row in rows]
    if not records:
        raise UserError(f"{name} has 0 prompts")
    counts: Counter[str] = Counter()
    by_instruction: dict[str, Prompt] = {}
    for prompt in _prompts(name, records, column, known, counts):
        if prompt.instruction:
            by_instruction.setdefault(prompt.instruction, prompt)
    for what, n in counts.items():
        warnings.warn(f"{name}: {n} of {len(records)} rows {what}", stacklevel=3)
    if not by_instruction:
        raise UserError(f"{name} has 0 prompts: every row is empty")
    return PromptSet(name, tuple(by_instruction.values()))


def _prompts(
    name: str, records: Sequence[Mapping[str, Any]], column: str | None, known: HubSet | None, counts: Counter[str]
) -> Iterator[Prompt]:
    """The prompt of every row; what is special of how many is counted."""
    first = records[0]
    chats = _optional_column(first, _CHAT_COLUMNS) if column is None else column
    if chats is not None and _is_chat(first.get(chats)):
        for record in records:
            yield _first_turn(name, record.get(chats), counts)
        return
    text = column or _first_column(name, first, _TEXT_COLUMNS)
    if text not in first:
        raise UserError(f"{name} has no column {text!r}; it has {', '.join(map(str, first))}: choose with --column")
    category = known.category if known else _optional_column(first, _CATEGORY_COLUMNS)
    output = known.output if known else _optional_column(first, _OUTPUT_COLUMNS)
    keys = {key for record in records for key in record}
    context = None if known and known.must_be_empty else _context_column(keys, text)
    beside = None if known or context else _optional_column(dict.fromkeys(sorted(keys)), ("input",))
    for record in records:
        if known and known.must_be_empty and str(record.get(known.must_be_empty) or "").strip():
            counts[f"have an {known.must_be_empty} and are left out, as published"] += 1
            continue
        if not isinstance(record.get(text), str):
            raise UserError(f"{name} has a row whose {text!r} is not text: {record.get(text)!r}")
        _check_unicode(name, record[text])
        instruction = record[text].strip()
        if instruction and context and (more := str(record.get(context) or "").strip()):
            counts[f"have a {context!r}, which is joined to their {text!r}"] += 1
            halves = (instruction, more) if text.lower() == "instruction" else (more, "---", instruction)
            instruction = "\n\n".join(halves)
        if instruction and beside and beside != text and str(record.get(beside) or "").strip():
            counts[f"have a {beside!r} beside their {text!r}, which is not used"] += 1
        kind, answer = (record.get(each) if each else None for each in (category, output))
        yield Prompt(instruction, None if kind is None else str(kind), answer if isinstance(answer, str) else None)


def _context_column(keys: set[str], text: str) -> str | None:
    """The column with the other half of the instruction; "input" is one only beside "instruction"."""
    names = [name for name in _CONTEXT_COLUMNS if name != "input" or text.lower() == "instruction"]
    return _optional_column(dict.fromkeys(sorted(keys)), names)


def _check_unicode(name: str, text: str) -> None:
    """JSON can spell half of a character, which no file and no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} has a row with half of a character (a lone surrogate): {ascii(text)[:80]}")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_message, value))


def _message(value: Any) -> tuple[str, str] | None:
    """Role and text of a message as OpenAI or ShareGPT write it."""
    if not isinstance(value, dict):
        return None
    role, text = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if isinstance(text, list) and text and all(isinstance(each, dict) and each.get("type") == "text" for each in text):
        parts = [each.get("text") for each in text]
        text = "\n".join(parts) if all(isinstance(each, str) for each in parts) else None
    return (_ROLES[role], text) if isinstance(text, str) and isinstance(role, str) and role in _ROLES else None


def _first_turn(name: str, value: Any, counts: Counter[str]) -> Prompt:
    """The first user message of a chat, and the answer to it."""
    turns = [_message(each) for each in value] if isinstance(value, list) else []
    told = [turn for turn in turns if turn is not None]
    asked = next((index for index, (role, _) in enumerate(told) if role == "user"), None)
    if asked is None or len(told) < len(turns):
        raise UserError(f"{name} has a row that is no chat with a user message: {str(value)[:80]!r}")
    _check_unicode(name, told[asked][1])
    rest = told[asked + 1 :]
    answer = rest[0][1] if rest and rest[0][0] == "assistant" else None
    if asked:
        counts["have messages before the first user message, which are not used"] += 1
    if any(role == "user" for role, _ in rest):
        counts["have several user messages, of which the first is used"] += 1
    return Prompt(told[asked][1].strip(), output=answer)


def _first_column(name: str, record: Mapping[str, Any], names: Sequence[str]) -> str:
    column = _optional_column(record, names)
    if column is None:
        raise UserError(
            f"{name} has none of the columns {', '.join(names)}; it has {', '.join(map(str, record))}: use --column"
        )
    return column


def _optional_column(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    by_lower = {str(key).lower(): key for key in record}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def _bundled_rows(name: str) -> list[Any]:
    if name in _FILES:
        return read_json(_FILES[name])
    return read_json(ORGANISM_DATA / "prompts.json")[name.removeprefix("organism_")]


def _hub_rows(hub: HubSet, limit: int | None) -> list[Any]:
    import datasets

    try:
        with hub_or_cache():
            if limit is None:
                rows = datasets.load_dataset(hub.path, hub.config, split=hub.split).to_list()
                return [row for row in rows if hub.holds(row)]
            stream = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True)
            return list(islice((row for row in stream if hub.holds(row)), limit))
    except UserError:
        raise
    except Exception as error:  # foreign code
        raise UserError(
            f"cannot load the dataset {hub.path} from the hub: {cause(error)} (without a network use a local file, "
            "or the bundled sets harmful and harmless)"
        ) from error
