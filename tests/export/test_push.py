"""--push-to-hub, against a hub on localhost: what arrives loads, and gives nothing away."""

import json
from dataclasses import replace

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.export.published import published
from refusal_mi.files import write_json
from tests.helpers.directions import random_direction
from tests.helpers.exports import plain_logits
from tests.helpers.hub import run_with_hub
from tests.helpers.models import save_tiny

SCRIPT = """
import json, os, time, urllib.request
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None  # retries need not wait

from refusal_mi.cli import exit_status

def command(name, *arguments):
    out, captured = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(captured):
        words = ["export", "../model", "--direction", "../r.pt", "--output-dir", name, *arguments]
        status = exit_status(words)
    return {"status": status, "out": out.getvalue(), "stderr": captured.getvalue().splitlines()}

from refusal_mi.export import verify
found = {
    "private": command("private", "--push-to-hub", "private-one"),
    "public": command("public", "--adapter", "--push-to-hub", "team/open", "--public", "--json"),
    "closed": command("closed", "--push-to-hub", "stranger/one"),
    "again": command("again", "--push-to-hub", "me/older"),
    "foreign": command("foreign", "--push-to-hub", "me/foreign"),
}
LIMIT, verify.MAX_RELATIVE_DIFFERENCE = verify.MAX_RELATIVE_DIFFERENCE, 0.0
found["outside"] = command("outside", "--push-to-hub", "me/outside")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/__stop__").read()
time.sleep(0.3)
verify.MAX_RELATIVE_DIFFERENCE = LIMIT
found["no hub"] = command("kept", "--push-to-hub", "me/gone")
print(json.dumps(found))
"""


SECRETS = (".env", ".ssh/id", "wandb/debug.log", "notes.txt")
OLD = ("model-00001-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    save_tiny("qwen2", root / "model")
    fill(root / "model", (*SECRETS, "LICENSE", "modeling_own.py"))
    direction = random_direction(1)
    provenance = {**direction.provenance, "model": {"source": str(root / "model")}}
    replace(direction, provenance=provenance).save(root / "r.pt")
    fill(root / "uploads" / "me" / "older", (*OLD, "refusal_mi.json", "mine.txt"))
    fill(root / "uploads" / "me" / "foreign", OLD)
    return run_with_hub({}, root, SCRIPT, uploads=root / "uploads") | {"root": root}


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of mine")


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def is_private(record):
    """As the client said it, of before and of now."""
    asked = json.loads(record.read_text())
    assert ("private" in asked) != ("visibility" in asked)
    return asked.get("private", asked.get("visibility") == "private")


@pytest.mark.slow
def test_a_verified_export_arrives_whole_and_private(hub):
    found = hub["private"]
    assert found["status"] == 0 and "uploaded: http://127.0.0.1" in found["out"], found
    uploads = hub["root"] / "uploads"
    written, uploaded = hub["root"] / "desk" / "private", uploads / "me" / "private-one"
    assert names_in(uploaded) == names_in(written) - set(SECRETS)
    assert (uploaded / "LICENSE").is_file() and (uploaded / "modeling_own.py").is_file()
    record = {"README.md", "refusal_mi.json"}
    for name in names_in(uploaded) - record:
        assert (uploaded / name).read_bytes() == (written / name).read_bytes(), name
    assert torch.equal(plain_logits(uploaded), plain_logits(written))
    assert is_private(uploads / "me" / "private-one.json")
    assert any(line.startswith("PUT /large/") and line.endswith(" 200") for line in hub["requests"])


@pytest.mark.slow
def test_public_only_where_it_is_said(hub):
    assert hub["public"]["status"] == 0 and json.loads(hub["public"]["out"])["hub"].endswith("/team/open")
    assert not is_private(hub["root"] / "uploads" / "team" / "open.json")
    uploaded = hub["root"] / "uploads" / "team" / "open"
    assert names_in(uploaded) == names_in(hub["root"] / "desk" / "public")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "name"), [("private", "me/private-one"), ("public", "team/open")])
def test_an_upload_says_no_path_of_this_machine(hub, folder, name):
    root = str(hub["root"]).encode()
    uploaded = hub["root"] / "uploads" / name
    assert not [path for path in uploaded.rglob("*") if path.is_file() and root in path.read_bytes()]
    assert b"`model`" in (uploaded / "README.md").read_bytes()
    record = json.loads((uploaded / "refusal_mi.json").read_text())
    assert record["source"] == "model" and record["interventions"][0]["directions"][0]["norm"] > 0
    written = hub["root"] / "desk" / folder
    assert root in (written / "refusal_mi.json").read_bytes(), "the control: what stays here says where it is from"


