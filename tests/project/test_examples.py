"""The examples in docstrings run and give what they say."""

import doctest
import inspect
from importlib import import_module

import pytest
import torch

import refusal_mi
from refusal_mi.analysis import KINDS, compare_directions
from refusal_mi.analysis.result import AnalysisResult
from refusal_mi.audit.compare import audit
from refusal_mi.estimators.rdo import RDOOptions
from refusal_mi.export.export import export_adapter
from refusal_mi.judges import agreement, evade, strongreject
from refusal_mi.measures import ABPoint
from refusal_mi.search.grid import ScoreGrid
from refusal_mi.search.thresholds import CandidateScore
from refusal_mi.text.pairs import load_pairs
from tests.helpers.cases import analyses
from tests.helpers.directions import random_direction
from tests.helpers.figures import worded
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.rdo import made_up_texts
from tests.helpers.runs import finished_run, make_scores

ROOMS = ("directions", "generation", "interventions", "judges.substring", "labels", "measures", "reading", "stats")
ROOMS += ("vectors", "export.export", "model.loading", "model.running", "recipes.combinations", "errors", "loaded")
FIGURES = ("audit", "effects", "labels", "localize", "methods", "scores", "save", "variants")
ROOMS += tuple(f"figures.{name}" for name in FIGURES)
ROOMS += ("conditional", "judges.protocol", "judges.agreement", "judges.evade", "judges.named", "judges.strongreject")
ROOMS += tuple(f"analysis.{name}" for name in ("result", *KINDS))
ESTIMATORS = ("cones", "descent", "erasure", "linear", "location", "named", "pools", "rdo", "repind", "samples")
SEARCH = ("cones", "cosmic", "grid", "localize", "methods", "removals", "staged", "sweep", "thresholds")
ROOMS += tuple(f"estimators.{name}" for name in ESTIMATORS) + tuple(f"search.{name}" for name in SEARCH)
ROOMS += tuple(f"text.{name}" for name in ("chat", "given", "pairs", "prompts", "variants"))
ROOMS += ("audit.compare", "audit.result", "export.adapter", "export.formats", "run.answers", "run.folder")
WHOLE = ("loaded",)
"""Rooms all of whose public names are for users."""
WITHOUT = {
    "discover_refusal_tokens": "needs a model that refuses: docs/python.md",
    "plot_cost": "draws what compare-methods takes minutes for: docs/one-or-several.md",
    "plot_ratios": "as plot_cost",
    "plot_beside": "as plot_cost",
    "orthogonalize_": "changes the model that it is given: docs/export.md",
}
"""Public names of these rooms without an example, and why."""


def examples():
    found = doctest.DocTestFinder(exclude_empty=True)
    for room in ROOMS:
        module = import_module(f"refusal_mi.{room}")
        for test in found.find(module, f"refusal_mi.{room}"):
            if test.examples:
                yield test


EXAMPLES = list(examples())


def own_result(room, names):
    """`found`, in the module of an analysis: what its function gives."""
    kind = room.rsplit(".", 1)[-1]
    makers = names["analyses"] if room.startswith("refusal_mi.analysis.") else {}
    if kind in makers and kind not in names["results"]:
        names["results"][kind] = makers[kind]()
    return {"found": names["results"][kind]} if kind in makers else {}


@pytest.fixture(scope="module")
def names(tiny_model, tiny_dir, tmp_path_factory):
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
    values = {
        "torch": torch,
        "pytest": pytest,
        "ScoreGrid": ScoreGrid,
        "CandidateScore": CandidateScore,
        "ABPoint": ABPoint,
    }
    values |= {"cosine": import_module("refusal_mi.directions").cosine, "reason": evade.reason}
    values |= {"score": strongreject.score, "agreement": agreement.agreement, "cohen_kappa": agreement.cohen_kappa}
    own |= {"compare_directions": compare_directions, "analyses": analyses(model), "results": {}}
    own |= {"run": refusal_mi.load_run(finished_run(tmp_path_factory.mktemp("run"))), "base": tiny_dir("llama")}
    own |= {"texts": made_up_texts(model.tokenizer), "worded": worded()}
    edited = tmp_path_factory.mktemp("edited") / "model"
    refusal_mi.export_checkpoint(own["base"], refusal_mi.Ablate(own["direction"]), edited, verify="none")
    own |= {"edited": edited, "audit": audit, "RDOOptions": RDOOptions, "load_pairs": load_pairs}
    own |= {"export_adapter": export_adapter}
    return public | values | own


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name.removeprefix("refusal_mi."))
def test_an_example_gives_what_it_says(test, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = own_result(test.globs["__name__"], names)
    test.globs = {**test.globs, **names, **own}  # what its own module has beside what is public
    result = doctest.DocTestRunner().run(test)
    assert result.attempted and not result.failed, capsys.readouterr().out


def shown():
    """The functions and classes that must have an example, by full name without the package's."""
    found = {each for name in refusal_mi.__all__ if callable(each := getattr(refusal_mi, name))}
    for room in ROOMS:
        for name, each in vars(import_module(f"refusal_mi.{room}")).items():
            is_result = inspect.isclass(each) and issubclass(each, AnalysisResult)
            if name.startswith("plot_") or is_result or (room in WHOLE and not name.startswith("_")):
                found.add(each)
    found = {each for each in found if inspect.isfunction(each) or inspect.isclass(each)}
    homes = {f"refusal_mi.{room}" for room in ROOMS}
    return {f"{each.__module__}.{each.__name__}" for each in found if each.__module__ in homes}


def test_whatever_is_public_has_one():
    have = {test.name for test in EXAMPLES}
    lacking = {name.removeprefix("refusal_mi.") for name in shown() - have}
    assert {name.rsplit(".", 1)[-1] for name in lacking} == set(WITHOUT)


def test_a_wrong_example_is_seen(names):
    text = ">>> is_refusal('I cannot help with that.')\nFalse\n"
    test = doctest.DocTestParser().get_doctest(text, dict(names), "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
