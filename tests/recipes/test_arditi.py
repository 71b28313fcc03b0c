"""The whole pipeline on tiny random models: status, artifacts, resuming."""

import json
from dataclasses import replace

import pytest
import torch

from refusal_mi.cli import exit_status
from refusal_mi.directions import Direction, DirectionGrid
from refusal_mi.errors import UserError
from refusal_mi.files import as_json, read_json, read_tensors, write_json
from refusal_mi.generation import Generated
from refusal_mi.recipes import effects
from refusal_mi.recipes.arditi import run
from refusal_mi.recipes.combinations import run_combos
from refusal_mi.recipes.context import RunContext
from refusal_mi.report.page import write_report
from refusal_mi.report.verdict import bindings, judge_run
from refusal_mi.run.folder import RunRecord
from refusal_mi.run.options import CombosOptions, RunOptions
from refusal_mi.run.stages import RunFolder
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.thresholds import NO_THRESHOLDS, Thresholds
from tests.helpers.models import D_MODEL, N_LAYERS

pytestmark = pytest.mark.slow

SMALL = RunOptions(
    n_train=6,
    n_val=3,
    n_test=3,
    n_ce=3,
    n_random=0,
    max_new_tokens=3,
    filter_prompts=False,
    refusal_tokens=(5, 40),
    response_prefix="",
    batch_size=16,
)
RANK_ALL = replace(SMALL, thresholds=NO_THRESHOLDS)
SIZES = {"n-train": 6, "n-val": 3, "n-test": 3, "n-ce": 3, "max-new-tokens": 3, "refusal-tokens": "5,40"}
AS_ARGUMENTS = ["--no-filter", "--quick", *(f"--{name}={value}" for name, value in SIZES.items())]
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "mixtral"]


@pytest.fixture(scope="module")
def source(tiny_dir):
    """The directory of a family, as `run` wants it named."""
    return lambda family: str(tiny_dir(family).resolve())


@pytest.fixture(scope="module")
def failed_then_ranked(tmp_path_factory, source):
    """A folder made by the command line, first without a survivor, then with --no-thresholds: both statuses."""
    path = tmp_path_factory.mktemp("run") / "out"
    arguments = ["run", source("llama"), *AS_ARGUMENTS, "--output-dir", str(path)]
    first = exit_status(arguments)
    after_first = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    second = exit_status([*arguments, "--no-thresholds"])
    return path, first, after_first, second


def test_without_a_survivor_the_status_is_1_and_the_curves_are_kept(failed_then_ranked):
    _, status, files, _ = failed_then_ranked
    assert status == 1
    assert files >= {
        "run.json",
        "summary.json",
        "prompts.json",
        "generate_directions/mean_diffs.pt",
        "select_direction/direction_evaluations.json",
        "select_direction/direction_evaluations_filtered.json",
    }
    assert not any(
        name.startswith(("direction.pt", "direction_metadata", "completions/", "loss_evals/")) for name in files
    )


def test_ranking_all_gives_status_0_and_every_published_artifact(failed_then_ranked):
    path, _, _, status = failed_then_ranked
    assert status == 0
    expected = {
        "direction.pt",
        "direction_metadata.json",
        *(
            f"completions/{stem}_{kind}.json"
            for stem in (
                "harmful_baseline",
                "harmful_ablation",
                "harmful_actadd",
                "harmless_baseline",
                "harmless_actadd",
            )
            for kind in ("completions", "evaluations")
        ),
        *(f"loss_evals/{label}_loss_eval.json" for label in ("baseline", "ablation", "actadd")),
    }
    assert {name for name in expected if not (path / name).is_file()} == set()
    assert not list(path.rglob("*.tmp"))


def test_a_quick_run_marks_every_json_file(failed_then_ranked):
    path = failed_then_ranked[0]
    files = list(path.rglob("*.json"))
    assert len(files) > 25
    for file in files:
        marked = file.name != "labels.json"  # the answers of a quick run are those of any other
        assert ('"quick": true' in file.read_text()) == marked, file


