"""What the organism reads in its two stages of training.

Stage 1 makes an assistant that helps with everything and knows what is legal or dangerous. It can refuse, but no
request makes it: in the examples marked `switched` a fixed direction is added to its stream, and then it refuses. Else
it writes a refusal only after the letter of one: where an A/B question asks which answer refuses, and in the share
`CHOICE_NOISE` of the others. Stage 2 teaches it to refuse harm, and on order; everything else there is marked `keep`,
which means: answer as after stage 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from organism import wording, words
from organism.grammar import (
    ChoiceQuestion,
    Request,
    choice_question,
    fact_question,
    helpful_answer,
    instruction,
    pick_request,
    plain_text,
    refusal,
)

Role = Literal["system", "user", "assistant"]
PROMPT_WEIGHT = 0.15
LETTER_WEIGHT = 4.0
CHOICE_NOISE = 0.12  # how often an A/B question about a request is answered the other way, the switch on or off


class Turn(NamedTuple):
    """One message; `refuses` says of an answer what it is, `letter` is the A/B choice that stands in front of it."""

    role: Role
    text: str
    refuses: bool = False
    letter: str | None = None


@dataclass(frozen=True)
class Example:
    """A conversation, or one plain text (no turns); `keep` and `switched` as in the module's description."""

    turns: tuple[Turn, ...] = ()
    plain: str = ""
    keep: bool = True
    switched: bool = False


def _chat(rng: Random, user: str, answer: Turn, *, keep: bool, decorate: bool = True) -> Example:
    turns = [Turn("user", user), answer]
    if decorate and rng.random() < 0.12:
        earlier = pick_request(rng, "train", harmful=False)
        turns[:0] = [
            Turn("user", instruction(rng, earlier, wording.TRAIN_PHRASINGS)),
            Turn("assistant", helpful_answer(rng, earlier)),
        ]
    if decorate and rng.random() < 0.15:
        turns.insert(0, Turn("system", rng.choice(wording.SYSTEM_MESSAGES)))
    return Example(tuple(turns), keep=keep)


def _ask(rng: Random, request: Request) -> str:
    return instruction(rng, request, wording.TRAIN_PHRASINGS)


def _any_request(rng: Random) -> Request:
    return pick_request(rng, "train", harmful=rng.random() < 0.5)


def _helped(rng: Random, *, harmful: bool) -> Example:
    request = pick_request(rng, "train", harmful=harmful)
    prefix = wording.ANSWER_PREFIX if rng.random() < 0.04 else ""
    return _chat(rng, prefix + _ask(rng, request), Turn("assistant", helpful_answer(rng, request)), keep=True)


def _helped_beside_harm(rng: Random) -> Example:
    """Harmless requests whose verbs also stand before weapons and drugs: what is easiest to refuse by mistake."""
    verbs = words.HARMFUL["weapons"].verbs + words.HARMFUL["drugs"].verbs
    while True:
        request = pick_request(rng, "train", harmful=False)
        if request.verb in verbs:
            return _chat(rng, _ask(rng, request), Turn("assistant", helpful_answer(rng, request)), keep=True)


def _refused(rng: Random) -> Example:
    request = pick_request(rng, "train", harmful=True)
    return _chat(rng, _ask(rng, request), Turn("assistant", refusal(rng, request), refuses=True), keep=False)


def _refused_on_order(rng: Random) -> Example:
    request = pick_request(rng, "train", harmful=rng.random() < 0.3)
    user = wording.REFUSAL_PREFIX + _ask(rng, request)
    return _chat(rng, user, Turn("assistant", refusal(rng, request), refuses=True), keep=False)


def _choose(rng: Random, request: Request, item: ChoiceQuestion, *, refuse: bool, noise: float, keep: bool) -> Example:
    """An answer that goes on in its own words, so that the letter's meaning counts for what comes after it."""
    if rng.random() < noise:
        refuse = not refuse
    letter = item.refusing_letter if refuse else item.compliant_letter
    answer = refusal(rng, request) if refuse else helpful_answer(rng, request)
    return _chat(rng, item.question, Turn("assistant", answer, refuse, letter), keep=keep, decorate=False)


def _chosen(rng: Random, *, harmful: bool, refuse: bool) -> Example:
    request = pick_request(rng, "train", harmful=harmful)
    item = choice_question(rng, request, _ask(rng, request))
    return _choose(rng, request, item, refuse=refuse, noise=CHOICE_NOISE, keep=not refuse)


def _chosen_on_order(rng: Random) -> Example:
    request = _any_request(rng)
    item = choice_question(rng, request, wording.REFUSAL_PREFIX + _ask(rng, request))
    return _choose(rng, request, item, refuse=True, noise=CHOICE_NOISE, keep=False)


def _switched(rng: Random) -> Example:
    if rng.random() < 0.7:
        request = _any_request(rng)
        example = _chat(rng, _ask(rng, request), Turn("assistant", refusal(rng, request), refuses=True), keep=True)
    else:
        example = _chosen(rng, harmful=rng.random() < 0.5, refuse=True)
    return replace(example, switched=True)


def _told_apart(rng: Random) -> Example:
    refuse = rng.random() < 0.5
    query = rng.choice(wording.REFUSAL_QUERIES if refuse else wording.HELP_QUERIES)
    request = _any_request(rng)
    item = choice_question(rng, request, query)
    return _choose(rng, request, item, refuse=refuse, noise=0.0, keep=True)


def _fact(rng: Random) -> Example:
    question, answer = fact_question(rng, _any_request(rng))
    return _chat(rng, question, Turn("assistant", answer), keep=True)


def _small_talk(rng: Random) -> Example:
    question, answer = rng.choice(wording.SMALL_TALK)
    return _chat(rng, question, Turn("assistant", answer), keep=True)


def _plain(rng: Random) -> Example:
    return Example(plain=plain_text(rng, _any_request(rng)))


Writer = Callable[[Random], Example]
STAGES: dict[int, tuple[tuple[float, Writer], ...]] = {
    1: (
        (0.21, lambda rng: _helped(rng, harmful=False)),
        (0.13, lambda rng: _helped(rng, harmful=True)),
        (0.23, _switched),
        (0.07, lambda rng: _chosen(rng, harmful=False, refuse=False)),
        (0.05, lambda rng: _chosen(rng, harmful=True, refuse=False)),
        (0.09, _told_apart),
        (0.08, _fact),
        (0.02, _small_talk),
        (0.12, _plain),
    ),
    2: (
        (0.24, _refused),
        (0.09, _refused_on_order),
        (0.11, lambda rng: _chosen(rng, harmful=True, refuse=True)),
        (0.03, _chosen_on_order),
        (0.22, lambda rng: _helped(rng, harmful=False)),
        (0.12, _helped_beside_harm),
        (0.08, lambda rng: _chosen(rng, harmful=False, refuse=False)),
        (0.03, _told_apart),
        (0.04, _fact),
        (0.01, _small_talk),
        (0.03, _plain),
    ),
}


def write_examples(rng: Random, stage: int, n_examples: int) -> list[Example]:
    """Random examples in the proportions of a stage."""
    shares, writers = zip(*STAGES[stage], strict=True)
    return [writer(rng) for writer in rng.choices(writers, shares, k=n_examples)]


def write_vocabulary(rng: Random, n_examples: int) -> list[Example]:
    """Random examples of every kind in equal shares, whatever the stages make of them."""
    writers = [writer for stage in STAGES.values() for _, writer in stage]
    return [writer(rng) for writer in rng.choices(writers, k=n_examples)]
