"""docs/write-ups.md: the commands that it names are read as they stand, and the keys are those of our records."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from refusal_mi.cli import app
from refusal_mi.cli.config import with_config
from refusal_mi.cli.shown import plain_command
from refusal_mi.cli.steering import published_place
from refusal_mi.measures import LossResult
from refusal_mi.recipes.caa_open import SteeredAnswer
from refusal_mi.recipes.options import KEYS
from refusal_mi.recipes.responses import Response, VectorMetadata, default_dataset
from refusal_mi.recipes.responses_eval import EvalSummary, LayerScore, LayerScores, RefusalRates
from refusal_mi.text import prompts
from refusal_mi.text.pairs import KEYS as PAIR_KEYS

PAGE = (Path(__file__).parents[2] / "docs" / "write-ups.md").read_text()
COMMANDS = re.findall(r"`refusal-mi ([^`]+)`", PAGE)
ROOT = plain_command(app)


def read(line: str) -> dict:
    """The values of the options and arguments of a command line."""
    words = with_config(line.split(), ROOT)
    command = ROOT
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context("x", words).params


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_is_read(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("target_layer: 13\n")
    assert read(line)


def test_what_the_published_options_say_is_what_is_understood():
    made = read(next(line for line in COMMANDS if line.startswith("responses extract")))
    given = {"model_path": "M", "n_samples": 50, "n_completions": 15, "max_new_tokens": 128, "seed": 12345}
    assert {name: made[name] for name in given} == given and made["batch_size"] == 4
    tested = read(next(line for line in COMMANDS if line.startswith("responses eval")))
    assert tested["coefficients"] == "0.0,0.5,1.0" and (tested["validation_seed"], tested["test_seed"]) == (200, 100)
    assert read("chat --model_path M --vectors_ablated 0-2")["vectors_ablated"] == "0-2"
    with pytest.raises(Exception, match="no-such"):
        read("run --no_such_option 3")


def keys(start: str) -> list[str]:
    """The keys that the page names in the row that begins so, after the colon."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{start}"))
    return re.findall(r"`([a-z_.]+)`", row.split("|")[1].split(":", 1)[1])


@pytest.mark.parametrize(
    ("start", "records"),
    [
        ("metadata.json", [VectorMetadata]),
        ("compliant_responses.json", [Response]),
        ("layer_selection_scores.json", [LayerScores, LayerScore]),
        ("eval_summary.json", [EvalSummary, RefusalRates]),
        ("test_results_x", [SteeredAnswer]),
        ("loss_evals/", [LossResult]),
    ],
)
def test_the_published_keys_are_those_of_our_records(start, records):
    named = keys(start)
    assert len(named) >= 3 and set(named) <= {each.name for record in records for each in fields(record)}


def test_the_keys_of_the_config_and_of_the_pairs():
    assert tuple(keys("config.yaml")) == KEYS and tuple(keys("datasets/")) == PAIR_KEYS


def test_a_pasted_folder_is_where_the_first_command_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pasted = Path("pipeline/runs/Llama-2-7b-chat-hf/harmless_refusal_vectors")
    hub = "meta-llama/Llama-2-7b-chat-hf"
    here = Path("runs/meta-llama--Llama-2-7b-chat-hf/harmless_refusal_vectors")
    assert published_place(pasted, hub) == here and str(here) in capsys.readouterr().err
    (tmp_path / "Llama-2-7b-chat-hf").mkdir()
    (tmp_path / "Llama-2-7b-chat-hf" / "config.json").write_text("{}")
    local = str((tmp_path / "Llama-2-7b-chat-hf").resolve())
    assert published_place(pasted, local) == Path(*pasted.parts[1:])
    assert published_place(pasted, "other/model") == pasted  # another model's folder stays what it is
    pasted.mkdir(parents=True)
    assert published_place(pasted, hub) == pasted


def test_without_a_hub_the_bundled_queries_stand_for_alpaca(monkeypatch):
    """HF_HUB_OFFLINE and an empty cache, as the tests run: a warning, and the set that ships."""
    said = []

    def offline(name, **_):
        raise prompts.UserError("no network")

    monkeypatch.setattr("refusal_mi.recipes.responses.load_prompts", offline)
    assert default_dataset("owner/name", said.append) == "harmless"
    assert len(said) == 1 and "bundled set harmless" in said[0] and "no network" in said[0]
    monkeypatch.setattr("refusal_mi.recipes.responses.load_prompts", lambda name, **_: None)
    assert default_dataset("owner/name", said.append) == "alpaca" and len(said) == 1