@pytest.mark.slow
def test_secrets_beside_the_weights_are_not_even_copied(hub):
    written = names_in(hub["root"] / "desk" / "private")
    assert {"wandb/debug.log", "notes.txt", "LICENSE"} <= written and not {".env", ".ssh/id"} & written


@pytest.mark.slow
def test_older_weights_of_a_repository_go_and_those_of_others_stay(hub):
    uploads = hub["root"] / "uploads" / "me"
    assert hub["again"]["status"] == 0
    assert not set(OLD) & names_in(uploads / "older") and (uploads / "older" / "mine.txt").read_text() == "of mine"
    assert plain_logits(uploads / "older").isfinite().all()
    errors = hub["foreign"]["stderr"]
    assert hub["foreign"]["status"] == 2 and any("has weights" in line for line in errors)
    assert names_in(uploads / "foreign") == set(OLD)


@pytest.mark.slow
def test_what_misses_its_limits_is_not_uploaded(hub):
    found = hub["outside"]
    assert found["status"] == 1 and "not uploaded" in found["out"]
    assert not (hub["root"] / "uploads" / "me" / "outside").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "folder"), [("closed", "closed"), ("no hub", "kept")])
def test_a_hub_that_does_not_take_it_is_one_line_and_the_export_stays(hub, case, folder):
    errors = [line for line in hub[case]["stderr"] if line.startswith("error: ")]
    assert hub[case]["status"] == 2 and len(errors) == 1
    assert "the hub did not take it" in errors[0] and errors[0].endswith(f"/desk/{folder}")
    assert (hub["root"] / "desk" / folder / "model.safetensors").is_file()


def test_what_is_published_loads_and_names_no_local_path(tmp_path):
    sources = {"refusal_mi.json": "/home/me/runs/base", "refusal_mi.source.json": "/home/me/older"}
    for name, source in sources.items():
        provenance = {"model": {"source": source}, "prompts": "/home/me/asks.jsonl", "hook": "blocks.1.hook_resid_pre"}
        write_json(tmp_path / name, {"source": source, "interventions": [provenance]})
    write_json(tmp_path / "config.json", {"_name_or_path": "/home/me/older", "rope": {"kind": "/"}, "auto_map": "a.py"})
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "/home/me/runs/base", "r": 2})
    (tmp_path / "README.md").write_text("Made from `/home/me/runs/base`; ask /v1/chat")
    (tmp_path / "README.source.md").write_text("Made from `/home/me/older`")
    wanted = ("model-00001-of-00002.safetensors", "tokenizer.json", "preprocessor_config.json", "merges.txt")
    wanted += ("embedding/adapter_model.safetensors", "chat_template.jinja", "LICENSE", "own.py")
    unwanted = (".env", ".hidden.py", "wandb/debug.log", "optimizer.pt", "scripts/own.py", "credentials.json")
    fill(tmp_path, unwanted)
    fill(tmp_path, wanted)
    write_json(tmp_path / "preprocessor_config.json", {"size": 1})
    files = published(tmp_path)
    rewritten = {name: value.decode() for name, value in files.items() if isinstance(value, bytes)}
    assert {name for name in files if name not in rewritten} == set(wanted)
    assert not any("/home" in text for text in rewritten.values())
    assert rewritten["README.md"] == "Made from `base`; ask /v1/chat"
    assert rewritten["README.source.md"] == "Made from `older`"
    assert json.loads(rewritten["config.json"]) == {"_name_or_path": "older", "rope": {"kind": "/"}, "auto_map": "a.py"}
    assert json.loads(rewritten["adapter_config.json"])["base_model_name_or_path"] == "base"
    record = json.loads(rewritten["refusal_mi.json"])["interventions"][0]
    assert record == {"model": {"source": "base"}, "prompts": "asks.jsonl", "hook": "blocks.1.hook_resid_pre"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub takes NAME or OWNER/NAME"),
        (["--public"], "name it with --push-to-hub"),
        (["--push-to-hub", "me/x", "--verify", "none"], "uploads what passed its verification"),
    ],
)
def test_a_mistake_shows_before_anything_is_written(tiny_dir, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert exit_status(["export", str(tiny_dir("qwen2")), "--output-dir", str(out), *words]) == 2
    assert message in capsys.readouterr().err and not out.exists()
