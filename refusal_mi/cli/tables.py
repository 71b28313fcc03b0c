"""How results look in a terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table
from rich.text import Text

from ..files import as_json
from ..judges.protocol import LABELS
from ..terminal import is_shown, shown

if TYPE_CHECKING:
    from ..analysis.result import AnalysisResult
    from ..audit import AuditResult
    from ..export.export import ExportReport
    from ..measures import LossResult
    from ..recipes.caa_eval import ABResults, Changes
    from ..recipes.caa_open import OpenAnswers, TextRates
    from ..recipes.localize import LeastIntervention
    from ..recipes.responses_eval import EvalSummary
    from ..run.answers import Effect
    from ..run.capability import CapabilityResult, TaskEffect
    from ..run.record import CombinationRecord, DirectionRecord, RunSummary
    from ..search.cosmic import CosmicSelection
    from ..search.grid import Selection

ROUNDING_NATS = 1e-9
"""A KL below this is what float32 leaves of none."""


class Console(rich.console.Console):
    """A console on which texts are only text: no markup in them, and nothing that steers a terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints, without colors of its own making."""
        super().print(*map(shown, objects), **options)


class Table(rich.table.Table):
    """A table in whose cells texts are only text."""

    def __init__(self, *headers: str, **options: Any) -> None:
        super().__init__(**options)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        """As rich adds one."""
        super().add_column(shown(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As rich adds one."""
        super().add_row(*map(shown, cells), **options)


def print_json(value: Any) -> None:
    """JSON on stdout, for machines; records as `as_json` says."""
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    print("".join(each if is_shown(each) else f"\\u{ord(each):04x}" for each in text))


def print_facts(facts: Mapping[str, Any]) -> None:
    """A two-column table."""
    table = Table("", "", show_header=False)
    for key, value in facts.items():
        shown = repr(value) if "\n" in str(value) else str(value)
        if isinstance(value, (list, tuple)):
            shown = ", ".join(map(str, value))
        table.add_row(key.replace("_", " "), shown)
    Console().print(table, markup=False)


