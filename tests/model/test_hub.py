"""Models and datasets from a hub on localhost: found, pinned to a commit, not found, out of reach."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.hub import COMMIT, run_with_hub
from tests.helpers.models import save_tiny

pytestmark = pytest.mark.slow

# Runs in a process of its own, where the runtime type checker is off, as for users, so that values outside a Literal
# reach the package's own message.
SCRIPT = """
import json, os, sys, time, urllib.request, warnings
from contextlib import redirect_stderr
from io import StringIO

import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None  # retries need not wait

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.model.loading import load_model
from refusal_mi.model.points import model_revision
from refusal_mi.text.prompts import load_prompts
from refusal_mi.files import as_json
from refusal_mi.model.provenance import describe_model

def message(function):
    try:
        function()
    except UserError as error:
        return str(error)

def command(*arguments):
    captured = StringIO()
    with redirect_stderr(captured):
        status = exit_status(arguments)
    return {"status": status, "stderr": captured.getvalue().splitlines()}

def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught if "hub" in str(each.message)]

def rows(prompts):
    return [[prompt.instruction, prompt.output] for prompt in prompts.prompts]

model = load_model("someone/tiny", revision="v1", device="cpu")
found = {
    "model": as_json(describe_model(model, "someone/tiny")),
    "revision": model_revision(model),
    "own set": rows(load_prompts("someone/asks")),
    "own set, column": rows(load_prompts("someone/asks", column="id")),
    "own set, no column": message(lambda: load_prompts("someone/asks", column="none")),
    "alpaca": rows(load_prompts("alpaca")),
    "alpaca, 4 rows": rows(load_prompts("alpaca", limit=4)),
    "unknown set": message(lambda: load_prompts("someone/none")),
    "unknown revision": message(lambda: load_model("someone/tiny", revision="v9")),
    "unknown model": command("run", "someone/none", "--output-dir", "unknown"),
    "bad device": command("run", sys.argv[1], "--device", "tpu", "--output-dir", "device"),
    "bad dtype": command("run", sys.argv[1], "--dtype", "int8", "--output-dir", "dtype"),
    "bad step": command("run", sys.argv[1], "--steps", "directions,dance", "--output-dir", "step"),
}
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/__stop__").read()
time.sleep(0.3)
found |= {
    "no hub": command("run", "someone/other", "--output-dir", "no-hub"),
    "no hub for prompts": command("run", sys.argv[1], "--harmful", "someone/never", "--output-dir", "no-prompts"),
    "cached": model_revision(load_model("someone/tiny", revision="v1", device="cpu")),
    "warned": warned(lambda: load_model("someone/tiny", revision="v1", device="cpu")),
    "not warned": warned(lambda: load_model(sys.argv[1], device="cpu")),
    "folders": sorted(os.listdir()),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process saw of a hub that was there, and then was not."""
    root = tmp_path_factory.mktemp("hub")
    save_tiny("gpt2", root / "model")
    (root / "asks").mkdir()
    lines = [json.dumps({"id": f"q{n}", "prompt": f"Question {n}"}) for n in range(3)]
    (root / "asks" / "train.jsonl").write_text("\n".join(lines))
    (root / "alpaca" / "data").mkdir(parents=True)
    rows = [{"instruction": f"Do {n}", "input": "this" if n % 2 else "", "output": f"Done {n}"} for n in range(6)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), root / "alpaca" / "data" / "train-00000-of-00001.parquet"
    )
    repositories = {
        "models/someone/tiny": root / "model",
        "datasets/someone/asks": root / "asks",
        "datasets/tatsu-lab/alpaca": root / "alpaca",
    }
    return run_with_hub(repositories, root, SCRIPT, str(root / "model"))


def test_a_model_is_loaded_by_id_and_revision_and_its_commit_is_recorded(found):
    assert any(f"/someone/tiny/resolve/{COMMIT}/model.safetensors 200" in line for line in found["requests"])
    assert found["revision"] == COMMIT == found["model"]["revision"]
    assert found["model"]["fingerprint"] is None and found["model"]["model_type"] == "gpt2"


def test_a_dataset_is_loaded_by_id(found):
    assert found["own set"] == [[f"Question {n}", None] for n in range(3)]
    assert found["own set, column"] == [[f"q{n}", None] for n in range(3)]
    assert "no column 'none'; it has id, prompt" in found["own set, no column"]


def test_alpaca_is_the_rows_without_an_input_with_their_outputs(found):
    assert found["alpaca"] == [[f"Do {n}", f"Done {n}"] for n in (0, 2, 4)]
    assert found["alpaca, 4 rows"] == [[f"Do {n}", f"Done {n}"] for n in (0, 2)]


def test_what_the_hub_does_not_have_is_a_user_error(found):
    assert "cannot load the dataset someone/none" in found["unknown set"]
    assert "someone/tiny at revision v9" in found["unknown revision"]


@pytest.mark.parametrize(
    "case", ["unknown model", "no hub", "no hub for prompts", "bad device", "bad dtype", "bad step"]
)
def test_the_command_line_says_it_in_one_line_and_writes_nothing(found, case):
    assert found[case]["status"] == 2
    assert len(found[case]["stderr"]) == 1 and found[case]["stderr"][0].startswith("error: ")
    assert found["folders"] == []


def test_a_model_in_the_cache_needs_no_hub(found):
    assert found["cached"] == COMMIT
    assert found["warned"] == [f"the hub does not answer: someone/tiny is taken from its cache, commit {COMMIT}"]
    assert found["not warned"] == []


def test_values_outside_the_choices_are_named(found):
    assert "--device takes auto, cuda, mps or cpu, not 'tpu'" in found["bad device"]["stderr"][0]
    assert "--dtype takes auto, float32, bfloat16, float16 or float64, not" in found["bad dtype"]["stderr"][0]
    assert "dance" in found["bad step"]["stderr"][0]
