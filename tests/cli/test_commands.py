"""The command line: bad input is one line and status 2, and nothing is half-written."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.cli.spelling import own_spelling
from refusal_mi.labels import Label
from refusal_mi.model.points import explain_writes, write_hooks
from tests.helpers.models import save_tiny
from tests.helpers.runs import make_run

SIZES = ["--n-train=10", "--n-val=8", "--n-test=2", "--no-filter", "--refusal-tokens=5,40", "--response-prefix="]


def fails(arguments, capsys) -> str:
    """The one line that a mistake prints."""
    capsys.readouterr()
    assert exit_status(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in captured.err and captured.out == ""
    return errors[0]


@pytest.fixture
def run_fails(tiny_dir, tmp_path, capsys):
    """Run on a tiny model with more arguments; it must fail and leave nothing behind but what is `kept`."""

    def fail(*arguments, model=None, kept=()):
        folder = tmp_path / "out"
        line = fails(["run", model or tiny_dir("gpt2"), *SIZES, "--output-dir", folder, *arguments], capsys)
        assert [file.name for file in folder.rglob("*")] == list(kept)
        return line

    return fail


@pytest.mark.parametrize(
    ("model", "message"),
    [("no-such-model", "leave MODEL out"), ("./missing", "neither a directory"), ("owner/name", "without a network")],
)
def test_unknown_models(run_fails, model, message):
    assert message in run_fails(model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harmful", "none.json"], "no such file: none.json"),
        (["--harmful", "harmfull"], "no such prompt set"),
        (["--harmless", "owner/prompts"], "without a network use a local file"),
        (["--text-set", "owner/texts"], "without a network use a local file"),
        (["--instruction-set", "plain_text"], "no column of answers"),
        (["--eval-set", "harmless"], "called harmless"),
        (["--harmful", "a,b"], "TRAIN,VAL,TEST"),
        (["--n-train", "9999"], "--n-train"),
        (["--n-val", "0"], "n_val must be at least 1"),
        (["--batch-size", "0"], "--batch-size takes auto or a positive number"),
        (["--batch-size", "many"], "--batch-size takes auto or a positive number"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--multi", "span"], "--directions"),
        (["--directions", "0", "--steps", "directions,selection"], "add completions or loss to --steps"),
        (["--refusal-tokens", "5,5"], "name a token twice"),
        (["--refusal-tokens", "5,999999"], "no token 999999"),
        (["--refusal-tokens", "I"], "token ids such as 40,2121"),
        (["--template-kwargs", "x"], "K=V"),
        (["--template-kwargs", "tokenize=true"], "reserved"),
        (["--template-kwargs", "mood=glad"], "does not use 'mood'"),
        (["--prune-layers", "1.5"], "prune_layers"),
        (["--kl-max", "-1"], "kl_max"),
        (["--kl-max", "low"], "--kl-max"),
        (["--kl-max", "nan"], "kl_max must be a finite number"),
        (["--induce-min", "inf"], "induce_min must be a finite number"),
        (["--no-such-option"], "--no-such-option"),
        (["--model-path", "elsewhere"], "given twice"),
        (["--eval-set", "none.csv"], "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(run_fails, arguments, message):
    assert message in run_fails(*arguments)


def test_the_column_is_that_of_files_and_of_the_evaluation_set(run_fails, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([{"ask": "Hi", "prompt": "Bye"}]))
    for option in ("--harmful", "--eval-set"):
        assert "own has no column 'none'; it has ask, prompt" in run_fails(
            option, tmp_path / "own.json", "--column=none"
        )


def test_a_folder_that_cannot_be_written_shows_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("refusal_mi.model.loading.quiet_load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "file is not a folder" in fails(["run", "--output-dir", folder], capsys)


def test_an_empty_prompt_file(run_fails, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    assert "0 prompts" in run_fails("--harmful", tmp_path / "empty.json")


def test_a_model_without_a_chat_template(run_fails, tmp_path):
    save_tiny("gpt2", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert "no chat template" in run_fails(model=tmp_path / "base")


def test_a_system_message_that_the_template_refuses(run_fails, tmp_path):
    save_tiny("gpt2", tmp_path / "strict")
    template = tmp_path / "strict" / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    assert "no system role" in run_fails("--system", "Be brief.", model=tmp_path / "strict")


def test_fewer_than_8_prompts_after_the_filter_names_no_filter(run_fails):
    line = run_fails("--filter", "--calibration=published")
    assert "--no-filter" in line and "8 are needed" in line


def test_a_model_that_does_not_refuse_names_refusal_tokens(tiny_dir, tmp_path, capsys):
    (tmp_path / "same.json").write_text(json.dumps([f"Say the number {n}" for n in range(12)]))
    arguments = ["--harmful", tmp_path / "same.json", "--harmless", tmp_path / "same.json"]
    sizes = ["--n-train=6", "--n-val=3", "--n-test=3", "--no-filter", "--response-prefix="]
    folder = tmp_path / "out"
    line = fails(["run", tiny_dir("gpt2"), *arguments, *sizes, "--output-dir", folder], capsys)
    assert "--refusal-tokens" in line and [file.name for file in folder.iterdir()] == ["labels.json"]


ROW = {"position": -1, "refusal_score": 1.0, "steering_score": 2.0, "kl_div_score": 0.05}


@pytest.fixture
def score_file(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps([ROW | {"layer": layer, "refusal_score": float(layer)} for layer in range(5)]))
    return path


def test_select_chooses_from_saved_scores(score_file, capsys):
    assert exit_status(["select", str(score_file), "--n-layers", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in found["survivors"]] == [0, 1, 2, 3]
    assert exit_status(["select", str(score_file), "--n-layers", "5", "--kl-max", "0.01"]) == 1
    assert "0 of 5 candidates survive" in capsys.readouterr().out
    assert exit_status(["select", str(score_file), "--n-layers", "5", "--kl-max", "0.01", "--no-thresholds"]) == 0


def test_select_takes_a_run_folder_and_reads_there_how_many_blocks_there_are(tmp_path, capsys):
    make_run(tmp_path / "run", reached="selection")
    file = tmp_path / "run" / "select_direction" / "direction_evaluations.json"
    shown = []
    n_layers = json.loads((file.parent / "baseline.json").read_text())["n_layers"]
    for words in ([tmp_path / "run"], [file], [file, "--n-layers", n_layers]):
        assert exit_status(["select", *map(str, words), "--json"]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1 and json.loads(shown[0])["survivors"]
    (file.parent / "baseline.json").unlink()
    assert "give --n-layers" in fails(["select", tmp_path / "run"], capsys)


def test_infinity_switches_a_threshold_off(score_file, capsys):
    score_file.write_text(json.dumps([ROW | {"layer": 0, "kl_div_score": 9.0, "steering_score": -9.0}]))
    off = ["--kl-max", "inf", "--induce-min", "-inf"]
    for arguments, status in ((off, 0), (off[:2], 1), (off[2:], 1)):
        assert exit_status(["select", str(score_file), "--n-layers", "5", *arguments]) == status


def test_select_refuses_a_layer_that_the_model_does_not_have(score_file, tmp_path, capsys):
    assert "layer 4, which a model of 3 layers does not have" in fails(["select", score_file, "--n-layers", 3], capsys)
    assert "no such file" in fails(["select", tmp_path / "none.json", "--n-layers", 3], capsys)


@pytest.mark.parametrize("top", [0, -2])
def test_select_shows_at_least_one_survivor(score_file, capsys, top):
    assert f"--top must be at least 1, not {top}" in fails(
        ["select", score_file, "--n-layers", 5, "--top", top], capsys
    )
    assert exit_status(["select", str(score_file), "--n-layers", "5", "--top", "1"]) == 0
    assert "│ 1 " not in capsys.readouterr().out


def test_underscore_spellings_are_the_same_options(score_file, capsys):
    for spelling in (["--n_layers", "5"], ["--n_layers=5"], ["--n-layers=5"]):
        assert exit_status(["select", str(score_file), *spelling, "--kl_max", "0.2", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["survivors"]) == 4


def test_underscores_in_values_are_left_alone(tiny_dir, tmp_path, capsys):
    line = fails(["run", "--model_path", tiny_dir("gpt2"), *SIZES, "--harmful=my_own_set.json"], capsys)
    assert "my_own_set.json" in line


def test_model_info_shows_what_the_package_sees(tiny_dir, tmp_path, capsys):
    assert exit_status(["model-info", str(tiny_dir("gpt2")), "--json", "--no-discover"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_layers"] == 5 and facts["post_instruction_positions"] == [-5, -4, -3, -2, -1]
    assert len(facts["writers"]) == 11 and facts["model_type"] == "gpt2"
    shutil.copytree(tiny_dir("gpt2"), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert "no chat template" in fails(["model-info", tmp_path / "base"], capsys)


def test_model_info_fits_a_screen_however_many_blocks_there_are(tiny_dir, monkeypatch, capsys):
    """Counts and ranges, which stand for all of the names that --json lists."""
    monkeypatch.setenv("COLUMNS", "100")
    assert exit_status(["model-info", str(tiny_dir("gpt2")), "--no-discover", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["writers"]
    assert exit_status(["model-info", str(tiny_dir("gpt2")), "--no-discover"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24 and "blocks.3.hook_mlp_out" not in shown
    words = " ".join(shown.replace("│", " ").split())
    assert "embedding, 5 attention outputs, 5 MLP outputs" in words
    ranges = re.findall(r"blocks\.\{0\.\.(\d+)\}\.(\w+)", words)
    listed = [f"blocks.{block}.{point}" for last, point in ranges for block in range(int(last) + 1)]
    assert sorted(["blocks.0.hook_resid_pre", *listed]) == sorted(names) and len(names) == 11
    assert len(explain_writes(24)) == len(explain_writes(80)) < 150 < len(", ".join(write_hooks(24)))


def test_model_info_looks_for_refusal_tokens_after_the_response_prefix(tiny_dir, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("refusal_mi.generation.discover_response_prefix", lambda *_: "Ok ")
    answers = [Label("I cannot", (5, 6), True), Label("Sure", (7,), False)]
    monkeypatch.setattr("refusal_mi.labels.label_prompts", lambda model, chat, asks: seen.append(chat) or answers)
    assert exit_status(["model-info", str(tiny_dir("gpt2")), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [chat.response_prefix for chat in seen] == ["Ok ", "Ok "] and facts["response_prefix"] == "Ok "
    assert len(facts["refusal_tokens"]) == 1 and facts["refusal_tokens"][0].startswith("5 ")
    assert facts["refused_by_text"] == "harmful 0.50 [0.09, 0.91] of 2, harmless 0.50 [0.09, 0.91] of 2"
    assert facts["post_instruction_positions"] == list(range(-8, 0))


@pytest.mark.parametrize("option", ["--output-dir", "--harmful", "--eval-set", "--multi", "--refusal-tokens"])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_an_empty_value_is_no_default(option, joined, blank, tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [f"{option}={blank}"] if joined else [option, blank]
    assert f"{option} was given an empty value" in fails(["run", tiny_dir("gpt2"), *given], capsys)
    assert not list(tmp_path.iterdir())


def test_an_empty_system_message_is_one(score_file):
    assert own_spelling(["chat", "--system", "", "--response-prefix="]) == [
        "chat",
        "--system",
        "",
        "--response-prefix=",
    ]


def test_an_interrupt_is_status_130(score_file, monkeypatch, capsys):
    from refusal_mi.search import grid as selection

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "select", interrupted)
    assert exit_status(["select", str(score_file), "--n-layers", "5"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    [
        "import refusal_mi",
        "from refusal_mi.cli import exit_status; exit_status(['--help']); exit_status(['run', '--help'])",
    ],
)
def test_import_and_help_need_no_torch(code):
    check = (
        "import sys; print('heavy:', [n for n in ('torch', 'transformers', 'transformer_lens') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_version_is_the_installed_one(capsys):
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["refusal-mi", version("refusal_mi")]


def help_at_80_columns(monkeypatch, capsys, *command):
    """What --help prints in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_status([*command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("group", "n_commands"), [((), 20), (("caa",), 3), (("responses",), 2), (("export",), 2)])
def test_no_summary_of_a_command_is_cut(monkeypatch, capsys, group, n_commands):
    shown = help_at_80_columns(monkeypatch, capsys, *group)
    summaries = shown.partition("Commands:\n")[2].splitlines()
    assert len(summaries) == n_commands and all(line.endswith(".") for line in summaries)
    assert "..." not in shown.partition("\n")[2]


def test_the_help_of_what_names_every_analysis(monkeypatch, capsys):
    from refusal_mi.analysis import KINDS

    option = help_at_80_columns(monkeypatch, capsys, "analyze").partition("--what")[2].partition("--n-prompts")[0]
    assert " ".join(option.split()).count(", ".join(KINDS)) == 1
