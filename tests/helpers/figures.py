"""Every figure of the package, small, and what a browser shows of them."""

import inspect
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from typing import Any

import plotly.graph_objects as go
import torch

import refusal_mi.analysis
import refusal_mi.figures
from refusal_mi.analysis.result import AnalysisResult, analysis_module
from refusal_mi.audit.result import AuditResult, WriterChange
from refusal_mi.figures.audit import plot_audit
from refusal_mi.figures.effects import CombinationPoint, plot_combos, plot_layer_sweep, plot_losses, plot_rates
from refusal_mi.figures.labels import plot_label_scores
from refusal_mi.figures.localize import plot_front, plot_writes
from refusal_mi.figures.methods import plot_beside, plot_cost, plot_ratios
from refusal_mi.figures.scores import plot_norms, plot_score_lines, plot_score_panels, plot_scores
from refusal_mi.figures.study import plot_study
from refusal_mi.figures.variants import plot_variant_parts, plot_variant_rates, plot_variants
from refusal_mi.measures import ABPoint, ABSweep, LossResult
from refusal_mi.run.answers import Effect, SideEffects
from refusal_mi.run.variants import Change, SideRow, VariantRow, VariantsResult, Wording
from refusal_mi.search.grid import select
from refusal_mi.search.thresholds import Thresholds
from refusal_mi.stats import Rate
from refusal_mi.studies.table import CellRows, Number, TableRow, table_rows
from refusal_mi.text.variants import PARTS, PLACE, Variant
from tests.helpers.browser import Page
from tests.helpers.runs import TOKENS, make_model, make_scores

MODEL = "Qwen2.5-Coder-0.5B-Instruct"


def plot_functions() -> set[str]:
    """The names of all public `plot_*` functions in the rooms that draw."""
    found = set()
    for room in (refusal_mi.figures, refusal_mi.analysis):
        for module in pkgutil.iter_modules(room.__path__):
            for name, value in vars(import_module(f"{room.__name__}.{module.name}")).items():
                if name.startswith("plot_") and inspect.isfunction(value):
                    found.add(name)
    return found


def every_figure(results: Mapping[str, AnalysisResult], **look: Any) -> dict[str, go.Figure]:
    """`plot_*` function -> what it draws with a look, of results by analysis and of made-up runs."""
    drawn = _of_runs(**look)
    for kind, result in results.items():
        for draw in analysis_module(kind).FIGURES.values():
            if draw.__name__.startswith("plot_"):
                drawn[draw.__name__] = draw(result, **look)
    return drawn


def _of_runs(**look: Any) -> dict[str, go.Figure]:
    scores = make_scores()
    shared = {"chosen": select(scores).best, "thresholds": Thresholds(), "tokens": TOKENS, "model": MODEL, **look}
    labels = {"harmful": [0.5, -0.7, -2.0], "harmless": [-3.0, -0.9]}
    refused = {"harmful": [True, True, False], "harmless": [False, True]}
    texts = ("organism_plain_text", "chat_answers")
    losses = {
        label: {name: LossResult(loss + index, 7.4, 12_345) for index, name in enumerate(texts)}
        for label, loss in (("baseline", 1.0), ("ablation", 1.1), ("actadd", 1.2), ("random_ablation_0", 1.05))
    }
    effects = tuple(
        Effect(label, Rate(count, 40), Rate(2, 40))
        for label, count in (("baseline", 38), ("ablation", 0), ("actadd", 3), ("random_ablation_0", 38))
    )
    sides = [SideEffects("harmful", "jailbreakbench_harmful", effects), SideEffects("harmless", "alpaca", effects)]
    writes = {"blocks.0.hook_resid_pre": (5.0, 0.001)} | {
        f"blocks.{block}.{end}": (6.0 - block, 0.01 * block)
        for block in range(12)
        for end in ("hook_attn_out", "hook_mlp_out")
    }
    points = [
        ABPoint(layer, sign, 0.5, 0.4, 0.6, 0.1 * sign, 0.05 * sign - 0.02, 0.2, 50)
        for layer in range(24)
        for sign in (1.0, -1.0)
    ]
    return {
        "plot_scores": plot_scores(scores, **shared),
        "plot_score_panels": plot_score_panels(scores, **shared),
        "plot_score_lines": plot_score_lines({MODEL: scores, "another run": make_scores(kl=0.05)}, **look),
        "plot_norms": plot_norms([[0.0, 1.0, 2.0]] * 5, range(-5, 0), tokens=TOKENS, model=MODEL, n_prompts=64, **look),
        "plot_rates": plot_rates(sides, model=MODEL, **look),
        "plot_losses": plot_losses(losses, model=MODEL, **look),
        "plot_combos": plot_combos(_combinations(), text_set="plain_text", kl_max=0.1, model=MODEL, **look),
        "plot_layer_sweep": plot_layer_sweep(ABSweep("held-out pairs", 0.4, tuple(points), 50), model=MODEL, **look),
        "plot_label_scores": plot_label_scores(labels, refused, zero_point=-0.8, model=MODEL, **look),
        "plot_writes": plot_writes(writes, 6.2, model=MODEL, **look),
        "plot_front": plot_front(*_front(), model=MODEL, n=32, **look),
        "plot_cost": plot_cost(_compared(), model=MODEL, **look),
        "plot_ratios": plot_ratios(_compared(), model=MODEL, **look),
        "plot_beside": plot_beside(_compared(), model=MODEL, **look),
        "plot_variants": plot_variants(worded(), model=MODEL, **look),
        "plot_variant_rates": plot_variant_rates(worded(), model=MODEL, **look),
        "plot_variant_parts": plot_variant_parts(worded(), model=MODEL, **look),
        "plot_audit": plot_audit(_audited(), **look),
        "plot_study": plot_study(studied(), name="three models", **look),
    }


