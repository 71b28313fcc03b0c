"""Arditi et al. 2024 as a sequence of stages: prompts, directions, scores, selection, completions, CE loss."""

from collections.abc import Sequence
from dataclasses import replace

from ..directions import Direction
from ..engine.jobs import Engine
from ..errors import UserError
from ..files import write_record
from ..model.points import HookedModel
from ..run.answers import SIDES
from ..run.folder import ranked
from ..run.options import RunOptions
from ..run.record import DIRECTION, DOES_NOT_REFUSE, MEAN_DIFFS, SUMMARY, DirectionRecord, RunSummary, SelectionRecord
from ..run.stages import RunFolder
from .combinations import Multi, combine, evaluate_combination
from .context import RunContext
from .controls import measure_controls
from .effects import BASELINE, interventions_on, loss_sets, loss_texts, losses, rates
from .prompts import examples, prepare
from .search import (
    AnyEstimator,
    choose_direction,
    draw_scores,
    find_directions,
    name_of,
    named_estimator,
    record_run,
    score_directions,
)


def run(
    model: HookedModel,
    source: str,
    options: RunOptions,
    folder: RunFolder,
    *,
    directions: Sequence[int] = (),
    multi: Multi = "span",
    estimator: AnyEstimator | None = None,
    engine: Engine | None = None,
) -> RunSummary:
    """Find, choose and test the refusal direction of a chat model; return what `summary.json` holds.

    Stages that were done before from the same inputs are kept. When no candidate survives the thresholds, the
    summary says so (status "no candidate survives"), the later steps are left out, and what they wrote for the
    direction of an earlier run is set aside; the same where the model does not refuse (status "does not refuse"),
    before any search.

    Args:
        model: from `load_model`.
        source: what was loaded, as `resolve_source` names it.
        directions: ranks of surviving candidates to ablate together instead of the best one; the summary then goes
            to the combination's folder, and the search and the baselines are the run's.
        multi: how several are ablated.
        estimator: makes the candidates from both sides' mean activations or, marked `sees_prompts`, every prompt's;
            None is the one that the options name.
        engine: where candidates are scored and answers are written; None is this process.
    """
    if directions and not {"completions", "loss"} & set(options.steps):
        raise UserError("--directions is about completions and CE loss: add completions or loss to --steps")
    if estimator is not None:
        options = replace(options, estimator=name_of(estimator))
    elif options.estimator is not None:
        estimator = named_estimator(options.estimator)  # one that does not exist shows now
    started = RunContext.start(model, source, options, folder, engine)
    texts = loss_sets(options) if "loss" in options.steps else None  # a set that does not exist shows now
    context = prepare(started)
    summary = record_run(context)
    if not directions:
        (folder.path / "report.html").unlink(missing_ok=True)
        _write(context, summary)
    if not context.prompts.refuses:
        folder.set_aside(MEAN_DIFFS)
        return _write(context, replace(summary, status=DOES_NOT_REFUSE, examples=examples(context.prompts)))
    grid = find_directions(context, estimator)
    if set(options.steps) == {"directions"}:
        return _write(context, replace(summary, status="directions only"))
    scores = score_directions(context, grid, n_best=max([0, *directions]) + 1)
    chosen = choose_direction(context, grid, scores)
    draw_scores(context, scores, chosen)
    baselines = {"harmful": scores.baseline_harmful, "harmless": scores.baseline_harmless}
    summary = replace(summary, baseline_scores_nats=baselines, selection=SelectionRecord.of(chosen))
    if not chosen.survivors:
        folder.set_aside(DIRECTION)
        return _write(context, replace(summary, status="no candidate survives"))
    if directions:
        combination = combine(directions, ranked(grid, chosen, directions), multi)
        return evaluate_combination(context, combination, summary, texts)
    direction = Direction.load(folder.path / DIRECTION)
    controls = measure_controls(context, direction)
    summary = replace(summary, direction=DirectionRecord.of(direction), controls=controls)
    _write(context, summary)
    if "completions" in options.steps:
        effects = {side: rates(context, side, interventions_on(side, direction, options.n_random)) for side in SIDES}
        summary = replace(summary, completions=effects)
        _write(context, summary)
    if texts is not None and (scored := loss_texts(context, texts)):
        labels = [BASELINE, *interventions_on("harmful", direction, options.n_random)]
        by_label = {labelled.label: losses(context, labelled, scored) for labelled in labels}
        summary = replace(summary, ce_loss=by_label)
    return _write(context, replace(summary, status="done"))


def _write(context: RunContext, summary: RunSummary) -> RunSummary:
    """Write how far this run came, so that a killed one never shows the results of an earlier one."""
    written = replace(summary, seconds=context.folder.seconds(), peak_mib=context.folder.peak_mib())
    write_record(context.path / SUMMARY, written)
    return written