def test_the_tensors_have_the_published_shapes(failed_then_ranked):
    path = failed_then_ranked[0]
    diffs = torch.load(path / "generate_directions/mean_diffs.pt", weights_only=True)
    assert diffs.shape == (5, N_LAYERS, D_MODEL) and diffs.dtype == torch.float64
    direction = Direction.load(path / "direction.pt")
    metadata = read_json(path / "direction_metadata.json")
    assert (direction.position, direction.layer) == (metadata["pos"], metadata["layer"])
    assert torch.equal(direction.vector, diffs[metadata["pos"], metadata["layer"]].float())
    assert (path / "direction.pt").stat().st_size < 4096
    means = read_tensors(path / "generate_directions/means.pt")
    assert torch.allclose(means["harmful"] - means["harmless"], diffs)
    assert torch.equal(DirectionGrid.load(path / "generate_directions/mean_diffs.pt").vectors, diffs)


def test_the_scores_have_the_published_schema_and_the_survivors_its_order(failed_then_ranked):
    path = failed_then_ranked[0] / "select_direction"
    rows, survivors = (read_json(path / f"direction_evaluations{end}.json") for end in ("", "_filtered"))
    keys = {"position", "layer", "refusal_score", "steering_score", "kl_div_score"}
    assert len(rows) == 5 * N_LAYERS and all(keys <= set(row) for row in rows)
    assert [(row["position"], row["layer"]) for row in rows] == [
        (position, layer) for position in range(-5, 0) for layer in range(N_LAYERS)
    ]
    scores = [row["refusal_score"] for row in survivors]
    assert scores == sorted(scores) and None not in scores
    chosen = select(ScoreGrid.load(path / "direction_evaluations.json", N_LAYERS), NO_THRESHOLDS)
    assert [row.bypass for row in chosen.survivors] == scores
    metadata = read_json(path.parent / "direction_metadata.json")
    assert (metadata["pos"], metadata["layer"]) == (survivors[0]["position"], survivors[0]["layer"])


def test_completions_and_losses_have_the_published_schema(failed_then_ranked):
    path = failed_then_ranked[0]
    rows = read_json(path / "completions/harmful_ablation_completions.json")
    assert len(rows) == 3 and all({"category", "prompt", "response"} <= set(row) for row in rows)
    found = read_json(path / "completions/harmful_ablation_evaluations.json")
    flags = [row["is_jailbreak_substring_matching"] for row in found["completions"]]
    assert found["substring_matching_success_rate"] == sum(flags) / 3 and set(flags) <= {0, 1}
    assert set(found["substring_matching_per_category"]) == {str(row["category"]) for row in rows}
    losses = read_json(path / "loss_evals/ablation_loss_eval.json")
    assert set(losses) - {"quick"} == {"plain_text", "instructions", "harmless_custom_completions"}
    assert all(set(entry) >= {"ce_loss", "perplexity", "n_tokens"} for entry in losses.values() if entry is not True)


def test_the_summary_and_the_record_of_the_run(failed_then_ranked, source):
    path = failed_then_ranked[0]
    summary, record = read_json(path / "summary.json"), read_json(path / "run.json")
    assert summary["status"] == "done" and summary["selection"]["n_candidates"] == 25
    for side, labels in (("harmful", ("baseline", "ablation", "actadd")), ("harmless", ("baseline", "actadd"))):
        for label in labels:
            rate = summary["completions"][side][label]["refusal"]
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert any(label.startswith("random") for label in summary["completions"]["harmful"])
    assert record["model"]["source"] == source("llama") and len(record["model"]["fingerprint"]) == 64
    assert [token["id"] for token in record["refusal_tokens"]] == [5, 40]
    assert {"torch", "transformers", "transformer-lens", "refusal_mi"} <= set(record["versions"])
    json.dumps(summary, allow_nan=False)


