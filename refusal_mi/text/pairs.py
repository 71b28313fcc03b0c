"""A/B questions in CAA's schema: reading them, and finding the letter among the tokens."""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import at_home, sha256_json
from .batches import Span
from .chat import ChatFormat
from .prompts import DATA, ORGANISM_DATA
from .tables import is_file_name, read_rows

KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
N_GENERAL_TRAIN = 80
"""The general set's pairs from here on are held out: `caa_test`. The letters are balanced on both sides."""
_FILES = {
    "caa": DATA / "caa_pairs.json",
    "organism_ab": ORGANISM_DATA / "ab_pairs.json",
    "organism_ab_test": ORGANISM_DATA / "ab_pairs_test.json",
}

PAIR_SETS = ("caa", "caa_train", "caa_test", "organism_ab", "organism_ab_test")
"""Names of the sets that ship with the package."""
QUESTION_SETS = {"caa_questions": DATA / "caa_questions.json"}


@dataclass(frozen=True)
class ABPair:
    """A question with two lettered choices, and which of them shows the behavior."""

    question: str
    """With its choices: "...\\n\\nChoices:\\n(A) ...\\n(B) ..."."""
    matching: str
    """"(A)" or "(B)": the answer that shows the behavior, here refusing."""
    not_matching: str

    @property
    def open_question(self) -> str:
        """The question without its choices."""
        return without_choices(self.question)

    def describe(self) -> dict[str, str]:
        """The published keys."""
        return dict(zip(KEYS, (self.question, self.matching, self.not_matching), strict=True))


@dataclass(frozen=True)
class PairSet:
    """Named, ordered A/B pairs.

    Examples:
        >>> one, another = halves(load_pairs("caa_train"))
        >>> len(one), len(another)
        (40, 40)
    """

    name: str
    pairs: tuple[ABPair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        first = f", the first {self.pairs[0].question[:60]!r}" if self.pairs else ""
        return f"PairSet({self.name!r}, {len(self)} pairs{first})"

    @property
    def sha256(self) -> str:
        """Hash of the pairs in order."""
        return sha256_json([[pair.question, pair.matching, pair.not_matching] for pair in self.pairs])


@dataclass(frozen=True)
class LetterSpan:
    """One answered question, and the token that writes the letter."""

    span: Span
    """The letter's token; the text runs to the end of the answer."""
    n_prompt: int
    """Tokens before the answer."""
    is_alone: bool
    """Whether the letter's token covers the letter only, and not its bracket."""


def load_pairs(source: str | Path) -> PairSet:
    """Read A/B pairs by a bundled name or from a file of rows in the published schema (`tables.read_rows`).

    Examples:
        >>> len(load_pairs("caa_train")), load_pairs("caa_train").pairs[0].matching in ("(A)", "(B)")
        (80, True)

    Raises:
        UserError: there is no such set, or an entry lacks a key or has no letter.
    """
    name = str(source)
    if name in ("caa_train", "caa_test"):
        whole = load_pairs("caa").pairs
        return PairSet(name, whole[:N_GENERAL_TRAIN] if name == "caa_train" else whole[N_GENERAL_TRAIN:])
    path = _FILES.get(name, at_home(source))
    if name not in _FILES and not is_file_name(name):
        raise UserError(f"no such pair set: {name!r}; expected one of {', '.join(PAIR_SETS)}, or a file")
    entries = read_rows(path)
    if not entries:
        raise UserError(f"{path} must hold a list of objects with the keys {', '.join(KEYS)}")
    return PairSet(name if name in _FILES else path.stem, tuple(_pair(path, *item) for item in enumerate(entries)))


def halves(pairs: PairSet) -> tuple[PairSet, PairSet]:
    """Two sets without a common pair: half of those of each letter, always the same ones, and the others."""
    chosen = with_flipped_half(pairs.pairs, 0)
    parts = (tuple(p for p, is_in in zip(pairs.pairs, chosen, strict=True) if is_in is side) for side in (True, False))
    first, second = parts
    return PairSet(f"half of {pairs.name}", first), PairSet(f"the other half of {pairs.name}", second)


def load_questions(source: str | Path) -> list[str]:
    """Open questions: of a pair set without the choices, or of any prompt set ("question" is among its columns)."""
    from .prompts import load_prompts

    name = str(source)
    if name in PAIR_SETS:
        return list(dict.fromkeys(pair.open_question for pair in load_pairs(name).pairs))
    questions = load_prompts(QUESTION_SETS.get(name, source)).instructions
    return list(dict.fromkeys(map(without_choices, questions)))


def without_choices(question: str) -> str:
    """What is asked, before "Choices:"."""
    return question.split("\n\nChoices:")[0].strip()


def locate_letter(chat: ChatFormat, question: str, answer: str) -> LetterSpan:
    """Tokens of a templated question and its answer, with the token whose characters cover the letter.

    Raises:
        UserError: the tokenizer cannot say which characters a token covers.
    """
    rendered = chat.render(question)
    place = len(rendered) + _letter_place(answer)
    try:
        encoded = chat.tokenizer(rendered + answer, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise UserError("this tokenizer gives no character offsets; load the fast version of it") from None
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    index = next(i for i, (start, end) in enumerate(offsets) if start <= place < end)
    first = next(i for i, (_, end) in enumerate(offsets) if end > len(rendered))
    covered = (rendered + answer)[slice(*offsets[index])].strip()
    return LetterSpan(Span(tuple(ids), index, index + 1), first, len(covered) == 1)


def with_flipped_half(pairs: Sequence[ABPair], seed: int) -> list[bool]:
    """Which labels to exchange so that they carry nothing: half of those of each letter, at random.

    The letters stay balanced, so that a vector from such labels is no letter vector either.
    """
    by_letter: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_letter[pair.matching].append(index)
    rng = random.Random(seed)
    chosen = {index for group in by_letter.values() for index in rng.sample(group, len(group) // 2)}
    return [index in chosen for index in range(len(pairs))]


def _pair(path: Path, number: int, entry: Any) -> ABPair:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in KEYS):
        raise UserError(f"{path}: entry {number} must be an object with the texts {', '.join(KEYS)}")
    pair = ABPair(entry[KEYS[0]], entry[KEYS[1]].strip(), entry[KEYS[2]].strip())
    try:
        letters = [answer[_letter_place(answer)] for answer in (pair.matching, pair.not_matching)]
    except ValueError as error:
        raise UserError(f"{path}: entry {number}: {error}") from None
    if letters[0] == letters[1]:
        raise UserError(f"{path}: entry {number}: both answers are {letters[0]}")
    return pair


def _letter_place(answer: str) -> int:
    match = re.fullmatch(r"\W*(\w)\W*", answer)
    if match is None:
        raise ValueError(f"an answer is one letter, such as (A), not {answer!r}")
    return match.start(1)
