"""Combinations end to end on a tiny model: shared search and baselines, schemas, the choice, the held-out report."""

import contextlib
import json
import math

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.errors import UserError
from refusal_mi.figures.effects import combination_points, plot_combos
from refusal_mi.files import read_record
from refusal_mi.measures import LossResult
from refusal_mi.recipes.combinations import choose, rate_difference
from refusal_mi.run.combos import CombosResult, ValidationRow
from refusal_mi.run.options import CombosOptions
from refusal_mi.stats import Rate
from tests.helpers.naive import ablating, logits, prompt_ids

pytestmark = pytest.mark.slow

TOKENS = (40, 41, 42)
SIZES = ["--n-train", "8", "--n-val", "8", "--n-test", "6", "--n-ce", "3", "--max-new-tokens", "4"]
RUN = ["--no-filter", "--refusal-tokens", "40,41,42", "--no-thresholds", "--device", "cpu", *SIZES]
COMBOS = ["--ranks", "0..2", "--kl-max", "9", "--n-random", "2", "--n-ce", "3", "--val-new-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tiny_dir, tmp_path_factory):
    """`run --directions 2-0`, then `combos`, in one run folder."""
    path = tmp_path_factory.mktemp("combos") / "run"
    model = str(tiny_dir("llama"))
    assert exit_status(["run", model, "--directions", "2-0", "--output-dir", str(path), *RUN]) == 0
    assert exit_status(["combos", model, *COMBOS, "--output-dir", str(path)]) == 0
    return path


def read(path):
    return json.loads(path.read_text())


def test_the_published_files_of_a_combination(folder):
    directions = torch.load(folder / "2-0" / "directions.pt", weights_only=True)
    places = read(folder / "2-0" / "directions_metadata.json")
    assert isinstance(directions, list) and [list(place) for place in places] == [["pos", "layer"]] * 2
    rows = read(folder / "select_direction" / "direction_evaluations_filtered.json")
    grid = torch.load(folder / "generate_directions" / "mean_diffs.pt", weights_only=True)
    for vector, place, rank in zip(directions, places, (2, 0), strict=True):
        assert place == {"pos": rows[rank]["position"], "layer": rows[rank]["layer"]}
        assert torch.equal(vector, grid[place["pos"], place["layer"]].float())
        assert vector.untyped_storage().nbytes() == vector.numel() * vector.element_size()
    span = read(folder / "2-0" / "directions_span.json")
    assert span["effective_rank"] == 2 and span["multi"] == "span" and span["ranks"] == [2, 0]
    completions = read(folder / "2-0" / "completions" / "harmful_ablation_completions.json")
    assert [list(row) for row in completions] == [["category", "prompt", "response"]] * 6
    losses = read(folder / "2-0" / "loss_evals" / "ablation_loss_eval.json")
    assert set(losses["plain_text"]) == {"ce_loss", "perplexity", "n_tokens"}


def test_search_and_baselines_are_shared(folder, tiny_dir, capsys):
    model, output = str(tiny_dir("llama")), ["--output-dir", str(folder)]
    assert exit_status(["run", model, "--vectors_ablated", "0-1", "--multi", "sequential", *output, *RUN]) == 0
    lines = capsys.readouterr().err.splitlines()
    kept = {line.split(":")[0] for line in lines if line.endswith("done before, kept")}
    shared = {"prompts", "directions", "scores", "selection", "loss_baseline"}
    assert shared | {f"completions_{side}_baseline" for side in ("harmful", "harmless")} <= kept
    assert not any(name.startswith("0-1") for name in kept)
    assert {path.name for path in (folder / "completions").iterdir()} == {
        f"{side}_baseline_{kind}.json" for side in ("harmful", "harmless") for kind in ("completions", "evaluations")
    }
    assert exit_status(["combos", model, *COMBOS, *output]) == 0
    again = capsys.readouterr().err.splitlines()
    assert again and all(line.endswith("done before, kept") for line in again)


def test_scores_of_a_combination_against_a_second_way(folder, tiny_dir, plain_model):
    """Projections onto a Gram-Schmidt basis in plain HF hooks, one prompt at a time."""
    found = read(folder / "combos.json")
    row = next(row for row in found["combinations"] if row["label"] == "0-2")
    grid = torch.load(folder / "generate_directions" / "mean_diffs.pt", weights_only=True)
    basis = torch.linalg.qr(torch.stack([grid[place["pos"], place["layer"]] for place in row["directions"]]).T)[0].T
    hf, prompts = plain_model("llama"), read(folder / "prompts.json")
    from tests.helpers.models import tiny_tokenizer

    def probabilities(side, ablated):
        with contextlib.ExitStack() as stack:
            for vector in basis if ablated else ():
                stack.enter_context(ablating(hf, vector))
            rows = [prompt_ids(tiny_tokenizer(), each["instruction"]) for each in prompts[side]["val"]]
            return torch.stack([logits(hf, ids)[-1].double().softmax(-1) for ids in rows])

    def score(p):
        p = p[:, list(TOKENS)].sum(-1)
        return ((p + 1e-8).log() - (1 - p + 1e-8).log()).mean().item()

    plain, ablated = probabilities("harmless", False), probabilities("harmless", True)
    kl = (plain * (plain.log() - ablated.log())).sum(-1).mean().item()
    assert row["bypass"] == pytest.approx(score(probabilities("harmful", True)), abs=1e-4)
    assert row["kl_nats"] == pytest.approx(kl, abs=1e-5)
    assert found["baseline"]["bypass"] == pytest.approx(score(probabilities("harmful", False)), abs=1e-4)
    assert abs(row["bypass"] - found["baseline"]["bypass"]) > 1e-3 and kl > 1e-3
    assert found["baseline"]["kl_nats"] == pytest.approx(0, abs=1e-9)


def test_what_combos_reports(folder):
    found = read(folder / "combos.json")
    labels = [row["label"] for row in found["combinations"]]
    assert labels == ["0", "1", "2", "0-1", "0-2", "1-2"] and found["skipped"] == []
    for row in found["combinations"]:
        assert set(row["ce_loss"]) == {"plain_text", "instructions"} and row["refusal"]["n"] == 8
        assert row["effective_rank"] == len(row["ranks"]) == len(row["directions"])
    lowest = min(found["combinations"], key=lambda row: row["bypass"])
    best = next(row for row in found["combinations"] if row["label"] == found["winner"])
    assert best["bypass"] <= lowest["bypass"] + 0.01
    singles = {row["label"]: row["bypass"] for row in found["combinations"] if len(row["ranks"]) == 1}
    assert found["single_best"] == min(singles, key=singles.get)
    test = found["test"]
    assert test["n"] == 6 and len(test["random"]) == len(found["random"]) == 2
    for rates in (test["baseline"], test["winner"], test["single_best"], *test["random"]):
        assert rates["refusal"]["n"] == 6 and rates["refusal"]["low"] <= rates["refusal"]["rate"]
    assert test["winner_minus_single"]["low"] < test["winner_minus_single"]["high"]


def test_only_the_winner_and_the_best_single_see_the_held_out_prompts(folder):
    found = read(folder / "combos.json")
    tested = {path.parent.parent.name for path in folder.glob("*/completions/harmful_ablation_completions.json")}
    assert tested - {"2-0", "0-1-sequential"} == {found["winner"], found["single_best"]}


def test_the_figure_has_a_point_for_each(folder):
    found = read(folder / "combos.json")
    result = read_record(folder / "combos.json", CombosResult)
    shown = combination_points(result)
    assert len(shown) == 1 + 6 + 2 and [point.label for point in shown if point.is_winner] == [found["winner"]]
    figure = plot_combos(shown, text_set="plain_text", kl_max=9.0, model="tiny")
    drawn = {text: x for trace in figure.data if trace.text for text, x in zip(trace.text, trace.x, strict=True)}
    for row in found["combinations"]:
        assert drawn[row["label"]] == row["ce_loss"]["plain_text"]["ce_loss"]
    assert "CE loss" in figure.layout.xaxis.title.text and "refuse" in figure.layout.yaxis.title.text
    assert (folder / "combos.html").stat().st_size > 1_000_000


def test_the_cost_has_an_interval_of_its_change_from_the_plain_model(folder):
    """Over the same texts; what was written before there were intervals is drawn without them."""
    found = read(folder / "combos.json")
    plain = found["baseline"]["ce_loss"]["plain_text"]
    assert "change" not in plain
    for row in (*found["combinations"], *found["random"]):
        loss = row["ce_loss"]["plain_text"]
        change, low, high = loss["change"]
        assert change == pytest.approx(loss["ce_loss"] - plain["ce_loss"], abs=1e-9) and low <= change <= high
        assert low < high, "three texts differ"
    result = read_record(folder / "combos.json", CombosResult)
    shown = {point.label: point for point in combination_points(result)}
    assert shown["baseline"].ce_interval is None
    for row in found["combinations"]:
        _, low, high = row["ce_loss"]["plain_text"]["change"]
        expected = plain["ce_loss"] + low, plain["ce_loss"] + high
        assert shown[row["label"]].ce_interval == pytest.approx(expected, abs=1e-9)
    old = json.loads(json.dumps(found))
    for row in (*old["combinations"], *old["random"]):
        for loss in row["ce_loss"].values():
            del loss["change"]
    (folder / "old.json").write_text(json.dumps(old))
    points = combination_points(read_record(folder / "old.json", CombosResult))
    assert [point.ce_interval for point in points] == [None] * len(points)
    figure = plot_combos(points, text_set="plain_text", kl_max=9.0)
    assert "change" not in figure.layout.title.subtitle.text and figure.layout.yaxis.range[0] == -0.05
    assert all(trace.error_x.array is None for trace in figure.data)
    now = plot_combos(combination_points(result), text_set="plain_text", kl_max=9.0)
    rows = [
        (y, x, low, high)
        for trace in now.data
        if trace.error_x.array
        for y, x, high, low in zip(trace.y, trace.x, trace.error_x.array, trace.error_x.arrayminus, strict=True)
    ]
    assert len(rows) == 6 + 2 == len({y for y, *_ in rows}) and max(rows)[0] < 0, "a row for each"
    assert [x for _, x, *_ in sorted(rows, reverse=True)] == sorted(x for _, x, *_ in rows)


def test_no_combination_within_the_limit_is_status_one(folder, tiny_dir, capsys):
    before = (folder / "combos.json").read_text()
    options = ["--ranks", "0,1", "--kl-max", "0", "--n-ce", "3", "--val-new-tokens", "4", "--json"]
    assert exit_status(["combos", str(tiny_dir("llama")), *options, "--output-dir", str(folder)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "no combination has a KL of at most 0.0 nats" and "winner" not in printed
    assert read(folder / "combos.json") == {"format": 1, **printed}
    (folder / "combos.json").write_text(before)


def test_without_a_survivor_the_science_failed(tiny_dir, tmp_path, capsys):
    path, model = tmp_path / "run", str(tiny_dir("llama"))
    strict = [option for option in RUN if option != "--no-thresholds"]
    searched = ["run", model, *strict, "--induce-min", "99", "--steps", "directions,selection"]
    assert exit_status([*searched, "--output-dir", str(path)]) == 1
    assert exit_status(["combos", model, "--output-dir", str(path)]) == 1
    assert "no candidate survives: 0 of 25" in " ".join(capsys.readouterr().out.split())
    assert read(path / "combos.json")["status"] == "no candidate survives"


def test_a_limit_may_be_left_out(folder, tiny_dir):
    before = (folder / "combos.json").read_text()
    options = ["--ranks", "0..1", "--kl-max", "inf", "--n-ce", "3", "--val-new-tokens", "4", "--max-size", "1"]
    arguments = ["combos", str(tiny_dir("llama")), *options, "--n-random", "0", "--output-dir", str(folder)]
    assert exit_status(arguments) == 0
    assert read(folder / "combos.json")["options"]["kl_max"] is None
    (folder / "combos.json").write_text(before)


def test_a_stage_records_hashes_and_not_every_token_of_its_texts(folder):
    for stage in ("loss_baseline", "combos_0"):
        record = folder / ".stages" / f"{stage}.json"
        assert all(len(value) == 64 for value in read(record)["inputs"]["texts"].values())
        assert record.stat().st_size < 10_000


@pytest.mark.parametrize("command", [["run", *RUN, "--directions", "0-99"], ["combos", "--ranks", "98..99"]])
def test_a_rank_that_does_not_exist(folder, tiny_dir, capsys, command):
    name, *options = command
    assert exit_status([name, str(tiny_dir("llama")), *options, "--output-dir", str(folder)]) == 2
    assert "error: no direction of rank 9" in capsys.readouterr().err


def test_chat_reads_ranks_from_the_run_folder(folder, tiny_dir, capsys):
    model = str(tiny_dir("llama"))
    outs = []
    for options in ([], ["--ablate", "2-0"], ["--vectors_ablated", "2-0", "--multi", "sequential"]):
        arguments = [
            "chat",
            model,
            "--prompt",
            "Hello",
            "--max-new-tokens",
            "24",
            "--output-dir",
            str(folder),
            *options,
        ]
        assert exit_status(arguments) == 0
        outs.append(capsys.readouterr().out)
    assert len(set(outs)) == 3, outs
    plain, ranks, published = outs
    labels = [line for line in published.splitlines() if line.startswith("[")]
    assert labels[0] == "[plain]" and len(labels) == 3
    assert labels[1].startswith("[ablated rank 0 at") and labels[2].startswith("[ablated ranks 2 and 0 at")
    answers = [part.partition("]\n")[2].strip() for part in ("\n" + published).split("\n[")[1:]]
    assert answers[0] == plain.strip() and len(set(answers)) == 3
    assert "[" not in ranks.replace(plain, "")


def row(label: str, bypass: float, kl: float, ce: float) -> ValidationRow:
    rate = Rate(1, 2)
    return ValidationRow(label, bypass, (bypass, bypass), kl, rate, rate, {"text": LossResult(ce, math.exp(ce), 9)})


def test_the_choice_is_the_lowest_bypass_within_the_limit_and_ties_go_by_ce():
    rows = [row("a", -9.0, 0.2, 1.0), row("b", -5.0, 0.1, 3.0), row("c", -4.995, 0.0, 2.0), row("d", -4.0, 0.0, 0.0)]
    assert choose(rows, 0.1, "text").label == "c"
    assert choose(rows, 0.2, "text").label == "a"
    assert choose(rows[:2], 0.1, "text").label == "b"
    assert choose(rows[:1], 0.1, "text") is None


def test_the_difference_of_paired_rates():
    """By hand: n = 10, 3 changed one way, 1 the other; Wilson's limits of 9 and 7 of 10, and φ = −3 / √(9·1·7·3)."""
    of = [True] * 3 + [False] + [True] * 6
    against = [False] * 3 + [True] + [True] * 6
    found = rate_difference(of, against)
    assert found.refusal_rate == pytest.approx(0.2)
    (low_9, high_9), (low_7, high_7), phi = Rate(9, 10).interval, Rate(7, 10).interval, -3 / math.sqrt(189)
    (a, b), (c, d) = (0.9 - low_9, high_7 - 0.7), (high_9 - 0.9, 0.7 - low_7)
    assert found.low == pytest.approx(0.2 - math.sqrt(a * a - 2 * phi * a * b + b * b))
    assert found.high == pytest.approx(0.2 + math.sqrt(c * c - 2 * phi * c * d + d * d))
    same = rate_difference([True] * 10, [True] * 10)
    assert same.refusal_rate == 0 and same.low == -same.high < 0


def test_bad_options_are_refused():
    for options in ({"max_size": 0}, {"kl_max": -1.0}, {"n_random": -1}, {"ranks": (1, 1)}, {"val_new_tokens": 0}):
        with pytest.raises(UserError):
            CombosOptions(**options)
