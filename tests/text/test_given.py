"""Whatever one has goes in as prompts, and comes out as the same texts; what is none is one line."""

import datasets
import numpy
import pandas
import pytest

from refusal_mi.errors import UserError
from refusal_mi.text.given import as_conversations, as_groups, as_prompt, as_prompts
from refusal_mi.text.prompts import Prompt, PromptSet

TEXTS = ["Why?", "Name three colors", "Why?"]
TABLE = pandas.DataFrame({"n": [1, 2, 3], "prompt": TEXTS})
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


class Polars:
    """A column as polars has it, which has no list's methods but an iterator."""

    def __iter__(self):
        return iter(TEXTS)


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        numpy.array(TEXTS),
        TABLE["prompt"],
        TABLE["prompt"].astype("category"),
        datasets.Dataset.from_pandas(TABLE)["prompt"],
        Polars(),
        [Prompt(text, "kind") for text in TEXTS],
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_kind_of_column_gives_its_texts_in_order(given):
    assert as_prompts(given) == TEXTS
    assert all(type(text) is str for text in as_prompts([numpy.str_("a")]))


def test_a_string_is_one_prompt_and_not_its_letters():
    assert as_prompts("Why?") == ["Why?"] == as_prompts(["Why?"])
    assert list("Why?") != ["Why?"]  # what a loop over it gives
    assert as_prompt("Why?") == as_prompt(["Why?"]) == "Why?"


@pytest.mark.parametrize(
    "given, said",
    [
        (TABLE, r"a table with the columns 'n', 'prompt' was given; give one of them: table\['n'\]"),
        (datasets.Dataset.from_pandas(TABLE), "a table with the columns"),
        ({"harmful": TEXTS}, "not texts by name"),
        ({"Why?"}, "a set, which has no order"),
        (b"Why?", "not bytes"),
        (None, "not NoneType"),
        (3, "not int"),
        (numpy.array("Why?"), "ndarray is no list of texts"),
        (pandas.Series(["Why?", None]), "number 1 is no text but"),
        (["Why?", 3], "number 1 is no text but int 3"),
        (TABLE["n"], "number 0 is no text but int"),
    ],
    ids=range(11),
)
def test_what_is_no_prompts_is_one_line(given, said):
    with pytest.raises(UserError, match=said):
        as_prompts(given)


def test_one_conversation_may_stand_alone():
    assert as_conversations(MESSAGES) == [MESSAGES] == as_conversations([MESSAGES])
    assert as_conversations(["Why?", MESSAGES]) == ["Why?", MESSAGES]
    assert as_conversations("Why?") == ["Why?"]
    with pytest.raises(UserError, match="number 1 is no text but dict"):
        as_conversations(["Why?", {"role": "user"}])


def test_prompts_without_a_name_are_one_group():
    assert as_groups("Why?") == {"prompts": ["Why?"]}
    assert as_groups(PromptSet("mine", (Prompt("a"),))) == {"mine": ["a"]} == as_groups({"mine": "a"})
    assert as_groups(TABLE["prompt"].rename("questions")) == {"questions": TEXTS}
    with pytest.raises(UserError, match="the prompts of group 'mine': number 0"):
        as_groups({"mine": [1]})
    with pytest.raises(UserError, match="expected one prompt, not 3"):
        as_prompt(TEXTS)


def test_a_prompt_set_is_a_sequence_of_its_texts():
    found = PromptSet.from_list([*TEXTS, "Count"], name="mine")
    assert list(found) == [*found] == found.instructions == ["Why?", "Name three colors", "Count"]  # repeated once
    assert found[0] == "Why?" and found[-1] == "Count" and "Count" in found and found.index("Count") == 2
    assert isinstance(found[1:], PromptSet) and found[1:].instructions == found.instructions[1:]
    assert found[:2].name == "mine" and len(found[::2]) == 2 and as_prompts(found[1:]) == found.instructions[1:]
    assert found == PromptSet.from_list(found, "mine") and hash(found) == hash(found[:])
    assert found != found[:2]
    assert repr(found) == "PromptSet('mine', 3 prompts, the first 'Why?')"
    with pytest.raises(IndexError):
        found[3]


def test_from_list_keeps_categories_and_takes_columns():
    kept = PromptSet.from_list([Prompt("a", "kind", "answer"), Prompt("b"), Prompt("a", "other")])
    assert kept.prompts == (Prompt("a", "kind", "answer"), Prompt("b"))
    assert PromptSet.from_list(TABLE["prompt"]).instructions == TEXTS[:2]
    assert PromptSet.from_list("Why?").instructions == ["Why?"]
    with pytest.raises(UserError, match="mine has 0 prompts"):
        PromptSet.from_list([], "mine")
