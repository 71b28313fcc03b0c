"""Candidate directions, their scores, the choice among them and their pictures, as stages of a run."""

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from ..directions import DirectionGrid, difference_in_means
from ..figures.save import PLOTLY_FILE, save_figures
from ..figures.scores import Measure, plot_scores
from ..files import as_json, write_json, write_tensors
from ..model.points import resid_hook
from ..model.provenance import versions
from ..reading import mean_activations
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PUBLISHED_TOKENS, SURVIVORS, load_grid, load_scores
from ..search.grid import ScoreGrid, Selection, layer_limit, select
from ..search.staged import staged_token_sets
from ..search.sweep import sweep_token_sets
from .context import RunContext


def find_directions(run: RunContext) -> DirectionGrid:
    """Difference of means at every position and layer: `generate_directions/`."""
    harmful, harmless = run.kept("harmful", "train"), run.kept("harmless", "train")
    files = [MEAN_DIFFS, "generate_directions/mean_diffs.json", "generate_directions/means.pt"]

    def compute() -> None:
        means = [
            run.batched(lambda size: mean_activations(run.model, run.chat, instructions, batch_size=size))
            for instructions in (harmful, harmless)
        ]
        grid = difference_in_means(*means)
        write_tensors(run.path / files[0], grid.vectors)
        write_tensors(run.path / files[2], {"harmful": means[0].means, "harmless": means[1].means})
        record = {
            "method": "difference in means, harmful - harmless",
            "axes": ["position", "layer", "d_model"],
            "positions": list(grid.positions),
            "hook_names": [resid_hook(layer, grid.n_layers) for layer in range(grid.n_layers)],
            "n_harmful": len(harmful),
            "n_harmless": len(harmless),
            "norms": grid.vectors.norm(dim=-1).tolist(),
            "is_degenerate": [list(row) for row in grid.is_degenerate],
        }
        write_json(run.path / files[1], record | run.mark)

    about = f"mean residual streams of {len(harmful)} harmful and {len(harmless)} harmless prompts"
    about += run.estimate("pass", len(harmful) + len(harmless))
    run.stage("directions", run.inputs(harmful=harmful, harmless=harmless), files, compute, about)
    return load_grid(run.path)


def score_directions(run: RunContext, grid: DirectionGrid) -> ScoreGrid:
    """Bypass, induce and KL of every candidate on the validation prompts: `select_direction/`."""
    files = [EVALUATIONS, "select_direction/scores.pt", "select_direction/baseline.json"]
    token_sets = [[token["id"] for token in run.prompts["refusal_tokens"]]]
    if run.prompts["published_refusal_tokens"]:
        files.append(PUBLISHED_TOKENS)
        token_sets.append([token["id"] for token in run.prompts["published_refusal_tokens"]])
    harmful, harmless = run.kept("harmful", "val"), run.kept("harmless", "val")
    pruned = run.options.thresholds.prune_layers if run.options.skip_pruned else None

    def compute() -> None:
        sets = (harmful, harmless, token_sets)
        size, rule = run.options.batch_size, run.options.thresholds
        if run.options.search == "staged":
            scored = staged_token_sets(run.model, run.chat, grid, *sets, thresholds=rule, batch_size=size)
        else:
            scored = sweep_token_sets(run.model, run.chat, grid, *sets, prune_layers=pruned, batch_size=size)
        for path, scores in zip([EVALUATIONS, PUBLISHED_TOKENS], scored, strict=False):
            write_json(run.path / path, [row.describe() | run.mark for row in scores.rows])
        write_tensors(run.path / files[1], scored[0].per_prompt)
        record = {
            "harmful": scored[0].baseline_harmful,
            "harmless": scored[0].baseline_harmless,
            "unit": "refusal score, nats",
            "n_harmful": len(harmful),
            "n_harmless": len(harmless),
            "n_layers": grid.n_layers,
            "axes_of_scores": ["candidate", "bypass, induce, KL", "prompt"],
        }
        write_json(run.path / files[2], record | run.mark)

    layers = [layer for _, layer in grid.candidates() if layer < layer_limit(grid.n_layers, pruned)]
    n_whole = round(sum(len(harmful) + len(harmless) * (2 - layer / grid.n_layers) for layer in layers))
    about = f"{len(layers)} candidates, as much work as {n_whole} prompts{run.estimate('pass', n_whole, most=True)}"
    inputs = run.inputs(MEAN_DIFFS, harmful=harmful, harmless=harmless, token_sets=token_sets)
    if run.options.search == "staged":
        about = f"{len(grid.candidates())} candidates, staged search"
        inputs |= {"search": "staged", "thresholds": asdict(run.options.thresholds)}
    elif run.options.skip_pruned:
        inputs |= {"skip_pruned": run.options.thresholds.prune_layers}
    run.stage("scores", inputs, files, compute, about)
    return load_scores(run.path)