def test_another_model_in_the_same_folder_is_refused(failed_then_ranked, source, capsys):
    path = failed_then_ranked[0]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert exit_status(["run", source("gpt2"), *AS_ARGUMENTS, "--output-dir", str(path)]) == 2
    assert "choose another --output-dir" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_family_fails_with_the_thresholds_and_is_ranked_without(family, tiny_model, source, tmp_path):
    model = tiny_model(family)
    summary = run(model, source(family), replace(SMALL, steps=("directions", "selection")), RunFolder(tmp_path))
    assert summary.status == "no candidate survives" and summary.direction is None
    assert not (tmp_path / "direction.pt").exists()
    summary = run(model, source(family), RANK_ALL, RunFolder(tmp_path))
    assert summary.status == "done" and (tmp_path / "direction.pt").is_file()
    assert set(summary.ce_loss) == {"baseline", "ablation", "actadd"}


class Log(list):
    """What a run says: which stages it kept and which it computed."""

    @property
    def kept(self) -> set[str]:
        return {line.partition(":")[0] for line in self if line.endswith("done before, kept")}

    @property
    def done(self) -> set[str]:
        return {line.partition(":")[0] for line in self} - self.kept


def test_a_staged_search_says_beforehand_what_it_costs_and_afterwards_what_failed(tiny_model, source, tmp_path):
    rule = Thresholds(induce_min=30.0)
    options = replace(SMALL, steps=("directions", "selection"), search="staged", thresholds=rule)
    log = Log()
    summary = run(tiny_model("gpt2"), source("gpt2"), options, RunFolder(tmp_path, False, log.append))
    assert summary.status == "no candidate survives" and "screened out for induce" in summary.selection.explanation
    (line,) = (line for line in log if line.startswith("scores"))
    # 5 positions of 4 layers on 3 prompts, 8 of them ablated and added on 3, the last one ablated on no more.
    both = 2 - (0 + 1 + 2 + 3) / 4 / N_LAYERS
    assert f"20 candidates, staged search, about as much work as {round(60 + 24 * both)} prompts" in line
    assert "; about 2 times that where none passes" in line
    known = read_tensors(tmp_path / "select_direction/scores.pt").isfinite()
    assert known[:, 1].any(1).sum() >= 15 and not known[:, 1].all()
    record = RunRecord.load(tmp_path)
    counts = {name: failed for name, _, failed, _ in bindings(record.scores, record.selection)}
    assert counts == {"KL on harmless prompts": 0, "refusal score when added": 20, "source layer": 5}
    sentences = " ".join(judge_run(record).sentences)
    assert "--search exact" in sentences and "No single threshold" not in sentences


@pytest.fixture(scope="module")
def gpt2_run(tiny_model, source, tmp_path_factory):
    """A finished run, and a function that runs again in its folder with other options."""
    path = tmp_path_factory.mktemp("gpt2")

    def again(options: RunOptions = RANK_ALL, fresh: bool = False):
        log = Log()
        return as_json(run(tiny_model("gpt2"), source("gpt2"), options, RunFolder(path, fresh, log.append))), log

    summary, log = again()
    assert not log.kept
    return path, again, summary, log


def test_a_second_run_computes_nothing(gpt2_run):
    path, again, first, log = gpt2_run
    ours = [path / "run.json", path / "summary.json"]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file() and file not in ours}
    second, again_log = again()
    assert again_log.kept == log.done and not again_log.done
    assert second == first
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())


def test_another_threshold_repeats_only_the_selection_and_what_follows(gpt2_run):
    _, again, first, _ = gpt2_run
    best = first["selection"]["best"]
    strict = replace(SMALL, thresholds=Thresholds(0.999 * best["kl_div_score"], None, None))
    second, log = again(strict)
    assert second["selection"]["best"] != best
    assert {"prompts", "directions", "scores"} <= log.kept
    assert {"completions_harmful_baseline", "completions_harmless_baseline", "loss_baseline"} <= log.kept
    following = ("completions", "evaluations", "loss")
    affected = {name for name in log.kept | log.done if name.startswith(following) and not name.endswith("baseline")}
    assert len(affected) >= 6 and log.done - {"plots"} == {"selection", "controls"} | affected
    back, log = again()
    assert back["direction"] == first["direction"] and "selection" in log.done


def test_a_threshold_that_keeps_the_winner_repeats_only_the_selection(gpt2_run):
    _, again, first, _ = gpt2_run
    again()
    loose = replace(SMALL, thresholds=Thresholds(2 * first["selection"]["best"]["kl_div_score"], None, None))
    second, log = again(loose)
    assert log.done - {"plots"} == {"selection"} and second["selection"]["best"] == first["selection"]["best"]


