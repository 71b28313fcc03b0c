"""Cohen's κ: the definition, scikit-learn's, prompts drawn together; what two judges say of the same answers."""

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from refusal_mi.files import read_record, write_record
from refusal_mi.judges.agreement import N_WORDS, Agreement, agreement, cohen_kappa, first_words
from refusal_mi.judges.evade import EvadeJudge
from refusal_mi.judges.substring import SubstringJudge


def labelled(n: int, agree: float, seed: int) -> tuple[list[str], list[str]]:
    """Labels of two judges of which the second follows the first so often."""
    draw = random.Random(seed)
    first = [draw.choices(["refuse", "evade", "comply"], [5, 1, 4])[0] for _ in range(n)]
    return first, [each if draw.random() < agree else draw.choice(["refuse", "evade", "comply"]) for each in first]


def test_kappa_by_hand():
    """p_o = .7, p_e = .5·.6 + .5·.4 = .5: κ = .4 (50 answers, table 20 5 / 10 15)."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert found.value == pytest.approx(0.4, abs=1e-12) and found.agreed == pytest.approx(0.7)
    assert found.low < 0.4 < found.high and (found.low, found.high) == pytest.approx((0.15, 0.65), abs=0.06)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("agree", [0.0, 0.5, 0.95])
def test_kappa_is_scikit_learns(seed, agree):
    first, second = labelled(60, agree, seed)
    assert cohen_kappa(first, second).value == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_guessing_is_nothing_and_agreement_all():
    first, _ = labelled(300, 1.0, 0)
    shuffled = random.Random(1).sample(first, len(first))
    guessed, same = cohen_kappa(first, shuffled), cohen_kappa(first, first)
    assert guessed.low < 0 < guessed.high and guessed.agreed > 0.3
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_answers_to_one_prompt_are_drawn_together():
    """Four copies of every answer tell nothing new: with their groups the interval stays, without it would shrink."""
    first, second = labelled(50, 0.6, 3)
    alone = cohen_kappa(first, second)
    copies = [each * 4 for each in (first, second, list(range(50)))]
    grouped, apart = cohen_kappa(*copies), cohen_kappa(*copies[:2])
    assert (grouped.value, grouped.low, grouped.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-12)
    assert apart.value == pytest.approx(alone.value) and apart.high - apart.low < 0.7 * (alone.high - alone.low)


def test_kappa_without_a_meaning_is_none_and_bad_input_refused():
    assert cohen_kappa(["a"] * 3, ["a"] * 3).value is None and "undefined" in str(cohen_kappa(["a"], ["a"]))
    assert cohen_kappa(["a"], ["b"]).low is None
    for pair in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="as many of both"):
            cohen_kappa(*pair)


ANSWERS = [
    "I cannot help with that.",
    "Let's talk about tea instead.",
    "Lima.",
    "That's not something I can do.",
    "Ten.",
]


def test_pairs_of_judges(tmp_path):
    prompts = [f"p{index}" for index, _ in enumerate(ANSWERS)]
    said = {
        "phrases": SubstringJudge()(ANSWERS),
        "rules": EvadeJudge()(ANSWERS, prompts),
        "odd": ["refuse", "refuse", None, "refuse", "comply"],
    }
    found = agreement(said, prompts, ANSWERS)
    assert found.unread == {"phrases": 0, "rules": 0, "odd": 1} and (found.n_answers, found.n_prompts) == (5, 5)
    by_name = {(pair.first, pair.second): pair for pair in found.pairs}
    assert list(by_name) == [("phrases", "rules"), ("phrases", "odd"), ("rules", "odd")]
    two, three = by_name["phrases", "rules"], by_name["rules", "odd"]
    assert two.classes is None and two.complied.n == 5
    assert two.counts == {"complied": {"complied": 2, "not complied": 2}, "not complied": {"not complied": 1}}
    assert [each.begins for each in two.differences] == [ANSWERS[1], "That's not something I can do."]
    assert three.classes is not None and three.classes.n == three.complied.n == 4
    assert three.counts == {"comply": {"comply": 1}, "evade": {"refuse": 1}, "refuse": {"refuse": 2}}
    assert three.complied.value == 1.0 > three.classes.value  # an evasion is no compliance either way
    with pytest.raises(ValueError, match="one verdict for each answer"):
        agreement({**said, "odd": ["refuse"]}, prompts, ANSWERS)
    write_record(tmp_path / "agreement.json", found)
    assert read_record(tmp_path / "agreement.json", Agreement) == found


def test_of_an_answer_the_first_words_are_shown_and_no_more():
    text = "one two three four five six seven " + "x" * 500
    assert first_words(text) == "one two three four five six …" and len(first_words(text).split()) == N_WORDS + 1
    assert first_words("short") == "short" and len(first_words("x" * 500)) == 20
