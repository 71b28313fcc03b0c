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
        ("a.toml", "run = 3", "run is a command, so it takes a table"),
        ("a.yaml", "run: [seed]", "run is a command, so it takes a table"),
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


def words_of(path, text, *words):
    path.write_text(text)
    return with_config([*words, "--config", str(path)], ROOT)


def test_tables_may_be_empty_and_nothing_else_stands_for_one(tmp_path):
    file = tmp_path / "a.yaml"
    assert words_of(file, "seed: 3\nrun:\n", "run") == ["run", "--seed=3"]
    assert words_of(file, "seed: 3\ncombos:\n", "run") == ["run", "--seed=3"]  # another command's
    for text in ("caa:\n", "caa: {ab: }\n", "caa ab:\n"):
        assert words_of(file, text, "caa", "ab") == ["caa", "ab"]
    assert words_of(file, "caa: {ab: {layers: 3}}", "caa", "ab") == ["caa", "ab", "--layers=3"]
    for text, key in (("caa: {ab: 3}", "caa.ab"), ("caa ab: 3", "caa ab"), ("caa: 3", "caa")):
        with pytest.raises(UserError, match=f"{key} is a command"):
            words_of(file, text, "caa", "ab")


def test_a_key_that_a_group_does_not_have_is_told(tmp_path):
    file = tmp_path / "a.yaml"
    for words in (("caa", "ab"), ("run",)):  # whoever reads the file
        with pytest.raises(UserError, match="caa has no command 'abb'; did you mean 'ab'"):
            words_of(file, "caa: {abb: {layers: 3}, ab: {layers: 4}}", *words)
        with pytest.raises(UserError, match=r"responses has no command 'layers'; .*expected one of extract, eval"):
            words_of(file, "responses: {layers: 3}", *words)
    assert words_of(file, "caa: {ab: {layers: 4}}", "caa", "ab") == ["caa", "ab", "--layers=4"]


def test_a_group_that_means_a_command_takes_its_options(tmp_path):
    file, text = tmp_path / "a.yaml", "export: {strength: 0.5, vector: {format: gguf}, checkpoint: {layers: '0:2'}}"
    assert words_of(file, text, "export") == ["export", "checkpoint", "--strength=0.5", "--layers=0:2"]
    assert words_of(file, text, "export", "vector") == ["export", "vector", "--format=gguf"]
    with pytest.raises(UserError, match="unknown option 'strenght'; did you mean 'strength'"):
        words_of(file, "export: {strenght: 0.5}", "export")


def test_a_command_that_is_an_option_too_is_read_as_either(tmp_path):
    file = tmp_path / "a.yaml"
    words = ["judge", "rows.json"]
    assert words_of(file, "judge: substring", *words) == [*words, "--judge=substring"]
    assert words_of(file, "judge: {judge: substring}", *words) == [*words, "--judge=substring"]


def test_a_device_map_is_a_table(tmp_path):
    text = '[device_map]\n"" = "cpu"\n"model.layers.0" = 1\n'
    (flag, given) = words_of(tmp_path / "a.toml", text, "run")[1].split("=", 1)
    assert flag == "--device-map" and json.loads(given) == {"": "cpu", "model.layers.0": 1}


@pytest.mark.parametrize(
    ("words", "is_given"),
    [
        (["run", "--seed", "3", "x/y"], True),
        (["run", "--seed=3", "--quick", "x/y"], True),
        (["run", "x/y", "--seed", "3"], True),
        (["run", "--", "x/y"], True),
        (["run", "--seed", "3"], False),  # the value of an option is no model
        (["run", "--quick"], False),
        (["caa", "ab", "--multipliers", "-1", "1"], False),
    ],
)
def test_a_model_on_the_command_line_wins_wherever_it_stands(tmp_path, words, is_given):
    found = words_of(tmp_path / "a.toml", 'model = "a/b"', *words)
    assert ("--model-path=a/b" in found) is not is_given


def test_what_the_file_says_stays_among_the_options(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("seed = 3")
    assert with_config(["run", "--config", str(file), "--", "x/y"], ROOT) == ["run", "--seed=3", "--", "x/y"]


def test_names_of_before_are_keys_too(tmp_path):
    assert words_of(tmp_path / "a.toml", 'what = "kl"', "plot", "run") == ["plot", "run", "--figure=kl"]
    assert words_of(tmp_path / "a.toml", 'ablate = "0-2"', "chat") == ["chat", "--directions=0-2"]
    assert words_of(tmp_path / "a.toml", 'what = "kl"', "plot", "run", "--figure", "kl") == [
        *("plot", "run", "--figure", "kl")
    ]
    with pytest.raises(UserError, match="unknown option 'what'"):
        words_of(tmp_path / "a.toml", 'what = "kl"', "run")