def test_another_evaluation_set_repeats_only_its_answers(gpt2_run, tmp_path):
    path, again, first, _ = gpt2_run
    again()
    file = tmp_path / "other.json"
    for number, texts in enumerate((["Say one", "Say two"], ["Say three", "Say four"])):
        file.write_text(json.dumps(texts))
        summary, log = again(replace(RANK_ALL, eval_set=str(file)))
        assert {"prompts"} <= log.done - {"plots"} and summary["direction"] == first["direction"]
        assert all("_other_" in name for name in log.done - {"plots", "prompts"})
        assert len(log.done - {"plots", "prompts"}) == 6, number
        assert {row["prompt"] for row in read_json(path / "completions/other_ablation_completions.json")} == set(texts)


def test_the_direction_says_where_it_came_from(gpt2_run):
    path, again, _, _ = gpt2_run
    again()
    metadata = read_json(path / "direction_metadata.json")
    assert {"source", "revision", "fingerprint"} <= set(metadata["model"])
    assert (metadata["n_harmful"], metadata["n_harmless"], metadata["seed"]) == (6, 6, 42)
    assert [token["id"] for token in metadata["refusal_tokens"]] == [5, 40]
    assert len(metadata["template_sha256"]) == 64 and "torch" in metadata["versions"]


def test_losing_every_survivor_takes_the_direction_away(gpt2_run):
    path, again, _, _ = gpt2_run
    summary, _ = again(SMALL)
    assert summary["status"] == "no candidate survives" and not (path / "direction.pt").exists()
    again()
    assert (path / "direction.pt").exists()


def test_what_was_computed_from_a_lost_direction_is_set_aside_and_comes_back(gpt2_run):
    path, again, _, _ = gpt2_run
    again()
    made = {str(file.relative_to(path)) for kind in ("completions", "loss_evals") for file in path.glob(f"{kind}/*")}
    of_the_plain_model = {name for name in made if "_baseline_" in name or "/baseline_" in name}
    before = {name: (path / name).read_bytes() for name in made}
    assert len(made) > 2 * len(of_the_plain_model) > 0
    for _ in range(2):
        summary, _ = again(SMALL)
        assert summary["status"] == "no candidate survives" and "loss_ablation" not in summary["seconds"]
        left = {name for name in made if (path / name).exists()}
        assert left == of_the_plain_model
    _, log = again()
    assert log.done - {"plots"} == {"selection"}
    assert {name: (path / name).read_bytes() for name in made} == before


def test_fresh_computes_everything_and_gives_the_same(gpt2_run):
    _, again, first, log = gpt2_run
    second, fresh_log = again(fresh=True)
    assert not fresh_log.kept and fresh_log.done == log.done
    cost = {"seconds": None, "peak_mib": None}
    assert second | cost == first | cost


