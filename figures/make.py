"""Make every file in `figures/` from the embedded model: `python figures/make.py`, or `make figures`.

Results go to build/figures and are computed once; drawing them again needs no model. Pictures and their numbers are
written here, interactive pages (each figure's .html, plotly once beside them) to build/figures/html.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from refusal_mi.analysis.result import figures, load_result
from refusal_mi.figures.effects import combination_points, plot_combos
from refusal_mi.figures.save import save_figure, save_figures
from refusal_mi.figures.scores import plot_score_panels, plot_scores
from refusal_mi.files import read_record, write_json, write_record
from refusal_mi.model.loading import resolve_source
from refusal_mi.notebook import combined, load
from refusal_mi.recipes.arditi import run as run_arditi
from refusal_mi.recipes.options import default_options
from refusal_mi.run.combos import CombosResult
from refusal_mi.run.folder import RunInputs, RunRecord
from refusal_mi.run.stages import RunFolder

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {"scores": 800, "score_panels": 1200}
WIDTH = 1080
KINDS = ("projections", "attribution", "dose", "pca", "lens")
PICTURES = ("scores", "score_panels", "projections", "attribution", "dose", "pca", "lens", "combinations")
"""Stems of the pictures, each with a .json of its numbers."""
N_DIGITS = 5


def main() -> int:
    """Compute what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "figures")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "figures")
    parser.add_argument("--fresh", action="store_true", help="compute every result again")
    arguments = parser.parse_args()
    compute(arguments.build_dir, fresh=arguments.fresh)
    drawn = draw(arguments.build_dir)
    for name, figure in drawn.items():
        save_figure(figure, arguments.output_dir / f"{name}.png", width=WIDTHS.get(name, WIDTH))
        write_json(arguments.output_dir / f"{name}.json", numbers(figure))
    save_figures(drawn, arguments.build_dir / "html")
    return 0


def compute(build: Path, *, fresh: bool) -> None:
    """The run of the embedded model, every analysis that is drawn, and the combinations of directions."""
    source = resolve_source(None)
    model = load(source)
    options = replace(default_options(source), steps=("directions", "selection"))
    say = partial(print, file=sys.stderr)
    # The folder knows what its stages were computed from, so results of other weights are not kept.
    before = _stamp(build)
    run_arditi(model, source, options, RunFolder(build / "run", fresh, say))
    inputs = RunInputs(model, build / "run")
    is_same = before == _stamp(build) and not fresh
    for kind in KINDS:
        path = build / "results" / f"{kind}.json"
        if not (is_same and path.exists()):
            say(kind)
            _analysis(kind)(inputs).save(path)
    write_record(build / "results" / "combinations.json", combined(inputs, n_best=4, n_ce=96))


def draw(build: Path) -> dict[str, go.Figure]:
    """Every picture, from files alone."""
    record = RunRecord.load(build / "run")
    scores, chosen = record.scores, record.selection
    assert scores is not None and chosen is not None
    shared: dict[str, Any] = {"chosen": chosen.best, "thresholds": chosen.thresholds, "tokens": record.tokens}
    shared["model"] = record.model_name
    result = read_record(build / "results" / "combinations.json", CombosResult)
    drawn = {"scores": plot_scores(scores, **shared), "score_panels": plot_score_panels(scores, **shared)}
    for kind in KINDS:
        drawn[kind] = next(iter(figures(load_result(build / "results" / f"{kind}.json")).values()))
    drawn["combinations"] = plot_combos(
        combination_points(result), text_set=result.text_set, kl_max=result.options.kl_max, model=record.model_name
    )
    return {name: drawn[name] for name in PICTURES}


def numbers(figure: go.Figure) -> dict[str, Any]:
    """What a picture shows, as JSON: its words, and the values of every trace to five digits."""
    axes = figure.select_xaxes(), figure.select_yaxes()
    layout = figure.layout.title
    return {
        "title": _in_one_line(layout.text),
        "about": _in_one_line(layout.subtitle.text),
        "axes": [[_in_one_line(axis.title.text) for axis in side if axis.title.text] for side in axes],
        "traces": [_trace(trace) for trace in figure.data],
    }


def _in_one_line(text: str | None) -> str | None:
    """Words without the line breaks that the width of a figure asks for."""
    return None if text is None else text.replace("<br>", " ")


def _trace(trace: Any) -> dict[str, Any]:
    # The figure's own JSON turns arrays into base64; the attributes do not.
    found: dict[str, Any] = {"type": trace.type, "name": _in_one_line(trace.name)}
    for key in ("x", "y", "z"):
        if getattr(trace, key, None) is not None:
            found[key] = _rounded(getattr(trace, key))
    for key in ("array", "arrayminus"):
        if getattr(trace, "error_y", None) is not None and getattr(trace.error_y, key) is not None:
            found[f"error_{key}"] = _rounded(getattr(trace.error_y, key))
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, (str, int)) or value is None:
        return value
    if hasattr(value, "__len__"):
        return [_rounded(each) for each in value]
    return float(f"{value:.{N_DIGITS}g}") if value == value else None


def _analysis(kind: str) -> Callable[[RunInputs], Any]:
    from refusal_mi.analysis.result import analysis_module

    return analysis_module(kind).from_run


def _stamp(build: Path) -> str:
    path = build / "run" / "direction.pt"
    return path.with_name("direction_metadata.json").read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
