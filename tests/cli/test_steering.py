"""What `caa` prints: layers in both ways of counting them, and the layer that was chosen."""

import json
import shutil
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.cli.tables import print_sweep
from refusal_mi.measures import ABPoint
from refusal_mi.recipes.caa_eval import ABResults, Changes, Choice
from refusal_mi.stats import Rate


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    pairs = [
        {
            "question": f"Is {'x' * n} a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes.",
            "answer_matching_behavior": "(A)" if n % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if n % 2 else "(A)",
        }
        for n in range(8)
    ]
    Path("pairs.json").write_text(json.dumps(pairs))
    Path("queries.json").write_text(json.dumps(["Why?", "How?"]))


def rows(shown: str) -> list[list[str]]:
    """The cells of a printed table."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]


def test_the_table_counts_layers_as_the_vectors_say(place, tiny_dir, capsys):
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--output-dir", "caa"]
    assert exit_status(["caa", "vectors", *model, "--pairs", "pairs.json", "--layers", "1", "4"]) == 0
    capsys.readouterr()
    options = ["--vector", "caa", "--pairs", "pairs.json", "--multipliers", "-1", "1", "--n-questions", "0"]
    assert exit_status(["caa", "ab", *model, *options]) == 0
    shown = [(int(row[0]), int(row[1])) for row in rows(capsys.readouterr().out)]
    assert shown == [(1, 2), (1, 2), (4, 5), (4, 5)]  # the output of block 4 is the last stream of a model of 5
    records = [json.loads(path.read_text()) for path in Path("caa").glob("vec_layer_*_metadata.json")]
    assert {(record["caa_layer"], record["layer"]) for record in records} == set(shown)
    assert {(record["caa_hook_name"], record["hook_name"]) for record in records} == {
        ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"),
        ("blocks.4.hook_resid_post", "blocks.4.hook_resid_post"),
    }


def test_pairs_that_made_a_vector_are_known_by_their_hash_wherever_it_lies(place, tiny_dir, capsys):
    given = json.loads(Path("pairs.json").read_text())
    for name, start in (("others", 8), ("held", 16)):
        longer = [{**pair, "question": "x" * start + pair["question"]} for pair in given]
        Path(f"{name}.json").write_text(json.dumps(longer))
    paths = "steering_vector_path: v/one.pt\nsave_vector_path: made\ntarget_layer: 1\n"
    Path("config.yaml").write_text(f"data_path:\n  generation: pairs.json\n{paths}")
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--config", "config.yaml"]
    assert exit_status(["caa", "vectors", *model]) == 0
    assert not Path("v/made_from_pairs.json").exists()
    ab = ["caa", "ab", *model, "--questions", "queries.json", "--max-new-tokens", "2", "--multipliers", "-1", "1"]
    for bare in (False, True):  # without the config's pairs those of --choose-on are enough
        if bare:
            Path("config.yaml").write_text(paths)
        capsys.readouterr()
        assert exit_status([*ab, "--pairs", "held.json", "--choose-on", "pairs.json", "--output-dir", "a"]) == 2
        assert "8 of the 8 pairs of pairs made the vectors" in capsys.readouterr().err
        assert exit_status([*ab, "--pairs", "held.json", "--choose-on", "others.json", "--output-dir", "b"]) == 0
        assert "made the vectors" not in capsys.readouterr().err
        assert exit_status([*ab, "--pairs", "pairs.json", "--choose-on", "others.json", "--output-dir", "c"]) == 0
        told = capsys.readouterr().err
        assert "warning: 8 of the 8 pairs of pairs, which are reported on, made the vectors" in told


def test_too_few_pairs_for_two_halves_are_one_line_before_the_model_is_loaded(place, tiny_dir, capsys, monkeypatch):
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--output-dir", "caa"]
    assert exit_status(["caa", "vectors", *model, "--pairs", "pairs.json", "--layers", "1"]) == 0
    given = json.loads(Path("pairs.json").read_text())
    ab = ["caa", "ab", *model, "--vector", "caa", "--pairs", "few.json", "--questions", "queries.json"]
    ab += ["--max-new-tokens", "2"]
    for n, is_enough in ((1, False), (2, False), (3, True)):  # the vectors were made from them: no choice on any
        Path("few.json").write_text(json.dumps(given[:n]))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            if not is_enough:
                patch.setattr("refusal_mi.model.loading.quiet_load", None)
            assert exit_status(ab) == 2
        assert ("few has too few pairs" in capsys.readouterr().err) is not is_enough
    Path("few.json").write_text(json.dumps(given[:1]))
    assert exit_status([*ab, "--n-questions", "0"]) == 0


def test_two_models_of_one_name_have_folders_of_their_own(place, tiny_dir, capsys):
    models = [shutil.copytree(tiny_dir("gpt2"), Path(parent) / "m") for parent in ("a", "b")]
    (models[1] / "vocab.txt").write_text("another")
    assert exit_status(["caa", "vectors", str(models[0]), "--pairs=pairs.json", "--layers=1", "--output-dir=v"]) == 0
    one = ["--vector=v/vec_layer_1_m.pt", "--allow-other-model"]
    ab = [*one, "--pairs=pairs.json", "--n-questions=0"]
    test = [*one, "--questions=queries.json", "--multipliers=1", "--max-new-tokens=2", "--layer=1"]
    for words, made in ((["ab", *ab], "ab_results.json"), (["test", *test], "test_summary.json")):
        for model in (*models, models[0]):
            assert exit_status(["caa", words[0], str(model), *words[1:], "--device=cpu"]) == 0
        found = sorted(Path("runs").glob(f"*/caa/{made}"))
        assert len(found) == 2 and found[0].parts[1] == "m"
        shutil.rmtree("runs")
        given = ["--device=cpu", "--output-dir=here"]
        assert exit_status(["caa", words[0], str(models[0]), *words[1:], *given]) == 0
        capsys.readouterr()
        assert exit_status(["caa", words[0], str(models[1]), *words[1:], *given]) == 2
        assert "here holds a run of" in capsys.readouterr().err
    words = ["--pairs=pairs.json", "--layers=1", "--device=cpu", "--output-dir=v"]
    assert [exit_status(["caa", "vectors", str(model), *words]) for model in models] == [0, 2]


def test_where_a_vector_was_read_is_said_only_where_it_is_added_elsewhere(place, tiny_dir, capsys):
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--output-dir", "caa"]
    assert exit_status(["caa", "vectors", *model, "--pairs", "pairs.json", "--layers", "1"]) == 0
    capsys.readouterr()
    options = ["--vector", "caa", "--questions", "queries.json", "--multipliers", "1", "--max-new-tokens", "2"]
    for layer, is_elsewhere in ((1, False), (0, True), (2, True)):
        assert exit_status(["caa", "test", *model, *options, "--layer", str(layer)]) == 0
        shown = capsys.readouterr().out
        assert f"output of block {layer} = blocks.{layer}.hook_resid_post = our {layer + 1}" in shown
        assert ("the vector was read at blocks.2.hook_resid_pre, our 2" in shown) is is_elsewhere


def test_the_layer_that_was_chosen_is_used_by_the_next_command(place, tiny_dir, capsys):
    model = [str(tiny_dir("gpt2")), "--device", "cpu", "--output-dir", "caa"]
    assert exit_status(["caa", "vectors", *model, "--pairs", "pairs.json", "--layers", "1", "3"]) == 0
    test = ["caa", "test", *model, "--vector", "caa", "--questions", "queries.json", "--multipliers", "1"]
    test += ["--max-new-tokens", "2"]
    assert exit_status(test) == 2 and "choose one with --layer, or run caa ab first" in capsys.readouterr().err
    ab = ["caa", "ab", *model, "--vector", "caa", "--pairs", "pairs.json", "--n-questions", "0"]
    assert exit_status(ab) == 0 and "no layer was chosen: there are no questions" in capsys.readouterr().out
    assert exit_status(test) == 2 and "caa ab chose no layer among [1, 3]" in capsys.readouterr().err
    path = Path("caa/ab_results.json")
    saved = json.loads(path.read_text())
    rate = {"count": 0, "n": 2}
    changes = dict.fromkeys(("p_plain", "p_added", "p_subtracted", "change_added", "change_subtracted"), 0.5)
    chosen = {"layer": 3, "multiplier": 1, "chosen_on": "made", "effect_there": 0.5, "tried_before": [], **changes}
    chosen |= {"degenerate_added": rate, "degenerate_subtracted": rate, "controls": {}}
    path.write_text(json.dumps({**saved, "chosen": chosen}))
    assert exit_status(test) == 0 and "layer 3 = output of block 3" in capsys.readouterr().out
    path.write_text(json.dumps({**saved, "chosen": {**chosen, "layer": "last"}}))
    assert exit_status(test) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "ab_results.json is damaged" in error and "chosen.layer" in error


def test_the_choice_is_printed_beside_its_controls(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    point = ABPoint(13, 1.5, 0.8, 0.7, 0.9, 0.3, 0.2, 0.4, 50)
    chosen = Choice(
        layer=13,
        multiplier=1.5,
        chosen_on="others",
        effect_there=0.25,
        degenerate_added=Rate(1, 100),
        degenerate_subtracted=Rate(2, 100),
        tried_before=(),
        controls={"shuffled labels": Changes(0.5, 0.51, 0.48, 0.01, -0.02)},
        **vars(Changes(0.5, 0.8, 0.1, 0.3, -0.4)),
    )
    print_sweep(ABResults("held out", 0.5, 50, (point,), "response", "caa", chosen))
    shown = capsys.readouterr().out
    assert rows(shown) == [["13", "14", "1.5", "0.800 [0.700, 0.900]", "+0.300 [+0.200, +0.400]"]]
    after = shown.splitlines()[-3:]
    assert (
        after[0].startswith("chosen on others: layer 13 = output of block 13") and "our 14, multiplier 1.5" in after[0]
    )
    assert after[1:] == [
        "on held out: adding changes p by +0.300, subtracting by -0.400; degenerate text 0.01 and 0.02",
        "shuffled labels: adding changes p by +0.010, subtracting by -0.020",
    ]
