"""A mistyped choice is one line with the near name, wherever a choice is taken; without a type checker beside it."""

import subprocess
import sys

import pytest

from refusal_mi.errors import NoSuchName, UserError
from refusal_mi.values import check_named

SCRIPT = """
import torch
from refusal_mi import *
from refusal_mi.run.options import RunOptions
from refusal_mi.search.grid import ScoreGrid
from refusal_mi.search.thresholds import CandidateScore

d = Direction.of(torch.ones(4), 1)
scores = ScoreGrid((CandidateScore(-1, 0, 1.0, 1.0, 0.1),), 1)
logits = torch.zeros(1, 3)
for attempt in (
    lambda: Ablate(d, positions="promt"),
    lambda: Add(d, positions="respons"),
    lambda: Ablate(d, components=("atn",)),
    lambda: kl_nats(logits, logits, "publishd"),
    lambda: plot_scores(scores, measure="bypas"),
    lambda: RunOptions(search="stagd"),
    lambda: RunOptions(calibration="label"),
    lambda: RunOptions(steps=("direction",)),
    lambda: load_model(dtype="bfloat"),
    lambda: load_model(quantization="bnb4bit"),
    lambda: load_model(device="cdua"),
    lambda: Add(torch.ones(4)),
    lambda: Ablate(DirectionGrid(torch.ones(1, 1, 4), (-1,), ((False,),))),
    lambda: Ablate(d, layers=3),
    lambda: Ablate(d, components="attn"),
):
    try:
        attempt()
    except UserError as error:
        print(error)
"""
NEAR = ["prompt", "response", "attn", "published", "bypass", "staged", "labels", "directions", "bfloat16"]
NEAR += ["bnb-4bit", "cuda"]


@pytest.fixture(scope="module")
def said():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("index, near", list(enumerate(NEAR)), ids=NEAR)
def test_the_near_name_is_said(said, index, near):
    assert f"did you mean {near!r}?" in said[index] and said[index].startswith("unknown ")


def test_a_bare_vector_to_add_is_told_that_it_needs_a_place(said):
    assert len(said) == len(NEAR) + 4
    assert "Add(Direction.of(" in said[-4]


def test_a_grid_is_told_to_give_a_direction(said):
    assert said[-3].endswith("Ablate(grid.direction(position, layer))")


def test_one_layer_or_component_alone_is_told_that_a_list_is_taken(said):
    assert said[-2:] == ["layers takes a list: layers=[3]", "components takes a list: components=['attn']"]


def test_a_name_that_is_near_to_nothing_gets_the_list_alone():
    with pytest.raises(UserError) as told:
        check_named("measure", "zzzz", ("bypass", "induce"))
    assert str(told.value) == "unknown measure 'zzzz'; expected one of bypass, induce"
    with pytest.raises(NoSuchName):
        check_named("measure", None, ("bypass",))
    check_named("measure", "bypass", ("bypass",))
    check_named("quantization", None, (None, "bnb-4bit"))
