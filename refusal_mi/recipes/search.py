"""Candidate directions, their scores, the choice among them and their pictures, as stages of a run."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import torch

from ..directions import ActivationMeans, DirectionGrid, Estimator, difference_in_means
from ..errors import UserError
from ..estimators.named import Named, estimator_named
from ..estimators.names import CATEGORY
from ..estimators.samples import ActivationSamples, EveryPlace, SampleEstimator, needs_prompts
from ..figures.save import PLOTLY_FILE, save_figures
from ..figures.scores import Measure, plot_scores
from ..files import write_json, write_record, write_tensors
from ..measures import RefusalTokens
from ..model.points import resid_hook
from ..model.provenance import versions
from ..reading import mean_activations, sample_activations
from ..run.answers import SIDES
from ..run.folder import load_grid, load_scores
from ..run.record import (
    BASELINE,
    DIRECTION,
    DIRECTION_RECORD,
    EVALUATIONS,
    MEAN_DIFFS,
    MEAN_DIFFS_RECORD,
    MEANS,
    PUBLISHED_TOKENS,
    RUN,
    SCORES,
    SURVIVORS,
    BaselineRecord,
    GridRecord,
    Kept,
    PromptCounts,
    RunInfo,
    RunSummary,
)
from ..search.grid import ScoreGrid, Selection, select
from ..search.staged import DEFAULT_SCREENING, MOST, staged_token_sets, usual_cost
from ..search.sweep import exact_items, sweep_token_sets
from ..search.thresholds import layer_limit
from ..stats import Rate
from ..text.prompts import PromptSet
from .context import Prepared

METHOD = "difference in means, harmful - harmless"
AnyEstimator = Estimator | SampleEstimator
"""One that sees means, or one that is marked as seeing single prompts."""


def find_directions(run: Prepared, estimator: AnyEstimator | None = None) -> DirectionGrid:
    """The candidate directions of every position and layer, from the activations: `generate_directions/`.

    Args:
        estimator: None is the one that the options name, difference of means by default.

    Raises:
        UserError: the options name no estimator, or it gives no grid of these positions and layers.
    """
    if estimator is None:
        estimator = difference_in_means if run.options.estimator is None else named_estimator(run.options.estimator)
    sets = [run.prompts.side(side).kept_set("train") for side in SIDES]
    harmful, harmless = (each.instructions for each in sets)
    files = [MEAN_DIFFS, MEAN_DIFFS_RECORD, MEANS]

    def compute() -> None:
        reader = sample_activations if needs_prompts(estimator) else mean_activations

        def read(instructions: PromptSet) -> ActivationMeans | ActivationSamples:
            return run.batched(lambda size: reader(run.model, run.chat, instructions, batch_size=size))

        sides = run.timed("pass", len(harmful) + len(harmless), lambda: [read(each) for each in sets])
        means = [side.means if isinstance(side, ActivationSamples) else side for side in sides]
        grid = difference_in_means(*means) if estimator is difference_in_means else estimated(estimator, sides)
        write_tensors(run.path / files[0], grid.vectors)
        write_tensors(run.path / files[2], {"harmful": means[0].means, "harmless": means[1].means})
        record = GridRecord(
            METHOD if estimator is difference_in_means else name_of(estimator),
            grid.positions,
            tuple(map(tuple, grid.vectors.norm(dim=-1).tolist())),
            len(harmful),
            len(harmless),
            grid.is_degenerate,
            tuple(resid_hook(layer, grid.n_layers) for layer in range(grid.n_layers)),
            quick=run.options.quick,
        )
        write_record(run.path / files[1], record)

    kind = "single" if needs_prompts(estimator) else "mean"
    about = f"{kind} residual streams of {len(harmful)} harmful and {len(harmless)} harmless prompts"
    about += run.estimate("pass", len(harmful) + len(harmless))
    inputs = run.inputs(harmful=harmful, harmless=harmless)
    if isinstance(estimator, Named):
        inputs |= {"estimator": estimator.name}
        inputs |= {"categories": sets[0].categories} if estimator.name.startswith(CATEGORY) else {}
    elif estimator is not difference_in_means:
        # What a function does depends on more than can be hashed: its candidates are made anew every time.
        inputs |= {"estimator": name_of(estimator), "call": str(uuid4())}
    run.stage("directions", inputs, files, compute, about)
    return load_grid(run.path)


def named_estimator(name: str) -> AnyEstimator:
    """The package's estimator of this name, or the function that "module:function" names.

    Modules are looked for in the working directory and among the installed packages.

    Raises:
        UserError: there is no such estimator, module or function.
    """
    module, _, function = name.partition(":")
    if ":" not in name:
        return estimator_named(name)
    if not module or not function:
        raise UserError(f"an estimator is named module:function, not {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # and there it stays: a function may import when it is called
    try:
        function_named = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever a stranger's module does when it is imported
        raise UserError(f"cannot import the estimator {name}: {type(error).__name__}: {error}") from error
    if not callable(function_named):
        raise UserError(f"{module} has no function {function!r}; an estimator is named module:function")
    return function_named


def estimated(estimator: AnyEstimator, sides: Sequence[Any]) -> DirectionGrid:
    """What an estimator gives, if it is a grid of the positions and layers that it was given."""
    harmful, harmless = sides
    try:
        grid: Any = estimator(harmful, harmless)
    except Exception as error:  # whatever a stranger's function does
        if isinstance(error, UserError) and isinstance(estimator, Named):
            raise
        about = f"the estimator {name_of(estimator)} failed: {type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and error.obj is harmful and not needs_prompts(estimator):
            about += "; it was given means: to see single prompts, mark it with estimators.samples.sees_prompts"
        raise UserError(about) from error
    shape = tuple(harmful.prompts.shape[1:] if needs_prompts(estimator) else harmful.means.shape)
    if (
        not isinstance(grid, DirectionGrid)
        or grid.positions != harmful.positions
        or tuple(grid.vectors.shape) != shape
        or (len(grid.is_degenerate), *{len(row) for row in grid.is_degenerate}) != shape[:2]
    ):
        raise UserError(
            f"an estimator gives a DirectionGrid with one vector for each position and layer, {shape}, "
            "and says of each in is_degenerate whether there is none"
        )
    is_zero = ~grid.vectors.flatten(2).any(-1)
    return replace(grid, is_degenerate=tuple(map(tuple, (is_zero | torch.tensor(grid.is_degenerate)).tolist())))


def name_of(function: Any) -> str:
    """How an estimator is named on the command line: module:function, or the package's own name."""
    if isinstance(function, Named):
        return function.name
    if function is difference_in_means:
        return "mean"
    if isinstance(function, EveryPlace):
        return name_of(function.function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def score_directions(run: Prepared, grid: DirectionGrid, *, n_best: int = 1) -> ScoreGrid:
    """Bypass, induce and KL of every candidate on the validation prompts: `select_direction/`.

    Args:
        n_best: survivors that a staged search must look for; as many as the options ask for, and as one before looked
            for, if these are more.
    """
    n_best = max(n_best, run.options.n_best, run.folder.before("scores").get("n_best", 1))
    files = [EVALUATIONS, SCORES, BASELINE]
    token_sets: list[RefusalTokens] = [run.prompts.prefixes]
    if run.prompts.published_refusal_tokens:
        files.append(PUBLISHED_TOKENS)
        token_sets.append([token.ids for token in run.prompts.published_refusal_tokens])
    harmful, harmless = run.kept("harmful", "val"), run.kept("harmless", "val")
    pruned = run.options.thresholds.prune_layers if run.options.skip_pruned else None
    zero_point, formula = run.prompts.zero_point_nats, run.options.kl_formula

    def compute() -> None:
        sets = (harmful, harmless, token_sets)
        size, rule = run.options.batch_size, run.options.thresholds
        if run.options.search == "staged":
            scored = staged_token_sets(
                run.model,
                run.chat,
                grid,
                *sets,
                thresholds=rule,
                zero_point=zero_point,
                n_best=n_best,
                kl_formula=formula,
                batch_size=size,
                engine=run.engine,
            )
        else:
            scored = sweep_token_sets(
                run.model,
                run.chat,
                grid,
                *sets,
                prune_layers=pruned,
                kl_formula=formula,
                batch_size=size,
                engine=run.engine,
            )
        for path, scores in zip([EVALUATIONS, PUBLISHED_TOKENS], scored, strict=False):
            write_json(run.path / path, [row.describe() | run.mark for row in scores.rows])
        write_tensors(run.path / files[1], scored[0].per_prompt)
        plain = scored[0].baseline_harmful, scored[0].baseline_harmless
        sizes = grid.n_layers, len(harmful), len(harmless)
        write_record(run.path / files[2], BaselineRecord(*plain, *sizes, zero_point, quick=run.options.quick))

    sizes, rule = (len(harmful), len(harmless)), run.options.thresholds
    inputs = run.inputs(MEAN_DIFFS, harmful=harmful, harmless=harmless, token_sets=token_sets, zero_point=zero_point)
    inputs |= run.options.kl_input
    limit = layer_limit(grid.n_layers, rule.prune_layers if run.options.search == "staged" else pruned)
    places = [place for place in grid.candidates() if place[1] < limit]
    if run.options.search == "staged":
        n_usual = round(usual_cost(places, grid.n_layers, *sizes, DEFAULT_SCREENING, n_best))
        about = f"{len(places)} candidates, staged search, about as much work as {n_usual} prompts"
        about += f"{run.estimate('pass', n_usual)}; about {MOST} times that where none passes"
        inputs |= {"search": "staged", "thresholds": asdict(rule), "n_best": n_best}
    else:
        n_whole = round(sum(item.cost(grid.n_layers) for item in exact_items(places, sizes[0], sum(sizes))))
        about = f"{len(places)} candidates, as much work as {n_whole} prompts{run.estimate('pass', n_whole, most=True)}"
        if run.options.skip_pruned:
            inputs |= {"skip_pruned": rule.prune_layers}
    run.stage("scores", inputs, files, compute, about)
    return load_scores(run.path)


def choose_direction(run: Prepared, grid: DirectionGrid, scores: ScoreGrid) -> Selection:
    """Apply the thresholds; where a candidate survives, write `direction.pt` and its metadata."""
    chosen = select(scores, run.options.thresholds)
    final = [DIRECTION, DIRECTION_RECORD]
    provenance = {
        "model": run.model_record,
        "n_harmful": len(run.kept("harmful", "train")),
        "n_harmless": len(run.kept("harmless", "train")),
        "template_sha256": run.chat.record().template_sha256,
        "refusal_tokens": run.prompts.refusal_tokens,
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


def draw_scores(run: Prepared, scores: ScoreGrid, chosen: Selection) -> None:
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


def record_run(run: Prepared) -> RunSummary:
    """Write `run.json`; return the head of the summary: model, refusal tokens, prompt counts."""
    prompts = run.prompts
    info = RunInfo(
        run.model_record,
        run.options,
        prompts.chat,
        prompts.refusal_tokens,
        prompts.refusal_tokens_origin,
        prompts.published_refusal_tokens,
        {side: {part: each.sha256 for part, each in split.parts.items()} for side, split in run.splits.items()},
        versions(),
        run.options.quick,
    )
    write_record(run.path / RUN, info)
    counts: dict[str, PromptCounts] = {}
    for side in SIDES:
        rows = prompts.side(side)
        train, val = (Kept(len(rows.kept(part)), len(getattr(rows, part))) for part in ("train", "val"))
        counts[side] = PromptCounts(train, val, len(rows.test))
    refused: dict[str, Rate] = {side: rate for side in SIDES if (rate := prompts.refused(side)) is not None}
    return RunSummary(
        run.model_record,
        run.options.quick,
        "unfinished",
        prompts.refusal_tokens,
        counts,
        refused_by_text=refused,
        zero_point_nats=prompts.zero_point_nats,
        judge_caution=prompts.judge_caution,
    )