def choose_direction(run: RunContext, grid: DirectionGrid, scores: ScoreGrid) -> Selection:
    """Apply the thresholds; where a candidate survives, write `direction.pt` and its metadata."""
    chosen = select(scores, run.options.thresholds)
    final = [DIRECTION, "direction_metadata.json"]
    provenance = {
        "model": run.model_record,
        "n_harmful": len(run.kept("harmful", "train")),
        "n_harmless": len(run.kept("harmless", "train")),
        "template_sha256": run.chat.record().template_sha256,
        "refusal_tokens": run.prompts["refusal_tokens"],
        "seed": run.options.seed,
        "versions": versions(),
    }

    def compute() -> None:
        write_json(run.path / SURVIVORS, [row.describe() | run.mark for row in chosen.survivors])
        for stale in final:
            (run.path / stale).unlink(missing_ok=True)
        if chosen.survivors:
            direction = grid.direction(chosen.best.position, chosen.best.layer)
            described = {**direction.provenance, **provenance, **run.mark}
            replace(direction, provenance=described).save(run.path / DIRECTION)

    inputs = run.inputs(MEAN_DIFFS, EVALUATIONS, thresholds=asdict(run.options.thresholds), provenance=provenance)
    outputs = [SURVIVORS, *(final if chosen.survivors else [])]
    run.stage("selection", inputs, outputs, compute, chosen.explain())
    return chosen


FOLDER = "select_direction"
PLOTS: dict[str, Measure] = {"ablation_scores": "bypass", "actadd_scores": "induce", "kl_div_scores": "kl"}
"""Published file stem -> measure."""


def draw_scores(run: RunContext, scores: ScoreGrid, chosen: Selection) -> None:
    """`select_direction/{ablation,actadd,kl_div}_scores.html`, also when no candidate survives."""

    def compute() -> None:
        figures = {
            stem: plot_scores(
                scores,
                measure=measure,
                chosen=chosen.survivors[0] if chosen.survivors else None,
                thresholds=chosen.thresholds,
                tokens=run.chat.record().post_instruction_tokens,
                model=run.model_record.name,
            )
            for stem, measure in PLOTS.items()
        }
        save_figures(figures, run.path / FOLDER)

    files = [f"{FOLDER}/{stem}.html" for stem in PLOTS]
    inputs = run.inputs(EVALUATIONS, thresholds=asdict(chosen.thresholds), plotly=version("plotly"))
    run.stage("plots", inputs, [*files, f"{FOLDER}/{PLOTLY_FILE}"], compute, f"{len(files)} per-layer plots")


def record_run(context: RunContext) -> dict[str, Any]:
    """Write `run.json`; return the head of the summary: model, refusal tokens, prompt counts."""
    record = context.prompts
    summary: dict[str, Any] = {"model": as_json(context.model_record), "quick": context.options.quick}
    summary["status"] = "unfinished"
    summary["refusal_tokens"] = record["refusal_tokens"]
    summary["n_prompts"] = {
        side: {
            part: {"kept": len(context.kept(side, part)), "of": len(record[side][part])} for part in ("train", "val")
        }
        | {"test": len(record[side]["test"])}
        for side in ("harmful", "harmless")
    }
    run_json = {
        "model": context.model_record,
        "options": asdict(context.options),
        "chat": record["chat"],
        "refusal_tokens": record["refusal_tokens"],
        "refusal_tokens_origin": record["refusal_tokens_origin"],
        "published_refusal_tokens": record["published_refusal_tokens"],
        "prompt_sets_sha256": {
            side: {part: prompts.sha256 for part, prompts in vars(split).items()}
            for side, split in context.splits.items()
        },
        "versions": versions(),
        "quick": context.options.quick,
    }
    write_json(context.path / "run.json", run_json)
    return summary
