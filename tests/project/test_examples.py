"""The examples in docstrings run and give what they say."""

import doctest
import inspect
from importlib import import_module

import pytest
import torch

import refusal_mi
from refusal_mi.analysis import KINDS, compare_directions
from refusal_mi.judges import agreement, evade, strongreject
from refusal_mi.search.grid import ScoreGrid
from refusal_mi.search.thresholds import CandidateScore
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.runs import make_scores

ROOMS = ("directions", "generation", "interventions", "judges.substring", "labels", "measures", "reading", "stats")
ROOMS += ("vectors", "figures.scores", "figures.save", "export.export", "model.loading", "recipes.combinations")
ROOMS += ("conditional", "judges.agreement", "judges.evade", "judges.named", "judges.strongreject")
ROOMS += tuple(f"analysis.{name}" for name in ("result", *KINDS))
ROOMS += tuple(f"estimators.{name}" for name in ("erasure", "linear", "location", "named", "pools", "samples"))
ROOMS += tuple(f"search.{name}" for name in ("grid", "sweep", "thresholds"))
ROOMS += tuple(f"text.{name}" for name in ("chat", "given", "prompts"))
WITHOUT = {
    "discover_refusal_tokens": "needs a model that refuses: docs/python.md",
    "orthogonalize_": "changes the model that it is given: docs/export.md",
}
"""Public functions of these rooms without an example, and why."""


def examples():
    found = doctest.DocTestFinder(exclude_empty=True)
    for room in ROOMS:
        module = import_module(f"refusal_mi.{room}")
        for test in found.find(module, f"refusal_mi.{room}"):
            if test.examples:
                yield test


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def names(tiny_model):
    """What the examples speak of."""
    model = tiny_model("llama")
    chat = refusal_mi.ChatFormat(model.tokenizer)
    means, other = (refusal_mi.mean_activations(model, chat, side) for side in (ASKS, CHATS))
    own = {"model": model, "chat": chat, "direction": random_direction(layer=2), "other": random_direction(1, layer=3)}
    own |= {"harmful": list(ASKS), "harmless": list(CHATS), "scores": make_scores()}
    samples, other_samples = (refusal_mi.sample_activations(model, chat, side) for side in (ASKS, CHATS))
    own |= {"samples": samples, "other_samples": other_samples}
    own |= {"means": means, "other_means": other, "grid": refusal_mi.difference_in_means(means, other)}
    public = {name: getattr(refusal_mi, name) for name in refusal_mi.__all__}
    values = {"torch": torch, "pytest": pytest, "ScoreGrid": ScoreGrid, "CandidateScore": CandidateScore}
    values |= {"cosine": import_module("refusal_mi.directions").cosine, "reason": evade.reason}
    values |= {"score": strongreject.score, "agreement": agreement.agreement, "cohen_kappa": agreement.cohen_kappa}
    own |= {"compare_directions": compare_directions}
    return public | values | own


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name.removeprefix("refusal_mi."))
def test_an_example_gives_what_it_says(test, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test.globs = {**test.globs, **names}  # what its own module has beside what is public
    result = doctest.DocTestRunner().run(test)
    assert result.attempted and not result.failed, capsys.readouterr().out


def test_every_public_function_of_these_rooms_has_one():
    have = {test.name.rsplit(".", 1)[-1] for test in EXAMPLES}
    modules = {f"refusal_mi.{room}" for room in ROOMS}
    public = {name: getattr(refusal_mi, name) for name in refusal_mi.__all__}
    functions = {name for name, each in public.items() if inspect.isfunction(each) and each.__module__ in modules}
    assert functions - have == set(WITHOUT) & functions


def test_a_wrong_example_is_seen(names):
    text = ">>> is_refusal('I cannot help with that.')\nFalse\n"
    test = doctest.DocTestParser().get_doctest(text, dict(names), "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
