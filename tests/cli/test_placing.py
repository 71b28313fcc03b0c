"""One rule says where a vector of a file was read, whichever command takes the file."""

import json
import shutil

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import load_direction
from refusal_mi.errors import UserError
from refusal_mi.export import export, formats
from refusal_mi.generation import Conversation
from refusal_mi.recipes import caa_eval, caa_open
from tests.helpers.directions import random_direction
from tests.helpers.gguf import write_control_vector
from tests.helpers.models import D_MODEL, N_LAYERS

ADDING = {
    "chat": "chat {model} --device cpu --steer {file} --prompt Hi",
    "export": "export {model} --direction {file} --output-dir out --add 1",
    "export-vector": "export-vector {model} --direction {file} --output out.gguf",
    "caa test": "caa test {model} --device cpu --vector {file} --questions queries.json --output-dir out",
    "caa ab": "caa ab {model} --device cpu --vector {file} --pairs pairs.json --n-questions 0 --output-dir out",
}
ABLATING = {
    "chat": "chat {model} --device cpu --direction {file} --prompt Hi",
    "export": "export {model} --direction {file} --output-dir out",
    "export-vector": "export-vector {model} --direction {file} --output out.pt --format lm-eval",
}
REFUSED = {
    "bare.pt": "say with --layer",
    "bare.pt --layer 9": "layer 9 does not exist",
    "bare.pt --layer -1": "layer -1 does not exist",
    "rows.pt": "choose one with --layer",
    "few.pt --layer 3": "expected one, or one for each of the layers 0..5",
    "grid.pt --layer 3": "expected floats of shape [d], [1, d] or [n, d]",
    "deep.pt": "was read at layer 9, and this model has layers 0..5",
    "vec_layer_1_m.pt --layer 1": "our layer 2, not 1",
    "run/rows.pt --layer 3": "was read in",
    "gap.pt --layer 3": "holds only zeros for layer",
    "named.pt": "choose one with the layer (--layer)",
    "many.gguf": "choose one with the layer (--layer)",
    "many.gguf --layer 1": "holds 0 tensors of layer 1",
    "one.gguf --layer 3": "of layer 2 by its name",
    "vec_layer_3_m.pt": "our layer 4, and the JSON beside it says layer 2",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Files of vectors with and without a place."""
    monkeypatch.chdir(tmp_path)
    row = torch.arange(1, 1 + D_MODEL).float()
    (tmp_path / "run").mkdir()
    model = {"source": "/elsewhere", "fingerprint": "other"}
    (tmp_path / "run/run.json").write_text(json.dumps({"model": model}))
    rows = torch.stack([row + layer for layer in range(N_LAYERS + 1)])
    for name in ("rows.pt", "run/rows.pt"):
        torch.save(rows, name)
    for name in ("bare.pt", "vec_layer_1_m.pt"):
        torch.save(row[None].double(), name)
    torch.save(rows[:-1], "few.pt")
    torch.save({f"layer_{layer}": each for layer, each in enumerate(rows)}, "named.pt")
    write_control_vector(tmp_path / "many.gguf", {block: rows[block + 1] for block in range(1, N_LAYERS)})
    write_control_vector(tmp_path / "one.gguf", {1: rows[2]})
    torch.save(rows[None], "grid.pt")
    torch.save(rows * (torch.arange(N_LAYERS + 1) < 3)[:, None], "gap.pt")
    random_direction(layer=2).save(tmp_path / "vec_layer_3_m.pt")
    random_direction(layer=2).save(tmp_path / "read.pt")
    random_direction(layer=2).save(tmp_path / "deep.pt")
    said = json.loads((tmp_path / "deep_metadata.json").read_text()) | {"layer": 9, "hook_name": None}
    (tmp_path / "deep_metadata.json").write_text(json.dumps(said))
    (tmp_path / "queries.json").write_text('["Why?"]')
    question = "Is it a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes."
    pair = {"question": question, "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair | {"question": f"Now: {question}"}]))
    return tmp_path


class Reached(Exception):
    """What is done to the model is known."""


@pytest.fixture
def used(monkeypatch):
    """The vectors that the commands are about to use, with the layers at which they are added."""
    seen = []

    def see(what):
        added = [what] if hasattr(what, "direction") else []
        directions = [each.direction for each in added] or [getattr(what, "directions", what)]
        for each in [one for group in directions for one in (group if isinstance(group, tuple) else [group])]:
            layer, vector = (None, each) if isinstance(each, torch.Tensor) else (each.layer, each.vector)
            seen.append((layer, vector[0].item(), added[0].target if added else None))
        raise Reached

    def of_caa(model, chat, direction, chosen, *_, **__):
        seen.append((direction.layer, direction.vector[0].item(), chosen + 1))
        raise Reached

    def of_ab(model, chat, by_layer, *_, **__):
        ((layer, direction),) = by_layer.items()
        seen.append((direction.layer, direction.vector[0].item(), layer + 1))
        raise Reached

    for name in ("export_checkpoint", "export_adapter"):
        monkeypatch.setattr(export, name, lambda source, what, *_, **__: see(what))
    for name in ("write_gguf", "write_lm_eval"):
        monkeypatch.setattr(formats, name, lambda output, what, *_, **__: see(what))
    monkeypatch.setattr(Conversation, "ask", lambda self, _: see(self.interventions[0]))
    monkeypatch.setattr(caa_open, "open_ended", of_caa)
    monkeypatch.setattr(caa_eval, "evaluate_choices", of_ab)
    return seen


def words(command: str, model, given: str) -> list[str]:
    """The command of a file and --layer, which `caa` counts by the outputs of blocks."""
    file, _, layer = given.partition(" --layer ")
    line = command.format(model=model, file=file).split()
    if not layer:
        return line
    option = "--layers" if " ab " in command else "--layer"
    return [*line, f"{option}={int(layer) - (line[0] == 'caa')}"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [*ADDING, *(f"{name}, ablating" for name in ABLATING)])
def test_every_command_reads_the_place_alike(command, place, used, tiny_dir, capsys):
    line = {**ADDING, **{f"{name}, ablating": text for name, text in ABLATING.items()}}[command]
    model, adds = tiny_dir("gpt2"), command in ADDING
    own = random_direction(layer=2).vector[0].item()
    expected = {
        "bare.pt --layer 3": (3, 1.0, 3),
        "bare.pt --layer 5": (5, 1.0, 5),
        "rows.pt --layer 3": (3, 4.0, 3),
        "vec_layer_1_m.pt": (2, 1.0, 2),
        "vec_layer_1_m.pt --layer 2": (2, 1.0, 2),
        "read.pt": (2, own, 2),
        "named.pt --layer 3": (3, 4.0, 3),
        "many.gguf --layer 3": (3, 4.0, 3),
        "one.gguf": (2, 3.0, 2),
        "one.gguf --layer 2": (2, 3.0, 2),
    }
    if not adds:  # ablation does not ask where a vector was read
        expected["bare.pt"] = (None, 1.0, None)
    if adds and command != "caa ab":  # which steers at the layers of the vectors it has
        expected["read.pt --layer 4"] = (2, own, 4)
    for given, (layer, first, target) in expected.items():
        used.clear()
        assert exit_status(words(line, model, given)) == 2 and "a defect" in capsys.readouterr().err  # Reached
        assert used == [(layer, pytest.approx(first), target if adds else None)], given
    refused = REFUSED if adds else REFUSED | {"read.pt --layer 4": "says itself where it was read, layer 2"}
    refused = {given: message for given, message in refused.items() if given not in expected}
    for given, message in refused.items():
        if command == "caa ab" and given.endswith("--layer -1"):
            continue  # no list of layers
        used.clear()
        assert exit_status(words(line, model, given)) == 2
        (error,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
        expects = "CAA's layers of this model are 0..4" if "caa" in command and given.endswith(("9", "-1")) else message
        assert expects in error and not used, (given, error)
    assert not (place / "out").exists()


def test_a_hook_names_the_place_of_one_vector(place, used, tiny_dir, capsys):
    line = [
        "caa",
        "test",
        str(tiny_dir("gpt2")),
        "--device",
        "cpu",
        "--questions",
        "queries.json",
        "--output-dir",
        "out",
    ]
    for hook in ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"):
        exit_status([*line, "--vector", "bare.pt", "--hook", hook, "--layer", "1"])
        assert used.pop() == (3, 1.0, 2)  # read there, added after block 1
    capsys.readouterr()
    assert exit_status([*line, "--vector", "read.pt", "--hook", "blocks.2.hook_resid_post"]) == 2
    assert "says itself where it was read, layer 2" in capsys.readouterr().err
    assert exit_status([*line, "--vector", "run", "--hook", "blocks.2.hook_resid_post"]) == 2
    assert "is a folder" in capsys.readouterr().err and not used


@pytest.mark.slow
@pytest.mark.parametrize("command", ["chat", "export", "export-vector"])
def test_the_other_commands_take_a_hook_alike(command, place, used, tiny_dir, capsys):
    model, heads = tiny_dir("gpt2"), "blocks.1.attn.hook_z"
    adding, ablating = (list_of[command].format(model=model, file="{}") for list_of in (ADDING, ABLATING))

    def ends(line, file, *options):
        used.clear()
        assert exit_status([*line.format(file).split(), *options]) == 2
        return capsys.readouterr().err

    for hook in ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"):
        ends(adding, "bare.pt", "--hook", hook)
        assert used == [(3, 1.0, 3)]
        ends(adding, "bare.pt", "--hook", hook, "--layer", "1")
        assert used == [(3, 1.0, 1)], "read there, added elsewhere"
        ends(adding, "rows.pt", "--hook", hook)
        assert used == [(3, 4.0, 3)]
        ends(ablating, "bare.pt", "--hook", hook, "--layer", "3")
        assert used == [(3, 1.0, None)]
    ends(adding, "read.pt", "--hook", "blocks.2.hook_resid_pre")
    assert [each[0] for each in used] == [2], "the control: what the JSON says may be said again"
    for line, file, options, message in (
        (adding, "read.pt", ["blocks.2.hook_resid_post"], "says itself where it was read, layer 2"),
        (adding, "read.pt", ["blocks.2.hook_mlp_out"], "says itself where it was read, blocks.2.hook_resid_pre"),
        (ablating, "bare.pt", ["blocks.2.hook_resid_post", "--layer", "2"], "which is layer 3: either is enough"),
        (adding, "rows.pt", [heads], f"not of {heads}"),
        (adding, "vec_layer_1_m.pt", [heads], f"not of {heads}"),
        (adding, "named.pt", [heads], "holds 6 tensors"),
        (adding, "bare.pt", ["attn.hook_z"], "is no hook point of a block"),
        (adding, "bare.pt", ["blocks.9.hook_resid_post"], "layer 10 does not exist"),
    ):
        error = ends(line, file, "--hook", *options)
        assert message in error and "a defect" not in error and not used, (file, options, error)
    for line in (adding, ablating):
        error = ends(line, "bare.pt", "--hook", heads)
        (layer, first, target) = used.pop()
        assert (layer, first) == (1, 1.0) and "a defect" in error and target == (1 if line == adding else None)


def test_a_vector_of_heads_acts_where_it_was_read_and_is_not_exported(place, tiny_dir, capsys):
    model, heads = str(tiny_dir("gpt2")), ["--hook", "blocks.1.attn.hook_z"]
    torch.save(1000 * torch.arange(1, 1 + D_MODEL).float(), "loud.pt")
    said = {}
    for name, options in {"plain": [], "there": heads}.items():
        steer = ["--steer", "loud.pt", *options] if options else []
        assert exit_status(["chat", model, "--device", "cpu", "--max-new-tokens", "8", "--prompt", "Hi", *steer]) == 0
        said[name] = capsys.readouterr().out
    assert said["there"] != said["plain"], "it acts"
    assert exit_status(["chat", model, "--hook", "blocks.1.attn.hook_z", "--prompt", "Hi"]) == 2
    assert "--hook says where the vector of --steer FILE" in capsys.readouterr().err
    assert exit_status(["export", model, "--direction", "bare.pt", *heads, "--output-dir", "out"]) == 2
    assert "has no weight form" in capsys.readouterr().err and not (place / "out").exists()


def test_a_row_keeps_the_model_of_its_folder(place):
    assert load_direction(place / "run/rows.pt", N_LAYERS, 3).provenance["model"]["fingerprint"] == "other"
    assert "model" not in load_direction(place / "rows.pt", N_LAYERS, 3).provenance
    (place / "run/run.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="damaged"):
        load_direction(place / "run/rows.pt", N_LAYERS, 3)


def test_a_file_of_the_model_is_not_written_over(place, tiny_dir, capsys):
    shutil.copytree(tiny_dir("gpt2"), place / "m")
    before = (place / "m/config.json").read_bytes()
    line = "export-vector m --direction read.pt --output {} --format lm-eval"
    assert exit_status(line.format("m/config.json").split()) == 2
    assert "m/config.json would be written over" in capsys.readouterr().err
    assert (place / "m/config.json").read_bytes() == before
    assert exit_status(line.format("m/new.pt").split()) == 0, "the control: a new file beside them is"
