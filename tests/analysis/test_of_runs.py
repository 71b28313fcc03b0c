"""An analysis called with a model and a run is that of the run's own direction, prompts and chat format."""

from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusal_mi import analysis
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.result import AnalysisResult
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.loaded import load_run
from refusal_mi.model.loading import load_model
from refusal_mi.run.folder import RunInputs
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS, CHATS
from tests.helpers.runs import write_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_dir):
    """As much of a run as analyses of its direction read."""
    made = tmp_path_factory.mktemp("runs") / "x"
    write_head(made, tiny_model("llama"), str(tiny_dir("llama")), {"harmful": ASKS, "harmless": CHATS}, (1,))
    random_direction(layer=2).save(made / "direction.pt")
    return made


@pytest.mark.parametrize("kind", analysis.KINDS)
def test_every_analysis_is_called_with_a_model_and_a_run(folder, tiny_model, monkeypatch, kind):
    model, call = tiny_model("llama"), getattr(analysis, kind)
    seen: list[RunInputs] = []
    given = AnalysisResult(provenance={"of": kind})
    monkeypatch.setattr(call, "from_run", lambda run: seen.append(run) or given)
    for run in (folder, str(folder), load_run(folder)):
        assert call(model, run, max_prompts=3, batch_size=2, seed=5) is given
    assert call(model, RunInputs(model, str(folder), 3, 2, 5)) is given
    asked = RunInputs(model, folder, 3, 2, 5)
    assert seen == [asked] * 4 and seen[0].path == folder
    call(model, folder)
    assert seen.pop() == RunInputs(model, folder, 128, 64, 0)


def test_what_it_gives_is_what_the_analysis_gives(folder, tiny_model):
    model = tiny_model("llama")
    found = analysis.projections(model, str(folder), batch_size=4)
    groups = {"harmful": list(ASKS[1:]), "harmless": list(CHATS[1:])}  # the run left the first out
    expected = project_residuals(model, ChatFormat(model.tokenizer), random_direction(layer=2), groups, batch_size=4)
    assert found.provenance["prompts"]["harmful"] == expected.provenance["prompts"]["harmful"]
    assert found.projections.equal(expected.projections) and found.cosines.equal(expected.cosines)
    fewer = analysis.projections(model, str(folder), max_prompts=2, batch_size=4)
    assert fewer.projections.shape != found.projections.shape, "the control: fewer prompts"


def test_other_weights_of_the_same_shape_are_refused(folder, tiny_model, tiny_dir, tmp_path):
    """A model of the same width is not the model of the run; its own weights from another folder are."""
    there, other = tmp_path / "moved", tmp_path / "other"
    copytree(tiny_dir("llama"), there)
    copytree(tiny_dir("llama"), other)
    file = other / "model.safetensors"
    tensors = load_file(file)
    first = next(name for name, each in tensors.items() if "mlp" in name and each.ndim == 2)
    save_file({**tensors, first: 1.5 * tensors[first]}, file, {"format": "pt"})
    assert analysis.projections(load_model(there, device="cpu"), folder, max_prompts=2).kind == "projections"
    with pytest.raises(UserError, match=r"was computed from other weights, .* than those of .*other"):
        analysis.projections(load_model(other, device="cpu"), folder)
    held = tiny_model("llama")
    with pytest.raises(UserError, match="other weights"):
        analysis.projections(load_model(other, device="cpu"), RunInputs(held, folder))


def test_what_is_imported_with_a_star_are_functions_and_results():
    assert set(analysis.KINDS).isdisjoint(analysis.__all__) and {"project_residuals", "LensResult"} <= set(
        analysis.__all__
    )
    assert all(hasattr(analysis, name) for name in analysis.__all__)


def test_a_run_that_does_not_fit_is_one_line(folder, tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        analysis.projections(tiny_model("llama"), tmp_path)
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    with pytest.raises(UserError, match=r"has no direction\.pt"):
        analysis.projections(tiny_model("llama"), tmp_path)
    Direction.of(torch.ones(7), 2).save(tmp_path / "direction.pt")
    with pytest.raises(UserError, match="a direction of width 7 does not fit a model of width 32"):
        analysis.projections(tiny_model("llama"), tmp_path)


def test_the_module_is_still_the_module(folder):
    assert analysis.attribution.attribute_direction is analysis.attribute_direction
    assert set(analysis.KINDS) <= set(dir(analysis))
    with pytest.raises(AttributeError):
        analysis.nothing  # noqa: B018
