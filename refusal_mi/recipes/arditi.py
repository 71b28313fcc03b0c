"""Arditi et al. 2024 as a sequence of stages: prompts, directions, scores, selection, completions, CE loss."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..directions import Direction
from ..errors import UserError
from ..files import write_json
from ..model.points import HookedModel
from ..recipes.search import record_run
from ..run.record import DIRECTION, ranked
from ..run.stages import RunFolder
from ..search.grid import Selection
from .combinations import Multi, combine, evaluate_combination
from .context import RunContext
from .effects import BASELINE, interventions_on, loss_sets, loss_texts, losses, rates
from .options import RunOptions
from .search import choose_direction, draw_scores, find_directions, score_directions


def run(
    model: HookedModel,
    source: str,
    options: RunOptions,
    folder: RunFolder,
    *,
    directions: Sequence[int] = (),
    multi: Multi = "span",
) -> dict[str, Any]:
    """Find, choose and test the refusal direction of a chat model; return what `summary.json` holds.

    Stages that were done before from the same inputs are kept. When no candidate survives the thresholds, the
    summary says so (`"status": "no candidate survives"`), the later steps are left out, and what they wrote for the
    direction of an earlier run is set aside.

    Args:
        model: from `load_model`.
        source: what was loaded, as `resolve_source` names it.
        directions: ranks of surviving candidates to ablate together instead of the best one; the summary then goes
            to the combination's folder, and the search and the baselines are the run's.
        multi: how several are ablated.
    """
    if directions and not {"completions", "loss"} & set(options.steps):
        raise UserError("--directions is about completions and CE loss: add completions or loss to --steps")
    context = RunContext(model, source, options, folder)
    texts = loss_sets(options) if "loss" in options.steps else None  # a set that does not exist shows now
    summary = record_run(context)
    if not directions:
        (folder.path / "report.html").unlink(missing_ok=True)
        _write(context, summary)
    grid = find_directions(context)
    if set(options.steps) == {"directions"}:
        return _finish(context, summary, "directions only")
    scores = score_directions(context, grid)
    chosen = choose_direction(context, grid, scores)
    draw_scores(context, scores, chosen)
    summary["baseline_scores_nats"] = {"harmful": scores.baseline_harmful, "harmless": scores.baseline_harmless}
    summary["selection"] = _describe_selection(chosen)
    if not chosen.survivors:
        folder.set_aside(DIRECTION)
        return _finish(context, summary, "no candidate survives")
    if directions:
        combination = combine(directions, ranked(grid, chosen, directions), multi)
        return evaluate_combination(context, combination, summary, texts)
    direction = Direction.load(folder.path / DIRECTION)
    summary["direction"] = direction.describe()
    _write(context, summary)
    if "completions" in options.steps:
        summary["completions"] = {
            side: rates(context, side, interventions_on(side, direction, options.n_random))
            for side in ("harmful", "harmless")
        }
        _write(context, summary)
    if texts is not None:
        scored = loss_texts(context, texts)
        labels = [BASELINE, *interventions_on("harmful", direction, options.n_random)]
        summary["ce_loss"] = {labelled.label: losses(context, labelled, scored) for labelled in labels}
    return _finish(context, summary, "done")


def _describe_selection(chosen: Selection) -> dict[str, Any]:
    return {
        "n_candidates": len(chosen.survivors) + len(chosen.rejected),
        "n_survivors": len(chosen.survivors),
        "explanation": chosen.explain(),
        "thresholds": asdict(chosen.thresholds),
        "best": chosen.survivors[0].describe() if chosen.survivors else None,
    }


def _finish(context: RunContext, summary: dict[str, Any], status: str) -> dict[str, Any]:
    return _write(context, {**summary, "status": status})


def _write(context: RunContext, summary: dict[str, Any]) -> dict[str, Any]:
    """Write how far this run came, so that a killed one never shows the results of an earlier one."""
    written = {**summary, "seconds": context.folder.seconds()}
    write_json(context.path / "summary.json", written)
    return written
