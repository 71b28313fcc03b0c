"""One syntax of lists: layers, ranks; and the near name of a mistyped choice."""

import pytest

from refusal_mi.errors import UserError
from refusal_mi.options import check_choice, in_words, layer_numbers, position_scope, rank_numbers
from refusal_mi.recipes.combinations import check_multi
from refusal_mi.run.options import read_ranks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", (3,)),
        ("3,5", (3, 5)),
        ("3 5", (3, 5)),
        ("3-7", (3, 4, 5, 6, 7)),
        ("3..7", (3, 4, 5, 6, 7)),
        ("3:8", (3, 4, 5, 6, 7)),
        ("7,3-5,4:6", (3, 4, 5, 7)),
        ("all", None),
        (None, None),
    ],
)
def test_layers(text, expected):
    assert layer_numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", (3,)),
        ("0-2", (0, 2)),
        ("4-0-11", (4, 0, 11)),
        ("0..2", (0, 1, 2)),
        ("0:2", (0, 1)),
        ("2,0", (2, 0)),
        ("0-2,5..6", (0, 2, 5, 6)),
    ],
)
def test_ranks_are_what_the_published_hyphen_says_or_a_range(text, expected):
    assert rank_numbers(text) == read_ranks(text) == expected


@pytest.mark.parametrize(
    "text", ["", ",", "1,,2", "3,", "x", "3-", "-3", "3--5", "3-5-7", "3.5", "1:3:5", "²", "3.. 7", "7-3", "3:3"]
)
def test_what_is_no_list_of_layers(text):
    with pytest.raises(UserError, match=r"^--layers"):
        layer_numbers(text)


@pytest.mark.parametrize("text", ["", "-1", "0-", "a-b", "1-1", "0..2,1", "0-2..4", "2..0", "0..99999999999"])
def test_what_is_no_list_of_ranks(text):
    with pytest.raises(UserError, match=r"^--directions"):
        rank_numbers(text)
    with pytest.raises(UserError, match=r"^--ranks"):
        read_ranks(text)


def test_ranks_in_words_tell_the_hyphen_from_the_range():
    assert in_words(rank_numbers("0-2")) == "ranks 0 and 2"
    assert in_words(rank_numbers("0..2")) == "ranks 0, 1 and 2"
    assert in_words(rank_numbers("7")) == "rank 7"


def test_the_near_name_of_a_mistyped_value():
    for check, typed, near in ((position_scope, "promt", "prompt"), (check_multi, "sequental", "sequential")):
        with pytest.raises(UserError, match=rf"not '{typed}'; did you mean {near}\?"):
            check(typed)
        check(near)
    with pytest.raises(UserError) as told:
        check_choice("--format", "zzzz", ("gguf", "lm-eval"))
    assert str(told.value) == "--format takes gguf or lm-eval, not 'zzzz'"
