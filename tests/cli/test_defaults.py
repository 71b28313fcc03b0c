"""A command without options does what the library does without options: no default is said twice with two values."""

import inspect
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from refusal_mi.analysis import KINDS
from refusal_mi.cli import exit_status
from refusal_mi.cli.study import read_study
from refusal_mi.errors import UserError
from refusal_mi.files import write_json, write_tensors
from refusal_mi.interventions import Ablate, Add
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.recipes.caa_eval import ABTask
from refusal_mi.recipes.combinations import combine
from refusal_mi.recipes.options import EvalOptions, VectorOptions, default_folder, default_options, default_queries
from refusal_mi.run.options import CombosOptions, RunOptions
from refusal_mi.search.thresholds import NO_THRESHOLDS, Thresholds
from refusal_mi.studies.spec import MethodsOptions
from refusal_mi.text.batches import START
from tests.helpers.directions import random_direction
from tests.helpers.runs import make_run, write_head


class Called(BaseException):
    """What was to be seen has been seen."""


@pytest.fixture
def call(tiny_model, tmp_path, monkeypatch):
    """`call(target, *words)`: what a command hands to a function of the library, with that function's own defaults."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("refusal_mi.model.loading.quiet_load", lambda *_, **__: tiny_model("llama"))

    def run(target: str, *words: str) -> inspect.BoundArguments:
        seen, (module, _, name) = [], target.rpartition(".")
        signature = inspect.signature(getattr(import_module(module), name))

        def stand_in(*given, **named):
            seen.append(signature.bind(*given, **named))
            raise Called

        with monkeypatch.context() as patched, pytest.raises(Called):
            patched.setattr(target, stand_in)
            exit_status(list(words))
        folder = seen[0].arguments.get("folder")
        assert folder is None or folder.fresh == ("--fresh" in words)  # without it, finished stages are kept
        return seen[0]

    return run


def differing(bound: inspect.BoundArguments) -> set[str]:
    """Parameters with a default in the library that were given another value."""
    parameters = bound.signature.parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    return {name for name, value in bound.arguments.items() if name in defaults and value != defaults[name]}


@pytest.mark.parametrize("words", [[], ["MODEL"]], ids=["embedded", "another"])
def test_run(call, words, tiny_dir):
    source = [str(tiny_dir("llama").resolve())] * len(words)
    bound = call("refusal_mi.recipes.arditi.run", "run", *source)
    options, model = bound.arguments["options"], bound.arguments["source"]
    assert options == default_options(model)
    assert differing(bound) == set()
    assert bound.arguments["folder"].path == default_folder(model)
    published = {"harmful", "harmless", "text_set", "instruction_set", "max_new_tokens"}
    changed = {name for name, value in vars(options).items() if value != getattr(RunOptions(), name)}
    assert changed == (set() if source else published)
    other = call(
        "refusal_mi.recipes.arditi.run", "run", *source, "--n-val", "7", "--no-thresholds", "--fresh"
    ).arguments
    assert (other["options"].n_val, other["options"].thresholds) == (7, NO_THRESHOLDS)


def test_combos(call):
    bound = call("refusal_mi.recipes.combinations.run_combos", "combos")
    assert bound.arguments["combos"] == CombosOptions()
    assert bound.arguments["options"] == default_options(bound.arguments["source"])
    other = call("refusal_mi.recipes.combinations.run_combos", "combos", "--n-random", "9").arguments["combos"]
    assert other == CombosOptions(n_random=9)


def test_select(call, tmp_path):
    row = {"position": -1, "layer": 0, "refusal_score": 0.0, "steering_score": 1.0, "kl_div_score": 0.0}
    write_json(tmp_path / "grid.json", [row])
    words = ("select", "grid.json", "--n-layers", "5")
    rule = call("refusal_mi.search.grid.select", *words)
    assert rule.arguments["thresholds"] == Thresholds()
    off = ("--kl-max", "inf", "--induce-min", "-inf", "--prune-layers", "0")
    other = call("refusal_mi.search.grid.select", *words, *off).arguments["thresholds"]
    assert other == Thresholds(None, None, 0.0) != Thresholds()
    assert call("refusal_mi.cli.tables.print_survivors", *words).arguments["top"] == 10
    assert call("refusal_mi.cli.tables.print_survivors", *words, "--top", "3").arguments["top"] == 3


def test_vector(call):
    bound = call("refusal_mi.recipes.responses.vector", "vector")
    queries = default_queries(bound.arguments["source"])
    assert bound.arguments["options"] == VectorOptions(dataset=queries)
    assert isinstance(bound.arguments["judge"], SubstringJudge)
    other = call("refusal_mi.recipes.responses.vector", "vector", "--n-completions", "3").arguments["options"]
    assert other == VectorOptions(dataset=queries, n_completions=3)


def test_vector_eval(call, tmp_path):
    write_tensors(tmp_path / "made" / "refusal_vector.pt", torch.ones(6, 32))
    words = ("vector-eval", "--vector-dir", "made")
    bound = call("refusal_mi.recipes.responses_eval.evaluate_vector", *words)
    queries = default_queries(bound.arguments["source"])
    assert bound.arguments["options"] == EvalOptions(dataset=queries)
    other = call("refusal_mi.recipes.responses_eval.evaluate_vector", *words, "--coefficients", "1", "2").arguments
    assert other["options"] == EvalOptions(dataset=queries, coefficients=(1.0, 2.0))


def test_caa(call, tiny_dir, tmp_path):
    model = str(tiny_dir("llama").resolve())
    made = call("refusal_mi.recipes.caa.write_vectors", "caa", "vectors", model)
    assert differing(made) == set()
    assert differing(call("refusal_mi.recipes.caa.write_vectors", "caa", "vectors", model, "--seed", "5")) == {"seed"}
    random_direction(0, layer=3).save(tmp_path / "v.pt")
    words = (model, "--vector", "v.pt")
    tested = call("refusal_mi.recipes.caa_open.open_ended", "caa", "test", *words)
    assert differing(tested) - {"judge"} == set()
    assert tuple(tested.arguments["multipliers"]) == (1.0, 2.0, 3.0)
    write_json(tmp_path / "many.json", [{"question": f"Why {number}?"} for number in range(60)])
    asked = ("--questions", "many.json")
    chosen = call("refusal_mi.recipes.caa_eval.evaluate_choices", "caa", "ab", *words, *asked).arguments
    assert chosen["task"] == ABTask((-1.0, 0.0, 1.0), None, "response", 16, 50, "v.pt")
    assert chosen["task"].max_new_tokens == tested.signature.parameters["max_new_tokens"].default
    assert len(chosen["questions"]) == 40


def test_chat(call, tiny_dir, tmp_path):
    model, direction = str(tiny_dir("llama").resolve()), random_direction(0)
    direction.save(tmp_path / "v.pt")
    assert differing(call("refusal_mi.generation.Conversation", "chat", model)) == set()
    assert call("refusal_mi.cli.chat.Session", "chat", model).arguments["plain"] is None
    assert call("refusal_mi.cli.chat.Session", "chat", model, "--compare").arguments["plain"] is not None
    steered = call("refusal_mi.generation.Conversation", "chat", model, "--steer", "v.pt").arguments
    ablated = call("refusal_mi.generation.Conversation", "chat", model, "--direction", "v.pt").arguments
    for found, expected in ((steered, Add(direction)), (ablated, Ablate(direction))):
        (intervention,) = found["interventions"]
        assert settings(intervention) == settings(expected)
    minus = call(
        "refusal_mi.generation.Conversation", "chat", model, "--steer", "v.pt", "--coefficient", "-1"
    ).arguments
    assert settings(minus["interventions"][0]) == settings(Add(direction, -1.0))
    (multi,) = call("refusal_mi.recipes.combinations.check_multi", "chat", model).args
    assert multi == inspect.signature(combine).parameters["multi"].default
    shorter = call("refusal_mi.generation.Conversation", "chat", model, "--max-new-tokens", "9")
    assert differing(shorter) == {"max_new_tokens"}


def settings(intervention) -> dict:
    """All fields of an intervention but its directions, with lists as tuples."""
    found = {each.name: getattr(intervention, each.name) for each in fields(intervention)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if not name.startswith("direction")
    }


def test_analyze(call, tiny_dir, tiny_model):
    source = str(tiny_dir("llama").resolve())
    write_head(default_folder(source), tiny_model("llama"), source, {"harmful": (), "harmless": ()}, ())
    words = ("analyze", source, "--what", "lens")
    bound = call("refusal_mi.run.folder.RunInputs", *words)
    assert differing(bound) == set()
    assert bound.arguments["path"] == default_folder(source)
    assert differing(call("refusal_mi.run.folder.RunInputs", *words, "--seed", "4")) == {"seed"}


def test_analyze_does_everything_with_the_largest_batches_first(tiny_dir, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("refusal_mi.model.loading.quiet_load", lambda *_, **__: tiny_model("llama"))
    source, asked = str(tiny_dir("llama").resolve()), []
    write_head(default_folder(source), tiny_model("llama"), source, {"harmful": (), "harmless": ()}, ())

    def refuse(run):
        asked.append(run.batch_size)
        raise UserError("not here")

    for kind in KINDS:
        monkeypatch.setattr(f"refusal_mi.analysis.{kind}.from_run", refuse)
    assert exit_status(["analyze", source]) == 1
    assert asked == [START] * len(KINDS)
    asked.clear()
    assert exit_status(["analyze", source, "--what", "lens,pca", "--batch-size", "5"]) == 1
    assert asked == [5, 5]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_export(call, kind, tiny_dir, tmp_path):
    direction = random_direction(0)
    direction.save(tmp_path / "v.pt")
    source = str(tiny_dir("llama").resolve())
    words = ["export", source, "--direction", "v.pt", "--output-dir", "out", *["--adapter"] * (kind == "adapter")]
    bound = call(f"refusal_mi.export.export.export_{kind}", *words)
    assert differing(bound) == set()
    assert settings(bound.arguments["interventions"]) == settings(Ablate(direction))
    assert differing(call(f"refusal_mi.export.export.export_{kind}", *words, "--verify", "none")) == {"verify"}


def test_export_vector(call, tiny_dir, tmp_path):
    direction = random_direction(0)
    direction.save(tmp_path / "v.pt")
    words = ("export-vector", str(tiny_dir("llama").resolve()), "--direction", "v.pt", "--output")
    added = call("refusal_mi.export.formats.write_gguf", *words, "v.gguf").arguments["addition"]
    assert settings(added) == settings(Add(direction))
    ablated = call("refusal_mi.export.formats.write_lm_eval", *words, "s.pt", "--format", "lm-eval").arguments
    assert settings(ablated["intervention"]) == settings(Ablate(direction))


def test_study(call, tiny_dir, tiny_model, tmp_path):
    source = str(tiny_dir("llama").resolve())
    write_head(default_folder(source), tiny_model("llama"), source, {"harmful": (), "harmless": ()}, ())
    alone = call("refusal_mi.recipes.methods.compare_methods", "compare-methods", source).arguments
    (tmp_path / "s.yaml").write_text(
        f"models: {source}\nmethods: mean\noptions: {{n_val: 7, compare-methods: {{n_random: 2}}}}\n"
    )
    (cell,) = read_study(tmp_path / "s.yaml").cells
    expected = {name: alone[name] for name in ("kl_tokens", "n_places", "max_new_tokens", "batch_size")}
    assert vars(cell.compared) == {**expected, "n_random": 2, "n_prompts": alone["run"].max_prompts}
    assert cell.options == replace(default_options(source), n_val=7)
    assert MethodsOptions().n_random == alone["n_random"]


def test_plot(call, tmp_path):
    make_run(tmp_path / "run", reached="selection")
    words = ("plot", "run", "--output", "scores.html")
    assert differing(call("refusal_mi.figures.save.save_figure", *words)) == set()
    assert call("refusal_mi.figures.save.save_figure", *words).arguments["path"] == Path("scores.html")
    assert differing(call("refusal_mi.figures.save.save_figure", *words, "--width", "900")) == {"width"}
