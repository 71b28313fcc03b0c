"""Code that lies beside a model's files is never run, and nobody is asked whether to."""

import io
import json
import shutil

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.model.guards import guarded, no_processor, no_remote_code
from refusal_mi.model.loading import load_model
from refusal_mi.model.provenance import describe_model
from tests.helpers.exports import OTHERS, save_model
from tests.helpers.models import FAMILIES

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


def test_a_call_that_says_nothing_of_trust_is_refused_too(poisoned, monkeypatch):
    """As other libraries make them; the control is `test_by_itself_transformers_asks_and_runs_it`."""
    from transformers import AutoConfig

    folder, marker = poisoned("config.json", OWN_CLASSES, **UNKNOWN)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with guarded(str(folder)), pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder)
    assert not marker.exists()


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


def test_code_runs_only_where_it_is_trusted_and_that_is_recorded(poisoned, tiny_dir):
    folder, marker = poisoned("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).write_text('ran')\n"
        "class Config(LlamaConfig):\n    pass\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    trusted = load_model(folder, device="cpu", trust_remote_code=True)
    assert marker.exists() and describe_model(trusted, str(folder)).remote_code
    assert not describe_model(load_model(tiny_dir("llama"), device="cpu"), str(folder)).remote_code


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_loading_a_folder_starts_no_process_and_opens_no_connection(family, tiny_dir, tmp_path, monkeypatch):
    import socket
    import subprocess

    def refuse(*arguments, **options):
        raise AssertionError(f"{arguments[1:]}")

    folder = tiny_dir(family) if family in FAMILIES else save_model(family, tmp_path / family)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    for way in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, way, refuse)
    load_model(folder, device="cpu")
    with pytest.raises(AssertionError):  # the controls
        subprocess.run(["true"], check=False)
    with pytest.raises(AssertionError), socket.socket() as own:
        own.connect(("127.0.0.1", 9))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    """A server that takes connections and never says a word."""
    import socket

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("refusal_mi.hub.PATIENCE", 0.2)
        with pytest.raises(UserError, match="cannot load someone/model from the hub"):
            load_model("someone/model", device="cpu")
        assert constants.HF_HUB_OFFLINE is False
        server.settimeout(0.5)
        connections = [server.accept()[0]]
        with pytest.raises(TimeoutError):
            server.accept()
        connections[0].close()