def _combinations() -> list[CombinationPoint]:
    kinds = [("plain model", "plain", 1, 1.0), ("random", "random 0", 1, 1.002)]
    found = [CombinationPoint(label, kind, n, Rate(38, 40), 5.0, 0.1, loss, True) for kind, label, n, loss in kinds]
    for index, label in enumerate(("0", "1", "2", "0-1", "0-2", "1-2", "0-1-2")):
        n, loss = 1 + label.count("-"), 1.0004 + 0.0001 * (index * 7 % 5)
        rate = Rate(2 * (index % 2), 40)
        ends = None if index == 2 else (loss - 0.0003, loss + 0.0002)
        found.append(CombinationPoint(label, "combination", n, rate, -3.0, 0.01, loss, index != 3, index == 0, ends))
    return found


def _front() -> tuple[Any, ...]:
    """Removals, the front, the whole and the least one, as `plot_front` takes them."""
    removals = [Removed(f"layers {layer}–{layer + 4}", 1 / (1 + layer), 1e-4 * 2**layer) for layer in range(10)]
    return removals, removals[3:6], removals[-1], removals[5]


def _audited() -> AuditResult:
    """An audit of a model of 24 blocks, of whose middle a direction was removed."""
    writers = []
    for component, block in [("embed", None), *((part, block) for part in ("attn", "mlp") for block in range(24))]:
        strength = 1.0 if block is not None and 6 <= block < 18 else 0.0
        change, name = 0.033 * strength, f"{component}.{block}.weight"
        writers.append(
            WriterChange(
                name, component, block, change, False, strength > 0, strength, 1 - strength, int(strength), strength,
                strength, (strength,), strength, "plain", None
            )
        )  # fmt: skip
    directions = torch.eye(8, dtype=torch.float64)[:1]
    return AuditResult(MODEL, f"{MODEL}-edited", "qwen2", 24, 8, tuple(writers), (), (), directions, 1.0, (), ())


def _compared() -> Any:
    """Methods at several strengths, one of which never stops refusals, and controls."""
    rows = []
    for index, label in enumerate(("mean:1", "projected:1", "peel:1", "peel:2", "peel:3", "lda:1")):
        curve = [At(step / 5, Rate(max(0, 40 - 10 * step), 40), (1e-4 * step * (1 + index),) * 3) for step in range(7)]
        ratio = (
            (None, None, None) if label == "lda:1" else (0.5 + index, 0.3 + index, None if index == 2 else 1.0 + index)
        )
        rows.append(Method(label, curve, AtMatch(ratio, 0.02, 0.31 if label == "peel:3" else 0.05)))
    controls = [Control(name, k, 0.97, 1e-3 * k) for name in ("random", "within harmful") for k in (1, 2, 3)]
    draws = [OverDraws(row.label, "mean:1", (0.5 + index, None, 0.7 * index + 0.2)) for index, row in enumerate(rows)]
    change = {"difference": -0.03, "low": -0.08, "high": 0.02}
    sets = [OfSet(name, change) for name in ("harmless", "a-set-of-prompts-that-look-harmful")]
    beside = [
        BesideIt(label, sets, [OfTask("everyday", "acc_norm", (-0.02, -0.07, 0.03))])
        for label in ("plain", *(row.label for row in rows), "random:1", "random:2")
    ]
    return Compared(rows, controls, 0.05, 40, 1, draws, beside)


