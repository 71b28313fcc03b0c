"""Exports by hub id from a hub on localhost: downloaded, pinned to a commit, not found, out of reach."""

import pytest

from refusal_mi.export.checkpoint import open_checkpoint
from refusal_mi.files import read_json
from refusal_mi.interventions import Ablate
from tests.helpers.directions import random_direction
from tests.helpers.exports import hooked_logits, plain_logits
from tests.helpers.hub import COMMIT, run_with_hub
from tests.helpers.models import save_tiny, tiny_hf_model, tiny_tokenizer

pytestmark = pytest.mark.slow

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
        status = exit_status(["export", name, "--direction", "../r.pt", "--verify", "none", *arguments])
    return {"status": status, "stderr": captured.getvalue().splitlines()}

found = {
    "single": command("someone/single", "--revision", "v1", "--verify", "full", "--output-dir", "single"),
    "sharded": command("someone/sharded", "--output-dir", "sharded"),
    "unknown model": command("someone/none", "--output-dir", "none"),
    "unknown revision": command("someone/single", "--revision", "v9", "--output-dir", "none"),
    "other weights": command("someone/pickled", "--output-dir", "none"),
}
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/__stop__").read()
time.sleep(0.3)
found |= {
    "no hub": command("someone/other", "--output-dir", "none"),
    "cached": command("someone/single", "--revision", "v1", "--adapter", "--output-dir", "cached"),
    "folders": sorted(os.listdir()),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What one process saw of a hub that was there, and then was not."""
    root = tmp_path_factory.mktemp("hub")
    save_tiny("qwen2", root / "single")
    (root / "single" / "notes.txt").write_text("kept")
    (root / "single" / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"):
        (root / "single" / name).write_bytes(b"the same weights in another format")
    tiny_hf_model("gemma").save_pretrained(root / "sharded", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(root / "sharded")
    save_tiny("qwen2", root / "pickled")
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    random_direction(1).save(root / "r.pt")
    repositories = {f"models/someone/{name}": root / name for name in ("single", "sharded", "pickled")}
    return run_with_hub(repositories, root, SCRIPT) | {"root": root}


@pytest.mark.parametrize("name", ("single", "sharded"))
def test_a_model_of_the_hub_is_exported_and_its_commit_recorded(hub, name):
    assert hub[name]["status"] == 0, hub[name]["stderr"]
    out = hub["root"] / "desk" / name
    record = read_json(out / "refusal_mi.json")
    assert record["source"] == f"someone/{name}"
    assert record["revision"] == COMMIT
    assert COMMIT in (out / "README.md").read_text()
    hooked = hooked_logits(hub["root"] / name, [Ablate(random_direction(1))])
    assert (plain_logits(hub["root"] / name) - hooked).abs().max() > 0.05
    assert (plain_logits(out) - hooked).abs().max() <= 1e-5
    assert (len(open_checkpoint(out).shards) > 3) == (name == "sharded")
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_other_files_come_along_and_weights_in_other_formats_are_not_even_downloaded(hub):
    assert (hub["root"] / "desk" / "single" / "notes.txt").read_text() == "kept"
    assert any("model.safetensors" in line for line in hub["requests"])
    assert not any("pytorch_model.bin" in line or "consolidated" in line for line in hub["requests"])
    assert not list((hub["root"] / "desk" / "single").glob("**/*consolidated*"))


def test_a_downloaded_model_needs_no_hub(hub):
    assert hub["cached"]["status"] == 0, hub["cached"]["stderr"]
    record = read_json(hub["root"] / "desk" / "cached" / "adapter_config.json")
    assert (record["base_model_name_or_path"], record["revision"]) == ("someone/single", COMMIT)


@pytest.mark.parametrize(
    "case, message",
    [
        ("unknown model", "someone/none"),
        ("unknown revision", "someone/single at revision v9"),
        ("no hub", "someone/other"),
        ("other weights", "only safetensors"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_nothing_is_written(hub, case, message):
    assert hub[case]["status"] == 2
    assert len(hub[case]["stderr"]) == 1
    assert message in hub[case]["stderr"][0]
    assert hub["folders"] == ["cached", "sharded", "single"]
