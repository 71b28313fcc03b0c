"""A user's function as the estimator: handed over in Python, or named on the command line."""

from dataclasses import replace

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction, DirectionGrid, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.estimators.named import estimator_named
from refusal_mi.estimators.samples import EveryPlace
from refusal_mi.export.export import export_checkpoint
from refusal_mi.figures.scores import plot_scores
from refusal_mi.files import read_json, read_tensors
from refusal_mi.interventions import Ablate
from refusal_mi.loaded import load_run
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.reading import sample_activations
from refusal_mi.recipes.arditi import run
from refusal_mi.recipes.combinations import run_combos
from refusal_mi.recipes.search import named_estimator
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.options import CombosOptions, RunOptions, command_line
from refusal_mi.run.stages import RunFolder
from refusal_mi.search.thresholds import NO_THRESHOLDS
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction

OPTIONS = RunOptions(
    n_train=6,
    n_val=3,
    n_test=3,
    filter_prompts=False,
    refusal_tokens=(5, 40),
    response_prefix="",
    batch_size=16,
    steps=("directions", "selection"),
    thresholds=NO_THRESHOLDS,
)
WORDS = [
    *("--n-train=6", "--n-val=3", "--n-test=3", "--no-filter", "--refusal-tokens=5,40", "--no-thresholds"),
    *("--steps=directions,selection", "--quick"),
]
MODULE = """
from dataclasses import replace
from refusal_mi.directions import difference_in_means
from refusal_mi.estimators.samples import sees_prompts

def scaled(harmful, harmless):
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors={factor} * grid.vectors)

def narrow(harmful, harmless):
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors=grid.vectors[:, :1])

def fails(harmful, harmless):
    raise RuntimeError("no such thing")

def lost(harmful, harmless):
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors=float("nan") * grid.vectors)

def unmarked(harmful, harmless):
    return replace(difference_in_means(harmful, harmless), is_degenerate=())

def unmarked_samples(harmful, harmless):
    return harmful.prompts

@sees_prompts
def first_pair(harmful, harmless):
    vectors = (harmful.prompts[0] - harmless.prompts[0]).double()
    return replace(difference_in_means(harmful.means, harmless.means), vectors=vectors)

def late(harmful, harmless):
    import no_such_helper_here

number = 3
"""


def turned(harmful, harmless):
    """Not a multiple of the difference of means."""
    grid = difference_in_means(harmful, harmless)
    return replace(grid, vectors=grid.vectors.roll(1, -1))


def candidates(folder):
    made = folder / "generate_directions"
    return read_tensors(made / "mean_diffs.pt"), read_json(made / "mean_diffs.json")["method"]


@pytest.fixture(scope="module")
def source(tiny_dir):
    return str(tiny_dir("llama").resolve())


def test_a_function_makes_the_candidates_that_are_scored(tiny_model, source, tmp_path):
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path / "plain"))
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path / "turned"), estimator=turned)
    plain, turned_ones = candidates(tmp_path / "plain"), candidates(tmp_path / "turned")
    torch.testing.assert_close(turned_ones[0], plain[0].roll(1, -1))
    assert (plain[1], turned_ones[1]) == ("difference in means, harmful - harmless", f"{__name__}:turned")
    scores = [
        read_json(tmp_path / name / "select_direction/direction_evaluations.json") for name in ("plain", "turned")
    ]
    assert scores[0] != scores[1]
    best = read_json(tmp_path / "turned/direction_metadata.json")
    chosen = read_tensors(tmp_path / "turned/direction.pt")
    torch.testing.assert_close(chosen.double(), turned_ones[0][best["pos"], best["layer"]])


def longer(factor):
    def scaled(harmful, harmless):
        grid = difference_in_means(harmful, harmless)
        return replace(grid, vectors=factor * grid.vectors)

    return scaled


def test_what_a_function_gives_is_never_taken_from_an_earlier_one(tiny_model, source, tmp_path):
    kept, norms = [], []
    for estimator in (None, None, longer(1.0), longer(1.0), longer(3.0), None):
        said = []
        run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path, False, said.append), estimator=estimator)
        kept.append(
            tuple(any(line.startswith(stage) and "kept" in line for line in said) for stage in ("directions", "scores"))
        )
        norms.append(candidates(tmp_path)[0].norm().item())
    assert norms == pytest.approx([norms[0]] * 4 + [3 * norms[0], norms[0]])
    # The same candidates have the same scores, which are kept.
    assert kept == [(False, False), (True, True), (False, True), (False, True), (False, False), (False, False)]


