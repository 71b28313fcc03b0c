"""--push-to-hub, against a hub on localhost: what arrives is what was written, private unless it is said."""

import json

import pytest

from refusal_mi.cli import exit_status
from tests.helpers.directions import random_direction
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
    "public": command("public", "--verify", "none", "--adapter", "--push-to-hub", "team/open", "--public", "--json"),
    "closed": command("closed", "--verify", "none", "--push-to-hub", "stranger/one"),
}
verify.MAX_RELATIVE_DIFFERENCE = 0.0
found["outside"] = command("outside", "--push-to-hub", "me/outside")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/__stop__").read()
time.sleep(0.3)
found["no hub"] = command("kept", "--verify", "none", "--push-to-hub", "me/gone")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    save_tiny("qwen2", root / "model")
    random_direction(1).save(root / "r.pt")
    (root / "uploads").mkdir()
    return run_with_hub({}, root, SCRIPT, uploads=root / "uploads") | {"root": root}


def same_files(written, uploaded):
    """The files of both, without the names that only the hub has."""
    files = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    there = {path.relative_to(uploaded) for path in uploaded.rglob("*") if path.is_file()}
    assert files <= there and {path.name for path in there - files} <= {".gitattributes"}
    return all((written / path).read_bytes() == (uploaded / path).read_bytes() for path in files)


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
    assert same_files(hub["root"] / "work" / "private", uploads / "me" / "private-one")
    assert (uploads / "me" / "private-one" / "model.safetensors").is_file()
    assert is_private(uploads / "me" / "private-one.json")
    assert any(line.startswith("PUT /large/") and line.endswith(" 200") for line in hub["requests"])


@pytest.mark.slow
def test_public_only_where_it_is_said(hub):
    assert hub["public"]["status"] == 0 and json.loads(hub["public"]["out"])["hub"].endswith("/team/open")
    assert not is_private(hub["root"] / "uploads" / "team" / "open.json")
    assert same_files(hub["root"] / "work" / "public", hub["root"] / "uploads" / "team" / "open")


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
    assert "the hub did not take it" in errors[0] and errors[0].endswith(f"/work/{folder}")
    assert (hub["root"] / "work" / folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub takes NAME or OWNER/NAME"),
        (["--public"], "name it with --push-to-hub"),
    ],
)
def test_a_mistake_shows_before_anything_is_written(tiny_dir, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert exit_status(["export", str(tiny_dir("qwen2")), "--output-dir", str(out), *words]) == 2
    assert message in capsys.readouterr().err and not out.exists()
