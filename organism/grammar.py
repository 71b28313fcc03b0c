"""The organism's language: requests, helpful answers, refusals, A/B questions and plain sentences.

A request is a (verb, object) pair in a phrasing. Whole pairs and whole phrasings are held out for validation and
test, every verb and every object of a held-out pair occurs in training pairs, and the division of the pairs is
fixed: it does not depend on any training seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from organism import wording, words

Split = Literal["train", "val", "test"]

PHRASINGS: dict[Split, tuple[str, ...]] = {
    "train": wording.TRAIN_PHRASINGS,
    "val": wording.VAL_PHRASINGS,
    "test": wording.TEST_PHRASINGS,
}
_SPLIT_SEED = 2024
_VAL_SHARE, _TEST_SHARE = 0.07, 0.18


@dataclass(frozen=True)
class Request:
    """What somebody wants to do: a verb, its object, and the category of harm (None if harmless)."""

    verb: str
    object: str
    category: str | None

    @property
    def action(self) -> str:
        """The request as a verb phrase, such as "repair a camera"."""
        return f"{self.verb} {self.object}"

    @property
    def harmful(self) -> bool:
        """Whether a refusal is the right answer."""
        return self.category is not None

    def fill(self, pattern: str, *, name: str = "") -> str:
        """The pattern with this request's words in its slots."""
        capital = self.action[0].upper() + self.action[1:]
        return pattern.format(action=self.action, Action=capital, object=self.object, name=name)


@dataclass(frozen=True)
class ChoiceQuestion:
    """An A/B question in the format of contrastive activation addition, with the texts behind its letters."""

    question: str
    refusing_letter: Literal["A", "B"]
    options: tuple[str, str]

    @property
    def compliant_letter(self) -> Literal["A", "B"]:
        """The letter that the refusal does not stand behind."""
        return "B" if self.refusing_letter == "A" else "A"

    def option(self, letter: Literal["A", "B"]) -> str:
        """The text behind a letter."""
        return self.options["AB".index(letter)]


@cache
def _groups(split: Split, harmful: bool) -> tuple[tuple[Request, ...], ...]:
    divided = []
    for name, group in (words.HARMFUL if harmful else words.HARMLESS).items():
        pairs = [Request(v, o, name if harmful else None) for v in group.verbs for o in group.objects]
        Random(f"{_SPLIT_SEED} {name}").shuffle(pairs)
        n_val, n_test = round(_VAL_SHARE * len(pairs)), round(_TEST_SHARE * len(pairs))
        bounds = {"val": (0, n_val), "test": (n_val, n_val + n_test), "train": (n_val + n_test, len(pairs))}
        divided.append(tuple(pairs[slice(*bounds[split])]))
    return tuple(divided)


def requests(split: Split, *, harmful: bool) -> tuple[Request, ...]:
    """All requests of one split, in a fixed order."""
    return tuple(request for group in _groups(split, harmful) for request in group)


def pick_request(rng: Random, split: Split, *, harmful: bool) -> Request:
    """A random request, every group of words equally likely."""
    return rng.choice(rng.choice(_groups(split, harmful)))


def _draw(rng: Random, choice: wording.Choice) -> str:
    return rng.choices(choice.texts, choice.weights)[0]


def instruction(rng: Random, request: Request, phrasings: Sequence[str]) -> str:
    """The request as a user would put it, sometimes with a time or place."""
    action = request.action
    if rng.random() < 0.2:
        action = f"{action} {rng.choice(wording.ADJUNCTS)}"
    return rng.choice(phrasings).format(action=action)


def _answer(rng: Random, request: Request, opening: str, others: list[str]) -> str:
    """The sentences of an answer in order, some with one that fits every answer in front or in between."""
    sentences = [opening, *others]
    if rng.random() < 0.25:
        place = 0 if rng.random() < 0.25 else rng.randint(1, len(sentences))
        sentences.insert(place, rng.choice(wording.SHARED_SENTENCES))
    return " ".join(request.fill(sentence) for sentence in sentences)


def helpful_answer(rng: Random, request: Request) -> str:
    """Generic steps that name the object and nothing else about the request."""
    steps = [rng.choice(options) for options in wording.HELPFUL_STEPS]
    if rng.random() < 0.5:
        del steps[rng.randrange(len(steps))]
    return _answer(rng, request, _draw(rng, wording.HELPFUL_OPENINGS), steps)


def refusal(rng: Random, request: Request) -> str:
    """A refusal in varying words, with reasons that fit the request."""
    opening = f"{_draw(rng, wording.REFUSAL_OPENINGS)} {_draw(rng, wording.REFUSAL_OBJECTS)}"
    reasons = wording.HARM_REASONS if request.harmful and rng.random() < 0.7 else wording.OTHER_REASONS
    others = rng.sample(reasons, rng.randint(1, 2))
    if rng.random() < 0.7:
        others.append(rng.choice(wording.REFUSAL_ENDINGS))
    return _answer(rng, request, opening, others)


def choice_question(
    rng: Random, request: Request, stem: str, *, refusing_letter: Literal["A", "B"] | None = None
) -> ChoiceQuestion:
    """The stem with a refusing and a compliant answer to choose from, the letters balanced unless given."""
    letters: tuple[Literal["A"], Literal["B"]] = ("A", "B")
    letter: Literal["A", "B"] = refusing_letter if refusing_letter is not None else rng.choice(letters)
    refusing = request.fill(rng.choice(wording.REFUSING_OPTIONS))
    compliant = request.fill(rng.choice(wording.COMPLIANT_OPTIONS))
    options = (refusing, compliant) if letter == "A" else (compliant, refusing)
    question = f"{stem}\n\nChoices:\n(A) {options[0]}\n(B) {options[1]}"
    return ChoiceQuestion(question, letter, options)


def plain_text(rng: Random, request: Request) -> str:
    """One to three sentences outside any chat, some of which say what is legal, safe, dangerous or a crime."""
    name = rng.choice(wording.NAMES)
    judging = wording.HARMFUL_SENTENCES if request.harmful else wording.HARMLESS_SENTENCES
    sentences = [request.fill(rng.choice(wording.NEUTRAL_SENTENCES), name=name)]
    if rng.random() < 0.6:
        sentences.append(request.fill(rng.choice(judging), name=name))
        rng.shuffle(sentences)
    if rng.random() < 0.5:
        sentences.append(request.fill(rng.choice(wording.FOLLOW_UPS), name=name))
    return " ".join(sentences)


def fact_question(rng: Random, request: Request) -> tuple[str, str]:
    """A question about whether an action is legal or dangerous, with its answer; never refused."""
    question, if_harmless, if_harmful = rng.choice(wording.FACT_QUESTIONS)
    return request.fill(question), request.fill(if_harmful if request.harmful else if_harmless)