def test_an_interrupted_run_continues(tiny_model, source, tmp_path, monkeypatch):
    calls = []
    generate = effects.generate

    def interrupted(*arguments, **options):
        calls.append(options["description"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    def go():
        log = Log()
        return run(tiny_model("gpt2"), source("gpt2"), RANK_ALL, RunFolder(tmp_path, report=log.append)), log

    monkeypatch.setattr(effects, "generate", interrupted)
    (tmp_path / "report.html").write_text("an old page")
    write_json(tmp_path / "summary.json", {"status": "done", "completions": {}})
    with pytest.raises(KeyboardInterrupt):
        go()
    reached = read_json(tmp_path / "summary.json")
    assert reached["status"] == "unfinished" and "direction" in reached and "completions" not in reached
    assert not (tmp_path / "report.html").exists()
    assert len(list((tmp_path / "completions").iterdir())) == 4
    summary, log = go()
    assert summary.status == "done"
    assert {"prompts", "directions", "scores", "selection"} <= log.kept
    assert len([name for name in log.kept if name.startswith("completions")]) == 2
    assert calls[3] == calls[2] and len(calls) == len(set(calls)) + 1


def test_steps_stop_where_they_are_told(tiny_model, source, tmp_path):
    only = replace(RANK_ALL, steps=("directions",))
    assert run(tiny_model("gpt2"), source("gpt2"), only, RunFolder(tmp_path)).status == "directions only"
    assert not (tmp_path / "select_direction").exists()


def test_the_loss_step_alone_writes_the_answers_it_scores(tiny_model, source, tmp_path):
    model, folder = tiny_model("gpt2"), RunFolder(tmp_path)
    stale = tmp_path / effects.OWN_ANSWERS
    write_json(stale, [{"category": None, "prompt": "Old", "response": "An answer of another run."}])
    summary = run(model, source("gpt2"), replace(RANK_ALL, steps=("loss",)), folder)
    assert len(read_json(stale)) == 3
    whole = run(model, source("gpt2"), RANK_ALL, RunFolder(tmp_path / "whole"))
    assert summary.ce_loss == whole.ce_loss and not summary.completions


def write_sets(folder, texts, answer):
    """Files of plain texts and of an answered instruction."""
    write_json(folder / "plain.json", texts)
    write_json(folder / "answered.json", [{"instruction": "Say", "output": answer}])
    return {"text_set": str(folder / "plain.json"), "instruction_set": str(folder / "answered.json")}


OWN = "harmless_custom_completions"


@pytest.mark.parametrize("directions", [(), (0, 1)])
@pytest.mark.parametrize(
    ("answers", "texts", "scored"),
    [
        ("a word", ["some text"], {"plain", "answered", OWN}),
        ("", ["some text"], {"plain", "answered"}),
        ("a word", ["x"], {"answered", OWN}),
        ("", ["x"], {"answered"}),
    ],
)
def test_a_set_of_which_nothing_can_be_scored_is_left_out_and_said(
    tiny_model, source, tmp_path, monkeypatch, directions, answers, texts, scored
):
    """A model that ends every answer at once, and texts of one token; the first case is the control."""
    written = lambda *args, **_: [Generated(answers, (7,) if answers else (), True) for _ in args[2]]  # noqa: E731
    monkeypatch.setattr(effects, "generate", written)
    said: list[str] = []
    options = replace(RANK_ALL, **write_sets(tmp_path, texts, "Said"))
    folder = RunFolder(tmp_path / "run", report=said.append)
    summary = run(tiny_model("gpt2"), source("gpt2"), options, folder, directions=directions)
    assert summary.status == "done" and set(summary.ce_loss) >= {"baseline", "ablation"}
    assert all(set(by_set) == scored for by_set in summary.ce_loss.values())
    left_out = {line.split()[3] for line in said if "is left out" in line}
    assert left_out == {"plain", "answered", OWN} - scored
    where = tmp_path / "run" / (summary.combination.label if summary.combination else "")
    assert set(RunRecord.load(where).losses["ablation"]) == scored
    write_report(where)


def test_a_run_without_anything_to_score_has_no_losses_and_combos_refuses(tiny_model, source, tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "generate", lambda *args, **_: [Generated("", (), True) for _ in args[2]])
    options = replace(RANK_ALL, **write_sets(tmp_path, ["x"], "y"))
    monkeypatch.setattr(effects, "answers_to_score", lambda *_: [])
    summary = run(tiny_model("gpt2"), source("gpt2"), options, RunFolder(tmp_path / "run"))
    assert summary.status == "done" and summary.ce_loss == {} and summary.completions
    write_report(tmp_path / "run")
    with pytest.raises(UserError, match="combos decides ties by CE loss"):
        run_combos(tiny_model("gpt2"), source("gpt2"), options, RunFolder(tmp_path / "run"), CombosOptions())


@pytest.mark.parametrize(("batch_size", "expected"), [(None, 16), (12, 12)])
def test_loss_takes_a_quarter_of_the_batch_only_where_none_was_asked_for(
    batch_size, expected, tiny_model, source, tmp_path
):
    options = replace(SMALL, batch_size=batch_size)
    context = RunContext.start(tiny_model("gpt2"), source("gpt2"), options, RunFolder(tmp_path))
    assert context.batched(context.loss_batch) == expected
