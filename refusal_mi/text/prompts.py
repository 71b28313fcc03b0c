"""Prompt and text sets: bundled, from the hub, or from a local file; sampled and split with a seed."""

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, sha256_json

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


KNOWN_HUB_SETS = {
    "advbench": HubSet("walledai/AdvBench", "train", "prompt"),
    "harmbench": HubSet("walledai/HarmBench", "train", "prompt", config="standard", category="category"),
    "jailbreakbench": HubSet(
        "JailbreakBench/JBB-Behaviors", "harmful", "Goal", config="behaviors", category="Category"
    ),
    "strongreject": HubSet("walledai/StrongREJECT", "train", "prompt", category="category"),
    "maliciousinstruct": HubSet("walledai/MaliciousInstruct", "train", "prompt"),
    "alpaca": HubSet("tatsu-lab/alpaca", "train", "instruction", output="output", must_be_empty="input"),
    "pile": HubSet("monology/pile-uncopyrighted", "train", "text"),
}
"""Names accepted wherever a set is asked for."""
_TEXT_COLUMNS = ("instruction", "prompt", "goal", "question", "query", "behavior", "forbidden_prompt", "text")
_CATEGORY_COLUMNS = ("category", "semantic_category", "SemanticCategory")
_OUTPUT_COLUMNS = ("output", "response", "completion", "answer")
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Prompt:
    """One instruction, with its harm category where there is one, and a reference answer where there is one."""

    instruction: str
    category: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Named, ordered, distinct prompts."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def instructions(self) -> list[str]:
        return [prompt.instruction for prompt in self.prompts]

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


@dataclass(frozen=True)
class Splits:
    """Disjoint prompts for finding a direction, choosing it, and reporting on it."""

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

    Args:
        source: a bundled name ("harmful", "harmless", ...), a known hub set ("advbench", "harmbench",
            "jailbreakbench", "strongreject", "maliciousinstruct", "alpaca", "pile"), a hub id owner/name, or a
            local JSON, JSONL, CSV, Parquet or TXT file.
        column: the column that holds the instruction in a local file or an unknown hub set; by default the first
            of the usual names. The named sets know theirs.
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
    path = Path(source).expanduser()
    if path.suffix.lower() in _SUFFIXES:
        return _to_set(path.stem, _file_rows(path)[:limit], column, None)
    if name.count("/") == 1 and not path.exists():
        hub = HubSet(name, "train", column or "")
        return _to_set(name.split("/")[1], _hub_rows(hub, limit), column, None)
    raise UserError(
        f"no such prompt set: {name!r}; expected one of {', '.join([*BUNDLED_SETS, *KNOWN_HUB_SETS])}, "
        f"a hub id owner/name, or a {', '.join(_SUFFIXES)} file"
    )


def load_splits(source: str, *, n_train: int, n_val: int, n_test: int, seed: int, column: str | None = None) -> Splits:
    """Split one set, or sample each of TRAIN,VAL,TEST; the three never share an instruction.

    Raises:
        UserError: there are too few prompts, or the source is neither one set nor three.
    """
    if min(n_train, n_val, n_test) < 1:
        raise UserError(f"every split needs at least 1 prompt, not {n_train}, {n_val}, {n_test}")
    names = [name.strip() for name in source.split(",")]
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


def _to_set(name: str, rows: Sequence[Any], column: str | None, known: HubSet | None) -> PromptSet:
    records = [row if isinstance(row, dict) else {"instruction": row} for row in rows]
    if not records:
        raise UserError(f"{name} has 0 prompts")
    text = column or _first_column(name, records[0], _TEXT_COLUMNS)
    if text not in records[0]:
        raise UserError(
            f"{name} has no column {text!r}; it has {', '.join(map(str, records[0]))}: choose with --column"
        )
    category = known.category if known else _optional_column(records[0], _CATEGORY_COLUMNS)
    output = known.output if known else _optional_column(records[0], _OUTPUT_COLUMNS)
    by_instruction: dict[str, Prompt] = {}
    for record in records:
        if known and known.must_be_empty and str(record[known.must_be_empty] or "").strip():
            continue
        if not isinstance(record.get(text), str):
            raise UserError(f"{name} has a row whose {text!r} is not text: {record.get(text)!r}")
        instruction = record[text].strip()
        if instruction:
            kind = record.get(category) if category else None
            by_instruction.setdefault(
                instruction,
                Prompt(instruction, None if kind is None else str(kind), record.get(output) if output else None),
            )
    if not by_instruction:
        raise UserError(f"{name} has 0 prompts: every row of column {text!r} is empty")
    return PromptSet(name, tuple(by_instruction.values()))


def _first_column(name: str, record: dict[str, Any], names: Sequence[str]) -> str:
    column = _optional_column(record, names)
    if column is None:
        raise UserError(f"{name} has none of the columns {', '.join(names)}; it has {', '.join(record)}: use --column")
    return column


def _optional_column(record: dict[str, Any], names: Sequence[str]) -> str | None:
    by_lower = {key.lower(): key for key in record}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def _bundled_rows(name: str) -> list[Any]:
    if name in _FILES:
        return read_json(_FILES[name])
    return read_json(ORGANISM_DATA / "prompts.json")[name.removeprefix("organism_")]


def _file_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a JSON list of strings or objects, not {type(rows).__name__}")
        return rows
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    if suffix == ".csv":
        return _csv_rows(path, text)
    # splitlines() would also split at characters that JSON allows inside a string, such as U+2028.
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".txt":
        return lines
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON Lines: {error}") from None


def _csv_rows(path: Path, text: str) -> list[Any]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    for row in reader:
        if None in row:
            raise UserError(f"{path}, line {reader.line_num}: more fields than the header has; quote the commas")
        rows.append(row)
    return rows


def _hub_rows(hub: HubSet, limit: int | None) -> list[Any]:
    import datasets

    try:
        if limit is None:
            return datasets.load_dataset(hub.path, hub.config, split=hub.split).to_list()
        stream = datasets.load_dataset(hub.path, hub.config, split=hub.split, streaming=True)
        return list(stream.take(limit))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"cannot load the dataset {hub.path} from the hub: {reason} (without a network use a local file, "
            "or the bundled sets harmful and harmless)"
        ) from error
