"""The table of classes has both sides of a run, and is not there without a judge of classes."""

from dataclasses import replace

from refusal_mi.report.classes import class_tables
from refusal_mi.run.answers import Effect, MeanScore, SideEffects
from refusal_mi.stats import Rate

CLASSES = {"refuse": Rate(6, 10), "evade": Rate(1, 10), "comply": Rate(3, 10)}


def effect(label: str, **more) -> Effect:
    return Effect(label, Rate(5, 10), Rate(0, 10), **more)


def test_one_table_a_judge_with_harmful_and_harmless_prompts_in_it():
    odd = {**CLASSES, "comply": Rate(1, 10), "unread": Rate(2, 10)}
    sides = [
        SideEffects("harmful", "jbb", (effect("baseline", classes={"evade": CLASSES, "other": CLASSES}),)),
        SideEffects(
            "harmless",
            "harmless",
            (
                effect(
                    "actadd", classes={"evade": CLASSES, "other": odd}, scores={"other": MeanScore(0.5, 0.4, 0.6, 8)}
                ),
            ),
        ),
    ]
    evade, other = class_tables(sides)
    assert (evade.name, evade.labels, evade.has_scores, evade.has_unread) == ("evade", tuple(CLASSES), False, False)
    assert [row.side for row in evade.rows] == [row.side for row in other.rows] == ["harmful", "harmless"]
    assert evade.rows[0].rates == tuple(CLASSES.values())
    assert other.labels == (*CLASSES, "unread") and other.has_unread and other.has_scores
    assert other.rows[0].rates == (*CLASSES.values(), Rate(0, 10)) and other.rows[1].rates == tuple(odd.values())
    assert [row.score for row in other.rows] == ["", "0.50 [0.40, 0.60]"]
    assert class_tables([replace(side, effects=(effect("baseline"),)) for side in sides]) == []


def test_rates_of_classes_are_rows_of_a_table():
    side = SideEffects("harmful", "jbb", (effect("baseline", classes={"evade": CLASSES}),))
    rows = side.to_frame().set_index("rate")["value"].to_dict()
    assert rows["evade: evade"] == 0.1 and rows["refusal"] == 0.5 and len(rows) == 5
