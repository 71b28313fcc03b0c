"""Code that lies beside a model's files is never run, and nobody is asked whether to."""

import io
import json
import shutil

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.model.loading import load_model, no_processor, no_remote_code

POISON = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nraise SystemExit('ran')\n"


@pytest.fixture
def poisoned(tiny_dir, tmp_path):
    """A checkpoint one of whose files names code of its own, and the file that is there once this ran."""

    def made(file: str, auto_map: dict, **changes):
        folder, marker = tmp_path / "model", tmp_path / "marker"
        shutil.copytree(tiny_dir("llama"), folder)
        (folder / "own.py").write_text(POISON.format(marker=str(marker)))
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes | {"auto_map": auto_map}))
        return folder, marker

    return made


OWN_CLASSES = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
UNKNOWN, KNOWN = {"model_type": "unheard_of"}, {"model_type": "t5", "d_model": 8}


def test_a_checkpoint_with_code_of_its_own_is_refused_without_a_question(poisoned, monkeypatch, capsys):
    folder, marker = poisoned("config.json", OWN_CLASSES, **UNKNOWN)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(UserError, match="brings Python code of its own, which is not run"):
        load_model(folder, device="cpu")
    assert not marker.exists() and "Do you wish" not in capsys.readouterr().out


def test_an_export_builds_no_model_of_such_code(poisoned, monkeypatch):
    """A type that transformers knows, but not as a language model: the class would come from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from refusal_mi.model import writers

    folder, marker = poisoned("config.json", {"AutoModelForCausalLM": "own.Model"}, **KNOWN)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ValueError):
        writers.build_skeleton(config)
    assert not marker.exists()
    with pytest.raises(SystemExit):
        AutoModelForCausalLM.from_config(config)
    assert marker.exists(), "the control"


def test_the_first_prompt_of_a_chat_is_no_consent(poisoned, monkeypatch, capsys):
    folder, marker = poisoned("config.json", OWN_CLASSES, **UNKNOWN)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\nhi\n"))
    assert exit_status(["chat", str(folder)]) == 2
    shown = capsys.readouterr()
    assert not marker.exists() and shown.out == ""
    assert "brings Python code of its own, which is not run" in shown.err.splitlines()[-1]


def test_by_itself_transformers_asks_and_runs_it(poisoned, monkeypatch):
    """The control: the same folder, the same answer."""
    from transformers import AutoConfig

    folder, marker = poisoned("config.json", OWN_CLASSES, **UNKNOWN)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with no_remote_code(), pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder)
    assert not marker.exists()
    with pytest.raises(SystemExit):
        AutoConfig.from_pretrained(folder)
    assert marker.exists()


def test_no_processor_is_loaded_and_nothing_installed_for_it(monkeypatch):
    """A vision-language checkpoint makes TransformerLens install torchvision, where it is not there."""
    import subprocess
    import sys
    from types import SimpleNamespace

    from transformer_lens.model_bridge.sources.transformers import helpers

    calls = []
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(subprocess, "check_call", lambda command, *_, **__: calls.append(command))
    flags = SimpleNamespace(is_multimodal=True)
    with no_processor():
        helpers.load_modality_processor(SimpleNamespace(), flags, "no/such-model", False, None)
    assert calls == []
    helpers.load_modality_processor(SimpleNamespace(), flags, "no/such-model", False, None)
    assert [word for word in calls[0] if word == "torchvision"], "the control: by itself it installs"
