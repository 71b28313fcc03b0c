"""Tables in the terminal: the layer that is shown is the layer that was read."""

import json
import re
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.text.pairs import ABPair

LAYERS = (1, 3, 4)
"""CAA's: outputs of these blocks, of five."""


@pytest.fixture
def shown(tiny_dir, tmp_path):
    """The folder of the vectors, the model, and the options that both commands are given."""
    folder, model = tmp_path, str(tiny_dir("gpt2"))
    question = "Is {} a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes."
    answers = [("(A)", "(B)"), ("(B)", "(A)")] * 2
    pairs = [ABPair(question.format("x" * n), *pair).describe() for n, pair in enumerate(answers)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    common = ["--pairs", str(folder / "pairs.json"), "--output-dir", str(folder / "vectors"), "--device", "cpu"]
    return folder, model, common


def run(capsys, *words: str) -> str:
    assert exit_status(words) == 0
    return capsys.readouterr().out


def place_read(folder: Path, layer: int) -> int:
    """Our layer, by the name of the hook point beside the vector of CAA's layer: the last is read as it is left."""
    (path,) = (folder / "vectors").glob(f"vec_layer_{layer}_*_metadata.json")
    block, side = re.fullmatch(
        r"blocks\.(\d+)\.hook_resid_(pre|post)", json.loads(path.read_text())["hook_name"]
    ).groups()
    return int(block) + (side == "post")


def test_the_tables_of_caa_name_both_layers_of_every_row(shown, capsys):
    folder, model, common = shown
    lines = run(capsys, "caa", "vectors", model, *common, "--layers", *map(str, LAYERS)).splitlines()
    said = [tuple(map(int, re.search(r"block (\d+).*?our (\d+)", line).groups())) for line in lines if "our" in line]
    expected = [(layer, place_read(folder, layer)) for layer in LAYERS]
    assert said == expected and all(ours == theirs + 1 for theirs, ours in expected)
    table = run(capsys, "caa", "ab", model, *common, "--vector", str(folder / "vectors"), "--n-questions", "0")
    rows = re.findall(r"^│\s*(\d+)\s*│\s*(\d+)\s*│\s*(-?\d+)\s*│", table, re.MULTILINE)
    assert rows == [(str(theirs), str(ours), m) for theirs, ours in expected for m in ("-1", "0", "1")]
    record = json.loads((folder / "vectors" / "ab_results.json").read_text())
    assert [(row["layer"], row["multiplier"]) for row in record["rows"]] == [(int(a), float(m)) for a, _, m in rows]