def test_a_run_says_which_function_it_used_and_other_commands_ask_for_it(tiny_model, source, tmp_path):
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path), estimator=turned)
    record = RunRecord.load(tmp_path)
    assert record.run.options.estimator == f"{__name__}:turned"
    assert f"--estimator {__name__}:turned" in command_line(record.run.model, record.run.options)
    before = candidates(tmp_path)
    combos = CombosOptions(ranks=(0,), max_size=1, n_random=0, n_ce=2, val_new_tokens=2)
    options = replace(record.run.options, n_ce=2, n_random=0, max_new_tokens=2)
    run_combos(tiny_model("llama"), source, options, RunFolder(tmp_path), combos)
    assert torch.equal(candidates(tmp_path)[0], before[0]) and candidates(tmp_path)[1] == before[1]


def test_the_command_line_names_one_in_the_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text(MODULE.format(factor=2))
    for name, extra in (("plain", []), ("scaled", ["--estimator", "mine_here:scaled"])):
        assert exit_status(["run", source, *WORDS, *extra, "--output-dir", name]) == 0
    plain, scaled = candidates(tmp_path / "plain"), candidates(tmp_path / "scaled")
    torch.testing.assert_close(scaled[0], 2 * plain[0])
    assert scaled[1] == "mine_here:scaled"
    assert read_json(tmp_path / "scaled/run.json")["options"]["estimator"] == "mine_here:scaled"


def test_named_estimators_and_a_function_of_single_prompts_go_through_a_run(tiny_model, source, tmp_path, monkeypatch):
    """What the run keeps is what the estimator gives of the prompts that the run kept; only names are kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_prompts.py").write_text(MODULE.format(factor=2))
    for name, estimator in (
        ("plain", None),
        ("median", "median"),
        ("lda", "lda"),
        ("own", "mine_of_prompts:first_pair"),
    ):
        extra = [] if estimator is None else ["--estimator", estimator]
        assert exit_status(["run", source, *WORDS, *extra, "--output-dir", name]) == 0
    model, record = tiny_model("llama"), RunRecord.load(tmp_path / "plain")
    chat = ChatFormat(model.tokenizer)
    sides = [
        sample_activations(model, chat, record.prompts.side(side).kept_set("train")) for side in ("harmful", "harmless")
    ]
    kind = next(each for each in sides[0].categories if each)
    assert exit_status(["run", source, *WORDS, f"--estimator=category-{kind}", f"--output-dir=category-{kind}"]) == 0
    for name in ("median", "lda", f"category-{kind}"):
        found, method = candidates(tmp_path / name)
        torch.testing.assert_close(found, estimator_named(name)(*sides).vectors, rtol=1e-3, atol=1e-4)
        assert method == name and not torch.allclose(found, candidates(tmp_path / "plain")[0], atol=1e-3)
        best = read_json(tmp_path / name / "direction_metadata.json")
        assert best["method"] == name
    torch.testing.assert_close(
        candidates(tmp_path / "own")[0], (sides[0].prompts[0] - sides[1].prompts[0]).double(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        read_tensors(tmp_path / "median/generate_directions/means.pt")["harmful"],
        read_tensors(tmp_path / "plain/generate_directions/means.pt")["harmful"],
    )


def test_a_function_of_the_rows_of_one_place_is_an_estimator_and_named_by_itself(tiny_model, source, tmp_path):
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path), estimator=EveryPlace(gap_of_medians, "medians"))
    found, method = candidates(tmp_path)
    assert method == f"{__name__}:gap_of_medians" and found[1:, 1:].norm(dim=-1).min() > 0


def gap_of_medians(harmful, harmless):
    return harmful.median(0).values - harmless.median(0).values


def test_candidates_of_a_named_estimator_are_kept_and_another_name_makes_new_ones(tiny_model, source, tmp_path):
    kept = []
    for name in ("winsorised", "winsorised", "projected", None):
        said = []
        run(tiny_model("llama"), source, replace(OPTIONS, estimator=name), RunFolder(tmp_path, False, said.append))
        kept.append(any(line.startswith("directions") and "kept" in line for line in said))
    assert kept == [False, True, False, False]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mine_there:unmarked_samples", "it was given means: to see single prompts, mark it with"),
        ("scaled", "no estimator is called 'scaled'"),
        ("category-xyz", "no harmful prompt is of the category 'xyz': expected one of"),
        ("no_such_module_here:scaled", "cannot import the estimator no_such_module_here:scaled"),
        ("mine_there:absent", "mine_there has no function 'absent'"),
        ("mine_there:number", "mine_there has no function 'number'"),
        ("mine_there:fails", "the estimator mine_there:fails failed: RuntimeError: no such thing"),
        ("mine_there:lost", "the estimator mine_there:lost failed: UserError: a grid needs finite vectors"),
        ("mine_there:late", "the estimator mine_there:late failed: ModuleNotFoundError"),
        ("mine_there:unmarked", "says of each in is_degenerate"),
        ("mine_there:narrow", "a DirectionGrid with one vector for each position and layer, ("),
    ],
)
def test_what_is_no_estimator_is_one_line(source, tmp_path, monkeypatch, capsys, name, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_there.py").write_text(MODULE.format(factor=2))
    assert exit_status(["run", source, *WORDS, "--estimator", name, "--output-dir", "out"]) == 2
    errors = capsys.readouterr().err
    assert line in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("broken", "1 / 0", ".*division by zero"), ("leaving", "raise SystemExit(3)", "SystemExit: 3")],
)
def test_an_error_inside_the_module_is_named(tmp_path, monkeypatch, name, text, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}_here.py").write_text(text)
    with pytest.raises(UserError, match=rf"cannot import the estimator {name}_here:x: {line}"):
        named_estimator(f"{name}_here:x")


def test_a_vector_of_zeros_is_no_candidate(tiny_model, source, tmp_path):
    def without_first(harmful, harmless):
        grid = difference_in_means(harmful, harmless)
        vectors = grid.vectors.clone()
        vectors[0, 2] = 0
        return replace(grid, vectors=vectors)

    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path), estimator=without_first)
    rows = read_json(tmp_path / "select_direction/direction_evaluations.json")
    scores = {(row["position"], row["layer"]): row["refusal_score"] for row in rows}
    first = min(position for position, _ in scores)
    assert scores[first, 2] is None and scores[first, 3] is not None


CELL = """
from refusal_mi import difference_in_means
from refusal_mi.estimators.samples import sees_prompts

