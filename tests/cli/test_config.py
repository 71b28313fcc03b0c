"""--config: options from a file are those of the command line, which wins."""

import json

import pytest

from refusal_mi.cli import app, exit_status
from refusal_mi.cli.config import with_config
from refusal_mi.cli.shown import plain_command
from refusal_mi.errors import UserError
from refusal_mi.files import write_json

ROOT = plain_command(app)
TOML = """
model = "owner/name"
n_train = 64
filter = false
quick = true
seed = 7

[combos]
ranks = "0..2"

["caa ab"]
layers = [1, "3:5"]
"""
YAML = """
model: owner/name
n-train: 64
filter: false
quick: true
seed: 7
combos: {ranks: 0..2}
caa: {ab: {layers: [1, '3:5']}}
"""
WORDS = {"--model-path=owner/name", "--n-train=64", "--no-filter", "--quick", "--seed=7"}


@pytest.fixture(params=[("options.toml", TOML), ("options.yaml", YAML)], ids=["toml", "yaml"])
def file(request, tmp_path):
    path = tmp_path / request.param[0]
    path.write_text(request.param[1])
    return str(path)


def test_keys_are_options_of_the_command(file):
    for words in (["run", "--config", file], ["--config", file, "run"], ["run", f"--config={file}"]):
        first, *others = with_config(words, ROOT)
        assert first == "run" and set(others) == WORDS


def test_the_command_line_wins(file):
    words = with_config(["run", "here", "--config", file, "--n_train", "9", "--filter"], ROOT)
    assert words[:2] == ["run", "here"] and words.count("--n-train") == 1 and "--filter" in words
    assert {"--quick", "--seed=7"} == set(words) - {"run", "here", "--n-train", "9", "--filter"}


def test_a_table_is_for_its_command(tmp_path):
    for name, text in (("a.toml", TOML[TOML.index("[combos]") :]), ("a.yaml", YAML[YAML.index("combos:") :])):
        (tmp_path / name).write_text(text)
        file = str(tmp_path / name)
        assert with_config(["combos", "--config", file], ROOT) == ["combos", "--ranks=0..2"]
        assert with_config(["caa", "ab", "--config", file], ROOT) == ["caa", "ab", "--layers=1,3:5"]
        assert with_config(["run", "--config", file], ROOT) == ["run"]


def test_the_file_does_what_the_words_do(tmp_path, capsys):
    row = {"position": -1, "layer": 0, "refusal_score": 0.0, "steering_score": 1.0, "kl_div_score": 0.05}
    write_json(tmp_path / "grid.json", [row])
    (tmp_path / "strict.toml").write_text("n_layers = 5\nkl_max = 0.01\n")
    words = ["select", str(tmp_path / "grid.json")]
    assert exit_status([*words, "--config", str(tmp_path / "strict.toml")]) == 1
    assert exit_status([*words, "--config", str(tmp_path / "strict.toml"), "--kl-max", "0.1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["survivors"]) == 1


def test_several_values_and_pairs(tmp_path):
    (tmp_path / "a.yaml").write_text("prompt: [Hi, Ho]\ntemplate_kwargs: {thinking: false, mood: glad}\n")
    words = with_config(["chat", "--config", str(tmp_path / "a.yaml")], ROOT)
    assert words[1:] == [
        "--prompt=Hi",
        "--prompt=Ho",
        "--template-kwargs=thinking=false",
        "--template-kwargs=mood=glad",
    ]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.toml", "n_trian = 3", "unknown option 'n_trian'; did you mean 'n_train'"),
        ("a.toml", "n_train = ", "is not TOML"),
        ("a.yaml", "- a", "names of options"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "quick: 3", "--quick is on or off"),
        ("a.yaml", "seed: true", "--seed takes N"),
        ("a.json", "{}", "ending in .toml"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as told:
        with_config(["run", "--config", str(tmp_path / name)], ROOT)
    assert problem in str(told.value)


def test_the_write_ups_config_stays_what_caa_reads_itself(tmp_path):
    (tmp_path / "config.yaml").write_text("model_path: m\ndata_path:\n  test: q.json\ntarget_layer: 13\n")
    file = str(tmp_path / "config.yaml")
    assert with_config(["caa", "test", "--config", file], ROOT) == ["caa", "test", "--config", file]
    assert with_config(["run"], ROOT) == ["run"]
