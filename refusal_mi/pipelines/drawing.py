"""The figures of a run: its per-layer plots under the published names, and what combinations of directions do."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..candidates import ScoreGrid
from ..plots import Measure, plot_scores
from ..plots.combos import CombinationPoint, plot_combos
from ..plots.save import PLOTLY_FILE, save_figure, save_figures
from ..provenance import display_name
from ..selection import Selection
from ..stats import Rate
from .context import RunContext
from .search import EVALUATIONS

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
                tokens=run.chat.describe()["post_instruction_tokens"],
                model=display_name(run.model_record["source"]),
            )
            for stem, measure in PLOTS.items()
        }
        save_figures(figures, run.path / FOLDER)

    files = [f"{FOLDER}/{stem}.html" for stem in PLOTS]
    inputs = run.inputs(EVALUATIONS, thresholds=asdict(chosen.thresholds), plotly=version("plotly"))
    run.stage("plots", inputs, [*files, f"{FOLDER}/{PLOTLY_FILE}"], compute, f"{len(files)} per-layer plots")


def draw_combos(found: Mapping[str, Any], folder: Path) -> None:
    """`combos.html` from what `combos.json` holds."""
    name, kl_max = display_name(found["model"]["source"]), found["options"]["kl_max"]
    figure = plot_combos(points(found), text_set=found["text_set"], kl_max=kl_max, model=name)
    save_figure(figure, folder / "combos.html")


def points(found: Mapping[str, Any]) -> list[CombinationPoint]:
    """The figure's points from `combos.json`: the plain model, every combination, random spans."""
    kl_max, rows = found["options"]["kl_max"], []
    kinds = [("plain model", [found["baseline"]]), ("combination", found["combinations"])]
    for kind, group in [*kinds, ("random", found.get("random", []))]:
        for row in group:
            rows.append(
                CombinationPoint(
                    row["label"],
                    kind,  # type: ignore[arg-type]
                    len(row.get("ranks", [])) or 1,
                    Rate(row["refusal"]["count"], row["refusal"]["n"]),
                    row["bypass"],
                    row["kl_nats"],
                    row["ce_loss"][found["text_set"]]["ce_loss"],
                    is_allowed=kind != "combination" or kl_max is None or row["kl_nats"] <= kl_max,
                    is_winner=row["label"] == found.get("winner"),
                )
            )
    return rows
