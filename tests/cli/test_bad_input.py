"""What can be wrong with a recipe's command: one line that says what to do, status 2, nothing left behind."""

import json
from pathlib import Path

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.files import read_tensors, write_json


@pytest.fixture
def fails(tiny_dir, tmp_path, monkeypatch, capsys):
    """Run a command on a tiny model ("MODEL"); it must fail with one line and write nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "queries.json").write_text(json.dumps([f"Say {n}" for n in range(24)]))
    torch.save(torch.ones(32), tmp_path / "bare.pt")

    def fail(line: str) -> str:
        there = sorted(tmp_path.rglob("*"))
        words = [str(tiny_dir("gpt2")) if word == "MODEL" else word for word in line.split()]
        assert exit_status(words) == 2
        captured = capsys.readouterr()
        errors = [text for text in captured.err.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1 and captured.out == "" and "Traceback" not in captured.err
        assert sorted(tmp_path.rglob("*")) == there
        return errors[0]

    return fail


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model-info MODEL --dtype int8", "error: --dtype takes auto, float32, bfloat16, float16 or float64, not"),
        ("model-info MODEL --device tpu", "--device takes auto, cuda, mps or cpu, not 'tpu'"),
        ("model-info MODEL --revision main", "is a directory and has no revisions"),
        ("model-info nowhere", "leave MODEL out for the embedded model"),
        ("model-info owner/name", "without a network"),
        ("model-info MODEL --model-path other", "given twice"),
        ("combos MODEL --kl-max nan", "kl_max must be a number from 0 on"),
        ("combos MODEL --n-random -1", "n_random must not be negative"),
        ("combos MODEL --judge-model x", "--judge-model needs --judge"),
        ("combos MODEL --output-dir file", "file is not a folder; choose another --output-dir"),
        ("vector MODEL --dataset queries.json --output-dir file/x", "file is not a folder"),
        ("vector MODEL --dataset queries.json --n-samples 25", "24 prompts, but 25 were asked for"),
        ("vector MODEL --dataset none.json", "no such file: none.json"),
        ("vector MODEL --dataset queries.json --column ask", "no column 'ask'"),
        ("vector MODEL --dataset queries.json --layers 9", "layer 9 does not exist"),
        ("vector MODEL --judge nobody", "--judge takes substring, evade"),
        ("vector MODEL --judge llamaguard", "says what is harmful, not what is refused"),
        ("vector MODEL --dataset alpaca", "cannot load the dataset tatsu-lab/alpaca from the hub"),
        ("vector-eval MODEL", "make it with refusal-mi responses extract"),
        ("vector-eval MODEL --layer 1.5", "--choose-layer takes auto, sound or a number"),
        ("caa vectors MODEL --output-dir file", "file is not a folder"),
        ("caa vectors MODEL --pairs none.json", "no such file"),
        ("caa vectors MODEL --batch-size 0", "--batch-size"),
        ("caa vectors MODEL --layers 7", "no block 7: CAA's layers of this model are 0..4"),
        ("caa vectors MODEL --config folder", "cannot read folder"),
        ("caa vectors nowhere --config none.yaml", "no such file: none.yaml"),
        ("caa test MODEL", "make vectors with refusal-mi caa vectors"),
        ("caa test MODEL --vector folder", "make them with refusal-mi caa vectors"),
        ("caa test MODEL --vector bare.pt", "--layer"),
        ("caa test MODEL --vector file --hook blocks.1.hook_resid_post", "not a file of plain tensors"),
        ("caa test MODEL --n-questions 0", "--n-questions"),
        ("caa ab MODEL --multipliers one", "--multipliers takes numbers"),
        ("chat MODEL --prompt Hi --coefficient 2", "--coefficient says how to add --steer FILE"),
        ("chat MODEL --prompt Hi --positions all", "--positions says how to add --steer FILE"),
        ("chat MODEL --prompt Hi --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("chat MODEL --prompt Hi --steer bare.pt --layer 1 --coefficient nan", "must be a finite number"),
        ("chat MODEL --prompt=", "--prompt takes a text"),
        ("judge folder", "folder has no completions: run its step completions first"),
        ("judge queries.json", "a list of objects with the texts prompt and response"),
        ("compare file bare.pt", "not a file of plain tensors"),
        ("caa nothing", "No such command"),
    ],
)
def test_one_line(fails, line, message):
    assert message in fails(line)


def test_a_group_without_its_command_shows_its_help(capsys):
    assert exit_status(["caa"]) == 2
    shown = capsys.readouterr().err
    assert "vectors" in shown and "error:" not in shown and len(shown.splitlines()) > 5


def test_no_advice_to_run_what_is_in_a_file(tmp_path):
    (tmp_path / "x.pt").write_text("no tensors")
    with pytest.raises(UserError) as caught:
        read_tensors(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_the_callers_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            write_json(path, {})
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]