def worded() -> VariantsResult:
    """Five variants of a model of 24 layers, which move the direction more the later they stand."""

    def wording(shift: float, refused: int) -> Wording:
        along = tuple(((mean := layer * (1 - shift)), mean - 0.5, mean + 0.5) for layer in range(25))
        flat = tuple((0.1, -0.2, 0.4) for _ in range(25))
        shares = {part: (0.25, 0.2, 0.3) for part in PARTS}
        tokens = {part: 12.0 for part in PARTS}
        rates = Rate(refused, 40), Rate(1, 40)
        return Wording(*rates, (1.0, 0.5, 1.5), (along,) * 5, (flat,) * 5, shares, shares, tokens, 0, {"I cannot": 9})

    def row(index: int, name: str) -> VariantRow:
        one, other = wording(0.2 * index, 40 - 9 * index), wording(0.02 * index, 38)
        change = Change({"difference": -0.1}, 0.5, (0.0, -1.0, 1.0), one.projections, one.random_projections)
        side = SideRow(one, other, change, change, change)
        return VariantRow(Variant(name, f"{name} {PLACE}"), {"harmful": side, "harmless": side})

    names = ("polite prefix", "an actor who reads a line", "answer in French", "</script><b>x", "three more requests")
    plain, heads = {side: wording(0.0, 39) for side in ("harmful", "harmless")}, tuple((9, each) for each in range(8))
    n = {"harmful": 40, "harmless": 40}
    rows = tuple(row(index, name) for index, name in enumerate(names))
    return VariantsResult(make_model(), 12, -1, tuple(range(-5, 0)), TOKENS, heads, n, 64, 42, plain, rows, "substring")


def studied() -> list[TableRow]:
    """The table of a study: two models that refuse, one that does not, one that failed; two seeds, three methods."""

    def share(method: str, k: int, value: float, stage: str = "compare-methods") -> Number:
        return Number(
            stage, method, k, "harmful", "refused", value, max(0.0, value - 0.1), min(1.0, value + 0.1), 40, "share"
        )

    rows = []
    for at, (model, seed) in enumerate((model, seed) for model in (MODEL, "<b>gemma</b>-2-2b-it") for seed in (0, 1)):
        found = [share("plain", 0, 0.95)]
        for method, k, ratio in (("mean", 1, 1.0), ("peel", 2, 1.6 + 0.2 * at), ("category", 3, None)):
            ends = (None, None) if ratio is None else (0.8 * ratio, None if at == 2 else 1.3 * ratio)
            stage = ("compare-methods", method, k)
            found.append(share(method, k, 0.02 * k + 0.01 * at))
            found.append(Number(*stage, "harmless", "kl_ratio", ratio, *ends, 40, "ratio"))
            found.append(Number(*stage, "plain texts", "ce_change", 0.004 * k, None, None, None, "nats per token"))
        found.append(
            Number("compare-methods", "control: random", 2, "harmful", "refused_by_score", 0.9, None, None, 2, "")
        )
        cell = CellRows("done", "2026-01-01T00:00:00+00:00", make_model(), {"torch": "2"}, False, tuple(found))
        rows += table_rows(model, "bundled", seed, f"{model}/bundled/seed-{seed}", cell)
    plain = CellRows("does not refuse", "", make_model(), {}, False, (share("plain", 0, 0.04, "run"),))
    rows += table_rows("SmolLM2-135M-Instruct", "bundled", 0, "SmolLM2-135M-Instruct/bundled/seed-0", plain)
    return [*rows, TableRow.failed("missing", "missing", "no such model: 'missing'", "", None, None)]


At = make_dataclass("At", ("strength", "refused", "kl_nats"), frozen=True)
AtMatch = make_dataclass("AtMatch", ("ratio", "kl_nats", "refused"), frozen=True)
OverDraws = make_dataclass("OverDraws", ("label", "over", "ratios"), frozen=True)
OfSet = make_dataclass("OfSet", ("set_name", "change"), frozen=True)
OfTask = make_dataclass("OfTask", ("task", "metric", "change"), frozen=True)
BesideIt = make_dataclass("BesideIt", ("label", "over_refusal", "capability"), frozen=True)
Method = make_dataclass("Method", ("label", "curve", "matched"), frozen=True)
Control = make_dataclass("Control", ("label", "k", "refused_by_score", "kl_nats"), frozen=True)
Compared = make_dataclass(
    "Compared", ("rows", "controls", "target", "n_held_out", "kl_tokens", "draws", "beside"), frozen=True
)


@dataclass(frozen=True)
class Removed:
    """A removal, as far as a figure sees it."""

    label: str
    refused: float
    kl_nats: float


def text_boxes(page: Page) -> list[dict[str, Any]]:
    """Text, place and visibility of every piece of text in the page's figures (px from the figure's corner)."""
    return json.loads(page.evaluate(_BOXES))


_BOXES = """JSON.stringify(Array.from(document.querySelectorAll('.js-plotly-plot')).flatMap(plot => {
  const whole = plot.querySelector('.main-svg').getBoundingClientRect();
  return Array.from(plot.querySelectorAll('svg text')).filter(text => text.textContent.trim()).map(text => {
    const box = text.getBoundingClientRect();
    return {figure: plot.id, text: text.textContent, left: box.left - whole.left, right: box.right - whole.left,
      top: box.top - whole.top, bottom: box.bottom - whole.top, width: whole.width, height: whole.height};
  }).filter(box => box.right > box.left);
}))"""
