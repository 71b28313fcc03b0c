"""Directions of another model are refused by every command that uses one, unless that is meant."""

import json
import shutil

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction
from refusal_mi.errors import UserError
from refusal_mi.files import as_json
from refusal_mi.model import provenance
from refusal_mi.model.provenance import check_origin, describe_model
from tests.helpers.models import save_tiny

COMMANDS = {
    "chat": "chat {model} --device cpu --direction direction.pt --prompt Hi --max-new-tokens 1",
    "chat, steered": "chat {model} --device cpu --steer direction.pt --prompt Hi --max-new-tokens 1",
    "export": "export {model} --direction direction.pt --output-dir out --verify none",
    "export-vector": "export-vector {model} --direction direction.pt --output out.gguf",
    "caa test": "caa test {model} --device cpu --vector caa/vec_layer_1_gpt2.pt --questions queries.json "
    "--max-new-tokens 1 --output-dir o",
    "caa ab": "caa ab {model} --device cpu --vector caa/vec_layer_1_gpt2.pt --pairs pairs.json --multipliers 1 "
    "--n-questions 0 --output-dir o",
}


@pytest.fixture(scope="module")
def place(tiny_dir, tiny_model, tmp_path_factory):
    """A folder with a direction and CAA vectors of one model; beside it a copy of that model, and another model."""
    folder = tmp_path_factory.mktemp("other_model")
    shutil.copytree(tiny_dir("gpt2"), folder / "same")
    save_tiny("gpt2", folder / "other", seed=1)
    model = as_json(describe_model(tiny_model("gpt2"), str(tiny_dir("gpt2"))))
    Direction(torch.ones(32), 2, "blocks.2.hook_resid_pre", -1, {"model": model}).save(folder / "direction.pt")
    question = "Is it a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes."
    pair = {"question": question, "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    (folder / "pairs.json").write_text(json.dumps([pair, pair | {"question": f"Now: {question}"}]))
    (folder / "queries.json").write_text(json.dumps(["Why?"]))
    made = f"caa vectors {tiny_dir('gpt2')} --device cpu --pairs {folder}/pairs.json --layers 1 --output-dir"
    assert exit_status([*made.split(), str(folder / "caa")]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_another_models_directions_are_refused_and_a_copys_are_not(place, command, tmp_path, monkeypatch, capsys):
    for name in ("direction.pt", "direction_metadata.json", "caa", "pairs.json", "queries.json"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    there = set(tmp_path.iterdir())
    words = command.format(model=place / "other").split()
    assert exit_status(words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "was read in" in error and "--allow-other-model" in error and set(tmp_path.iterdir()) == there
    assert exit_status([*words, "--allow-other-model"]) == 0
    for made in set(tmp_path.iterdir()) - there:
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    assert exit_status(command.format(model=place / "same").split()) == 0


FOLDER, HUB = {"source": "/m", "fingerprint": "a"}, {"source": "owner/name", "revision": "c" * 40}


@pytest.mark.filterwarnings("ignore:this direction was read in")
@pytest.mark.parametrize(
    ("made", "source", "is_refused"),
    [
        ({"model": FOLDER}, ".", True),
        ({"model": FOLDER | {"fingerprint": "here"}}, ".", False),
        ({"model": "/m", "fingerprint": "a"}, ".", True),
        ({"model": FOLDER | {"fingerprint": None}}, ".", False),
        ({"model": HUB}, ".", False),
        ({"model": HUB}, "owner/name", True),
        ({"model": HUB | {"revision": "d" * 40}}, "owner/name", False),
        ({"model": HUB | {"revision": None}}, "owner/name", False),
        ({"model": HUB | {"revision": "d" * 40}}, "owner/another", True),
        ({"model": FOLDER}, "owner/name", False),
        ({"model": None}, ".", False),
        ({"model": {"source": 3}}, ".", False),
        ({}, ".", False),
    ],
)
def test_what_is_known_to_be_another_model_is_refused(made, source, is_refused, monkeypatch):
    monkeypatch.setattr(provenance, "fingerprint", lambda _: "here")
    monkeypatch.setattr(provenance, "hub_commit", lambda *_: "d" * 40)
    check_origin([made], source, allowed=True)
    if is_refused:
        with pytest.raises(UserError, match="--allow-other-model"):
            check_origin([{}, made], source)
    else:
        check_origin([{}, made], source)


@pytest.mark.parametrize(("made", "source"), [(HUB, "."), (FOLDER, "owner/name")])
def test_a_folder_and_a_hub_id_are_asked_about(made, source, monkeypatch):
    monkeypatch.setattr(provenance, "fingerprint", lambda _: "here")
    monkeypatch.setattr(provenance, "hub_commit", lambda *_: "d" * 40)
    with pytest.warns(UserWarning, match=rf"was read in {made['source']}; is that {source}\?"):
        check_origin([{"model": made}], source)