@sees_prompts
def of_the_first_half(harmful, harmless):
    return difference_in_means(harmful.take(range(3)).means, harmless.means)
"""


def test_an_estimator_of_a_cell_goes_through_search_figures_and_export(tiny_model, tiny_dir, source, tmp_path):
    """As in a notebook: a function that no module has."""
    cell = {"__name__": "__main__"}
    exec(CELL, cell)
    folder, out = tmp_path / "run", tmp_path / "out"
    run(tiny_model("llama"), source, OPTIONS, RunFolder(folder), estimator=cell["of_the_first_half"])
    found = load_run(folder)
    assert found.record.run.options.estimator == "__main__:of_the_first_half"
    figure = plot_scores(found.scores, chosen=found.selection.survivors[0])
    drawn = [value for trace in figure.data for value in trace.y if value is not None]
    best = min(row.bypass for row in found.scores.rows if row.bypass is not None)
    assert any(value == pytest.approx(best) for value in drawn)
    report = export_checkpoint(tiny_dir("llama"), Ablate(found.direction), out)
    assert report.verification.passed
    hooked, chat = tiny_model("llama"), ChatFormat(tiny_model("llama").tokenizer)
    expected = next_token_logits(hooked, chat, ["a", "b c"], interventions=Ablate(found.direction))
    exported = next_token_logits(load_model(out, device="cpu"), chat, ["a", "b c"])
    assert torch.allclose(exported, expected, atol=1e-4)
    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path / "plain"))
    assert abs(load_run(tmp_path / "plain").grid.vectors - found.grid.vectors).max() > 1e-3, "the control: another one"


def test_one_direction_of_any_origin_goes_through_a_run(tiny_model, source, tmp_path):
    mine = random_direction(4, layer=1)

    def found_elsewhere(harmful, harmless):
        return DirectionGrid.of(mine, harmful.positions, harmful.means.shape[1])

    run(tiny_model("llama"), source, OPTIONS, RunFolder(tmp_path), estimator=found_elsewhere)
    chosen = Direction.load(tmp_path)
    assert torch.equal(chosen.vector, mine.vector) and (chosen.layer, chosen.position) == (1, -1)
    rows = read_json(tmp_path / "select_direction/direction_evaluations.json")
    scored = [(row["position"], row["layer"]) for row in rows if row["refusal_score"] is not None]
    assert scored == [(-1, 1)] and len(rows) > 1