def print_matrix(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A table whose cells are never shortened: columns that do not fit beside the others go into a table below."""
    console = Console()
    label = min(max(map(len, [corner, *(name for name, _ in rows)])), console.width // 2) + 4
    widths = [max(8, *(len(cells[index]) for _, cells in rows)) + 3 for index in range(len(columns))]
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and label + sum(widths[start : end + 1]) <= console.width:
            end += 1
        table = Table()
        table.add_column(corner, min_width=label - 4, overflow="fold")
        for name, width in zip(columns[start:end], widths[start:end], strict=True):
            table.add_column(name, min_width=width - 3, overflow="fold", justify="right")
        for row, cells in rows:
            table.add_row(row, *cells[start:end])
        console.print(table)
        start = end


def print_findings(kind: str, result: "AnalysisResult") -> None:
    """What an analysis found, a row for each quantity."""
    table = Table(kind, "unit", "value", "least", "at", "most", "at", title=None)
    for row in result.findings():
        table.add_row(row.name, row.unit, row.value, row.least, row.least_at, row.most, row.most_at)
    Console().print(table)


def print_survivors(chosen: "Selection", top: int) -> None:
    """The best candidates, and what the others failed."""
    table = Table("rank", "position", "layer", "bypass", "induce", "KL (nats)")
    for rank, row in enumerate(chosen.survivors[:top]):
        numbers = [f"{value:.4f}" for value in (row.bypass, row.induce, row.kl_nats) if value is not None]
        table.add_row(str(rank), str(row.position), str(row.layer), *numbers)
    Console().print(table) if chosen.survivors else None
    Console().print(chosen.explain(), highlight=False)


def print_cosmic(
    chosen: "CosmicSelection", published: "Selection", layers: Sequence[int], between: float | None, top: int
) -> None:
    """The best candidates by COSMIC with their rank by the published rule, and both choices."""
    ranks = {(row.position, row.layer): rank for rank, row in enumerate(published.survivors)}
    table = Table("rank", "position", "layer", "comply", "refuse", "sum", "KL (nats)", "published")
    for rank, row in enumerate(chosen.survivors[:top]):
        numbers = [
            "–" if value is None else f"{value:.4f}" for value in (row.comply, row.refuse, row.total, row.kl_nats)
        ]
        other = ranks.get((row.position, row.layer))
        table.add_row(str(rank), str(row.position), str(row.layer), *numbers, "–" if other is None else str(other))
    console = Console()
    console.print(table) if chosen.survivors else None
    console.print(f"COSMIC, cosines at layer(s) {', '.join(map(str, layers))}: {chosen.explain()}", highlight=False)
    best = published.survivors[0] if published.survivors else None
    there = "none" if best is None else f"position {best.position}, layer {best.layer}"
    beside = "" if between is None else f"; cosine with COSMIC's {between:.3f}"
    console.print(f"published rule: {there}{beside}", highlight=False)


def print_summary(summary: "RunSummary", report: Path) -> None:
    """The headline numbers of a run, and where its report lies."""
    console = Console()
    if summary.refused_by_text:
        _print_labels(console, summary)
    if summary.selection is not None:
        console.print(summary.selection.explanation, highlight=False)
    if summary.direction is not None:
        _print_direction(console, summary, summary.direction)
    if summary.combination is not None:
        _print_combination(console, summary.combination)
    for side, effects in summary.completions.items():
        named = {effect.label: effect for effect in effects.effects}
        print_rates(console, f"{effects.set_name} ({side}), n = {effects.n}", named)
    if summary.ce_loss:
        _print_losses(console, summary.ce_loss)
    if summary.quick:
        console.print("a quick run: small samples, for a look only")
    console.print(f"{'report' if report.suffix == '.html' else 'summary'}: {report}", highlight=False, soft_wrap=True)


def _print_labels(console: Console, summary: "RunSummary") -> None:
    """What the model does with the prompts by itself."""
    table = Table("plain model", "refused by text [95%]", "prompts kept: train, validation")
    for side, rate in summary.refused_by_text.items():
        counts = summary.n_prompts[side]
        kept = ", ".join(f"{each.kept} of {each.of}" for each in (counts.train, counts.val))
        table.add_row(
            f"{side}, n = {rate.n}", str(rate), "not tried further" if summary.status == "does not refuse" else kept
        )
    console.print(table)
    _print_caution(summary.judge_caution)
    if summary.refusal_tokens:
        tokens = ", ".join(repr(token.text) for token in summary.refusal_tokens)
        line = f"refusal tokens {tokens}; a score above {summary.zero_point_nats or 0.0:.2f} nats counts as refused"
        console.print(line, highlight=False, markup=False)
    if summary.status == "does not refuse":
        print_lines("This model does not refuse these prompts: there is no refusal direction to find. It answers:")
        print_lines(*(f"- {_line(each.prompt)}: {_line(each.response)} …" for each in summary.examples))


def _line(text: str) -> str:
    return " ".join(text.split())


def _print_direction(console: Console, summary: "RunSummary", direction: "DirectionRecord") -> None:
    assert summary.selection is not None and summary.baseline_scores_nats is not None
    best, plain = summary.selection.best, summary.baseline_scores_nats
    assert best is not None
    table = Table("refusal direction", "value", title=None)
    table.add_row("position, layer", f"{direction.pos}, {direction.layer} ({direction.hook_name})")
    table.add_row("norm", f"{direction.norm:.2f}")
    table.add_row("harmful: refusal score, plain -> ablated", f"{plain['harmful']:.2f} -> {best.bypass:.2f}")
    table.add_row("harmless: refusal score, plain -> added", f"{plain['harmless']:.2f} -> {best.induce:.2f}")
    table.add_row("harmless: KL under ablation (nats)", f"{best.kl_nats:.4f}")
    console.print(table)


def _print_combination(console: Console, combination: "CombinationRecord") -> None:
    table = Table(f"ablated together ({combination.multi})", "position, layer", "hook point", "norm")
    columns = combination.ranks, combination.directions, combination.hook_names, combination.norms
    for rank, place, hook, norm in zip(*columns, strict=True):
        table.add_row(f"rank {rank}", f"{place.pos}, {place.layer}", hook, f"{norm:.2f}")
    console.print(table)
    lowest = min(combination.relative_singular_values)
    console.print(f"effective rank {combination.effective_rank}, relative singular value {lowest:.3f}", highlight=False)


_SUCCESS = {"http_refusal": "complied"}
"""What a judge's rate of success is a rate of, where it is not of what is unsafe."""


def rates_table(title: str, named: "Mapping[str, Effect]") -> Table:
    """Rates of refusal, of degenerate text and of what another judge calls unsafe, one row per name."""
    judges = list(next(iter(named.values())).unsafe)
    table = Table(
        title,
        "refused [95%]",
        "degenerate [95%]",
        *(f"{_SUCCESS.get(judge, 'unsafe')}, {judge} [95%]" for judge in judges),
    )
    for name, effect in named.items():
        rates = [effect.refusal, effect.degenerate, *(effect.unsafe[judge] for judge in judges)]
        table.add_row(name, *map(str, rates))
    return table


def classes_table(title: str, named: "Mapping[str, Effect]") -> Table | None:
    """What judges of three classes say, a row for each name and judge; None where there is none."""
    rows = [(name, judge, effect) for name, effect in named.items() for judge in effect.classes]
    if not rows:
        return None
    from ..run.answers import UNREAD

    unread = any(len(effect.classes[judge]) > len(LABELS) for _, judge, effect in rows)
    scored = any(effect.scores for _, _, effect in rows)
    more = [*(["unread"] if unread else []), *(["score [95%]"] if scored else [])]
    table = Table(title, "judge", *(f"{label} [95%]" for label in LABELS), *more)
    for name, judge, effect in rows:
        rates = effect.classes[judge]
        cells = [name, judge, *(str(rates[label]) for label in LABELS)]
        cells += [f"{rates[UNREAD].count} of {rates[UNREAD].n}" if UNREAD in rates else ""] if unread else []
        cells += [str(effect.scores[judge]) if judge in effect.scores else ""] if scored else []
        table.add_row(*cells)
    return table


def print_rates(console: Console, title: str, named: "Mapping[str, Effect]") -> None:
    """`rates_table`, and `classes_table` where there is one."""
    console.print(rates_table(title, named))
    if (classes := classes_table(title, named)) is not None:
        console.print(classes)


def _print_losses(console: Console, losses: "Mapping[str, Mapping[str, LossResult]]") -> None:
    sets = list(losses["baseline"])
    table = Table("CE loss (nats per token)", *sets)
    for label, by_set in losses.items():
        table.add_row(label, *(f"{by_set[name].ce_loss:.4f}" for name in sets))
    console.print(table)


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def print_export(report: "ExportReport") -> None:
    """What was exported, how closely it matches the hooks, and what its user should know."""
    console, check = Console(), report.verification
    table = Table(f"exported {report.kind}", "value", "measured against")
    table.add_row("edited tensors", str(len(report.figures)), "")
    if check is not None:
        stored = f"the export as stored ({report.dtype})"
        table.add_row(
            "largest logit difference", f"{check.max_logit_difference:.1e}", "the hooked model, both in float32"
        )
        table.add_row("largest logit", f"{check.largest_logit:.1f}", "0, of the hooked model")
        table.add_row("largest change by the edit", f"{check.max_effect:.1e}", "the plain model, in float32")
        table.add_row("mean KL (nats)", f"{check.mean_kl_nats:.1e}", f"the hooked model in float32, of {stored}")
        if check.hooked_kl_nats is not None:
            rounding = "the hooked model in float32, of itself as stored: what rounding costs"
            table.add_row("mean KL (nats)", f"{check.hooked_kl_nats:.1e}", rounding)
        prompts = f"{check.n_prompts} prompts, {check.mode}"
        table.add_row("equal greedy tokens", f"{check.same_greedy:.1%}", f"the hooked model in float32 ({prompts})")
        table.add_row("within the limits", "yes" if check.passed else "NO", f"the rule for {check.rule}")
    console.print(table)
    for line in [*report.notes, *(check.failures if check is not None else ())]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written: {report.path}", highlight=False, soft_wrap=True)


def print_lines(*lines: str) -> None:
    """Lines as they are, however long."""
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _print_caution(note: str | None) -> None:
    if note:
        print_lines(f"caution: {note}")


def print_answers(answers: "OpenAnswers") -> None:
    """Rates of every multiplier, and the first question's answers."""
    console = Console()
    rates = Table(f"n = {answers.n_questions}", "refusal-like", "degenerate")
    rates.add_row("plain", *_two_rates(answers.baseline))
    for multiplier, steered in answers.by_multiplier.items():
        rates.add_row(f"add x{multiplier}", *_two_rates(steered.add))
        rates.add_row(f"subtract x{multiplier}", *_two_rates(steered.subtract))
    console.print(rates)
    _print_caution(answers.judge_caution)
    first = {multiplier: steered.first_question for multiplier, steered in answers.by_multiplier.items()}
    console.print(next(iter(first.values())).question, markup=False, highlight=False)
    table = Table("alpha", "add steering", "subtract steering")
    for multiplier, row in first.items():
        table.add_row(multiplier, one_line(row.answer_with_add_steering), one_line(row.answer_with_substract_steering))
    console.print(table)


def print_sweep(results: "ABResults") -> None:
    """p(matching) by layer and multiplier, and the layer that was chosen, or why none was."""
    from ..model.points import explain_layer, stream_after

    table = Table("layer", "our", "multiplier", "p(matching) [95%]", "change [95%]")
    for row in results.rows:
        p = f"{row.p:.3f} [{row.low:.3f}, {row.high:.3f}]"
        change = f"{row.delta:+.3f} [{row.delta_low:+.3f}, {row.delta_high:+.3f}]"
        table.add_row(str(row.layer), str(stream_after(row.layer)), f"{row.multiplier:g}", p, change)
    first = results.rows[0]
    print_lines(
        f"{results.pairs}, n = {first.n_pairs} pairs, plain p(matching) = {results.p_plain:.3f}",
        explain_layer(first.layer),
    )
    Console().print(table)
    chosen = results.chosen
    if chosen is None:
        print_lines(f"no layer was chosen: {results.why_none}")
        return
    broken = f"{chosen.degenerate_added.value:.2f} and {chosen.degenerate_subtracted.value:.2f}"
    print_lines(
        f"chosen on {chosen.chosen_on}: {explain_layer(chosen.layer)}, multiplier {chosen.multiplier:g}",
        f"on {results.pairs}: {_changes(chosen)}; degenerate text {broken}",
        *(f"{kind}: {_changes(changes)}" for kind, changes in chosen.controls.items()),
    )


def print_coefficients(summary: "EvalSummary") -> None:
    """Refusals by coefficient, beside those under random vectors."""
    console = Console()
    console.print(
        f"layer {summary.selected_layer} ({summary.hook_name}): refusal score "
        f"{summary.baseline_refusal_score:.2f} -> {summary.selected_layer_steering_score:.2f}",
        highlight=False,
    )
    controls = summary.random_controls
    title = f"coefficient (n = {summary.n_test_samples})"
    table = Table(title, "refused [95%]", "degenerate", *(f"random {seed}" for seed in controls))
    for key, rates in summary.results_by_coefficient.items():
        low, high = rates.interval
        random = [f"{runs[key].refusal_rate:.2f}" if key in runs else "" for runs in controls.values()]
        refused = f"{rates.refusal_rate:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(key, refused, f"{rates.degenerate_rate.value:.2f}", *random)
    console.print(table)
    _print_caution(summary.judge_caution)


def _changes(changes: "Changes") -> str:
    return f"adding changes p by {changes.change_added:+.3f}, subtracting by {changes.change_subtracted:+.3f}"


def _two_rates(rates: "TextRates") -> tuple[str, str]:
    return f"{rates.refusal_like_rate.value:.2f}", f"{rates.degenerate_rate.value:.2f}"


def one_line(text: str) -> Text:
    return Text("".join(character if character.isprintable() else " " for character in text))


def print_capability(found: "CapabilityResult", folder: Path) -> None:
    """What every task loses, and where nothing can be read off it."""
    from ..run.capability import SHARES
    from ..stats import p_text, signed

    table = Table("task", "model", "before → after", "change [95%]", "p (Holm)")
    for row in found.effects:
        change, *ends = ("" if value is None else signed(value, 3) for value in row.change)
        means = f"{row.before[0]:.3f} → {row.after[0]:.3f}"
        p = "" if row.p_holm is None else p_text(row.p_holm).removeprefix("= ")
        limits = f" [{', '.join(ends)}]" if all(ends) else ""
        table.add_row(f"{row.task}\n{row.metric}", row.variant, means, f"{change}{limits}", p)
    Console().print(table)
    for row in found.effects:
        alike = f"{row.same_answers.count} of {row.n} answers as the plain model's"
        gone = row.unanswered_before.count, row.unanswered_after.count
        none = "" if row.is_choice or row.metric not in SHARES else f"; no answer found in {gone[0]} → {gone[1]}"
        print_lines(f"{_task_name(row)}, {row.variant}: {alike}{none}")
    print_lines(*dict.fromkeys(f"{_task_name(row)}: {row.caveat}" for row in found.effects if row.caveat))
    for row in found.same_as_hooked:
        nats = "" if row.largest_nats is None else f", ln p within {row.largest_nats:.1e} nats"
        print_lines(f"{_task_name(row)}: exported as hooked in {row.same_answers.count} of {row.n} answers{nats}")
    n_cut = {each.task: each.n_cut for each in found.variants[0].tasks if each.n_cut}
    print_lines(
        *(f"{task}: {n} requests were too long for the model and lost their beginning" for task, n in n_cut.items()),
        f"chat template: {'not applied' if found.chat is None else 'applied'}",
        f"{folder}",
    )


def _task_name(row: "TaskEffect") -> str:
    return row.task if row.filter == "none" else f"{row.task} ({row.filter})"


def print_least(found: "LeastIntervention", source: str, folder: Path) -> None:
    """What the least intervention does on held-out prompts, and how it is exported."""
    from ..stats import p_text, signed

    table = Table("held-out prompts", "refused (score)", "refused (text)", "degenerate", "KL (nats) [95%]")
    for row in found.held_out:
        mean, low, high = row.kl_nats
        texts = ["" if rate is None else str(rate) for rate in (row.refused_by_text, row.degenerate)]
        kl = f"{mean:.4g} [{low:.4g}, {high:.4g}]" if mean > ROUNDING_NATS else "0"
        table.add_row(row.label, str(row.refused_by_score), *texts, kl)
    Console().print(table)
    change, (ratio, low_ratio, high_ratio) = found.text_change, found.kl_ratio
    if ratio is not None:
        limits = "" if low_ratio is None or high_ratio is None else f" [{low_ratio:.3g}, {high_ratio:.3g}]"
        print_lines(f"KL of the least removal / of the whole ablation: {ratio:.3g}{limits}")
    print_lines(
        f"refused answers, least − whole: {signed(change['difference'])} "
        f"[{signed(change['low'])}, {signed(change['high'])}], p {p_text(change['p'])}, n = {change['n']}"
    )
    least = found.least
    print_lines(
        f"least: blocks {least.first}:{least.last}, {', '.join(least.components)}, strength {least.strength:.3g}, "
        f"direction of layer {least.direction_layer} ({found.n_tried} removals tried)",
        f"refusal-mi export {source} --direction {folder / 'direction.pt'} --layers {least.first}:{least.last} "
        f"--components {','.join(least.components)} --strength {least.strength:g} --output-dir NEW",
        f"{folder}",
    )


def print_audit(found: "AuditResult", folder: Path | None) -> None:
    """What became of every kind of tensor, and the verdict."""
    head, rows = found.table()
    print_matrix(head[0], head[1:], [(row[0], row[1:]) for row in rows])
    print_lines(*found.explain(), *([] if folder is None else [str(folder)]))
