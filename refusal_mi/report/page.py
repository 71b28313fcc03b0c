"""A run folder as one self-contained page: facts, figures, answers, other pages beside it."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..figures.effects import intervention_name, plot_losses, plot_rates
from ..figures.scores import plot_norms, plot_score_panels
from ..figures.style import token_text
from ..files import as_json, read_record, write_text
from ..model.provenance import ModelRecord
from ..run.answers import SIDES
from ..run.folder import RunRecord
from ..run.options import RunOptions, command_line
from ..run.record import RUN, SPAN, CombinationRecord, Place, RunInfo
from ..stats import signed
from .answers import answer_tables, visible
from .classes import class_tables
from .verdict import bindings, control_groups, extent, judge_run

WIDTHS = (1080, 360)
"""What the legends are laid out for (px): a desktop window and a phone."""


@dataclass(frozen=True)
class FigurePair:
    """One figure in two shapes."""

    wide: go.Figure
    narrow: go.Figure


def report_figures(record: RunRecord) -> dict[str, FigurePair]:
    """Every figure that the run has data for, by name."""
    pictures: dict[str, FigurePair] = {}
    tokens, model, selection = record.tokens, record.model_name, record.selection
    if record.scores is not None and selection is not None:
        chosen = selection.survivors[0] if selection.survivors and not record.combination else None
        wide, narrow = (
            plot_score_panels(
                record.scores, chosen=chosen, thresholds=record.thresholds, tokens=tokens, model=model, columns=columns
            )
            for columns in (3, 1)
        )
        pictures["scores"] = FigurePair(wide, narrow)
    elif record.norms is not None:
        norms, positions = record.norms.norms, record.norms.positions
        n_prompts = record.norms.n_harmful + record.norms.n_harmless
        wide, narrow = (
            plot_norms(norms, positions, tokens=tokens, model=model, n_prompts=n_prompts, width=width)
            for width in WIDTHS
        )
        pictures["norms"] = FigurePair(wide, narrow)
    if record.sides:
        wide, narrow = (plot_rates(record.sides, model=model, columns=columns) for columns in (2, 1))
        pictures["rates"] = FigurePair(wide, narrow)
    if record.losses:
        wide, narrow = (plot_losses(record.losses, model=model, width=width) for width in WIDTHS)
        pictures["losses"] = FigurePair(wide, narrow)
    return pictures


def embedded_json(figures: Mapping[str, FigurePair]) -> str:
    """All figures as JSON in which no markup can begin: <, > and & are written as escapes."""
    shapes = {
        name: {shape: figure.to_plotly_json() for shape, figure in vars(pair).items()} for name, pair in figures.items()
    }
    text = json.dumps(shapes, allow_nan=False, separators=(",", ":"), default=list)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


COMBOS_PAGE = "combos.html"


@dataclass(frozen=True)
class CombinationLink:
    """What was ablated together, and where its report lies."""

    name: str
    report: str | None
    """Relative to the run folder; None where none was written."""


def combinations_of(record: RunRecord) -> list[CombinationLink]:
    """The combinations of a whole run's present survivors, by label; those of an earlier choice are left out."""
    if record.label or record.selection is None:
        return []
    links = []
    for span in sorted(record.path.glob(f"*/{SPAN}")):
        combination = RunRecord.load(span.parent).combination
        if combination is not None and _is_of_this_choice(record, combination):
            has_report = (span.parent / "report.html").is_file()
            links.append(CombinationLink(_name(combination), f"{span.parent.name}/report.html" if has_report else None))
    return links


def combos_page(record: RunRecord) -> str | None:
    """The figure that `combos` draws of all of them, if it is there."""
    return COMBOS_PAGE if (record.path / COMBOS_PAGE).is_file() else None


def identity_of(folder: Path) -> tuple[ModelRecord, RunOptions] | None:
    """The model and the options in a folder's `run.json`; None where there is none."""
    if not (folder / RUN).is_file():
        return None
    info = read_record(folder / RUN, RunInfo)
    return info.model, info.options


def _is_of_this_choice(record: RunRecord, combination: CombinationRecord) -> bool:
    assert record.selection is not None
    places = [Place(row.position, row.layer) for row in record.selection.survivors]
    named = [places[rank] if rank < len(places) else None for rank in combination.ranks]
    return named == list(combination.directions)


def _name(combination: CombinationRecord) -> str:
    *others, last = map(str, combination.ranks)
    ranks = f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
    return ranks if combination.multi == "span" else f"{ranks}, one after the other"


N_SURVIVORS = 10
_HEADLINE_EFFECTS = (
    ("harmful", "ablation", "ablated"),
    ("harmless", "actadd", "added"),
)


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder or that of a combination, from files alone, and return its path.

    The page holds plotly once and loads nothing. Its content security policy names the hashes of its own three
    scripts, so that nothing in a prompt or an answer could run even if it were not escaped.

    Raises:
        UserError: the folder has no `run.json`.
    """
    record = RunRecord.load(folder)
    path = record.folder / "report.html"
    write_text(path, render(record))
    return path


def list_combinations(folder: Path, identity: tuple[ModelRecord, RunOptions] | None) -> None:
    """Write the report of a whole run again, if it has one, so that it lists the combinations made since.

    Args:
        identity: the model and options of its `run.json` when the report was written (`identity_of`); where it names
            others by now, the report stays as it is.
    """
    if (folder / "report.html").is_file() and identity is not None and identity_of(folder) == identity:
        write_report(folder)


def render(record: RunRecord) -> str:
    """The page of a run."""
    environment = Environment(
        loader=PackageLoader("refusal_mi.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "rate": _rate,
        "number": _number,
        "token": token_text,
        "signed": partial(signed, decimals=3),
        "extent": extent,
    }
    source = Path(__file__).parent / "page"
    figures = report_figures(record)
    scripts = [_script((source / "page.js").read_text(encoding="utf-8"))]
    if figures:
        scripts = [_script(get_plotlyjs()), *scripts]
    return environment.get_template("page.html.jinja").render(
        record=record,
        run=record.run,
        summary=record.summary,
        title=_title(record),
        verdict=judge_run(record),
        chosen_ranks=record.combination.ranks if record.combination is not None else [0],
        figures=set(figures),
        figures_json=embedded_json(figures),
        scripts=[script.text for script in scripts],
        policy=_policy(scripts),
        style=(source / "page.css").read_text(encoding="utf-8"),
        facts=_headline_facts(record),
        combinations=combinations_of(record),
        combos_page=combos_page(record),
        thresholds=_bindings(record),
        controls=control_groups(record),
        survivors=_survivors(record),
        loss_rows=_loss_rows(record),
        tables=answer_tables(record),
        class_judges=class_tables(record.sides),
        splits=_splits(record),
        command=_command(record),
        model=as_json(record.run.model),
        options=json.dumps(as_json(record.run.options), indent=2, ensure_ascii=False),
        intervention_name=intervention_name,
    )


def _shown(value: Any) -> Any:
    """What every expression of the page passes before it is escaped; what the page holds of its own stays as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@dataclass(frozen=True)
class _Script:
    """A script of the page, and the hash by which its policy allows it."""

    text: str
    sha256: str


@dataclass(frozen=True)
class Fact:
    """One number of the answer, with what it is compared to."""

    name: str
    value: str
    about: str


def _title(record: RunRecord) -> str:
    what = "Refusal direction" if record.combination is None else f"Refusal directions {record.label}"
    return f"{what} of {record.model_name}"


def _script(text: str) -> _Script:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return _Script(text, f"'sha256-{digest}'")


def _policy(scripts: Sequence[_Script]) -> str:
    allowed = " ".join(script.sha256 for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _headline_facts(record: RunRecord) -> list[Fact]:
    facts: list[Fact] = []
    for side, label, verb in _HEADLINE_EFFECTS:
        effects = record.side(side)  # type: ignore[arg-type]
        base, hit = (effects.find(name) if effects is not None else None for name in ("baseline", label))
        if effects is None or base is None or hit is None:
            continue
        value = f"{base.refusal.value:.2f} → {hit.refusal.value:.2f}"
        controls = ", ".join(f"{control.refusal.value:.2f}" for control in effects.controls)
        control = "direction" if record.combination is None else "span"
        beside = f"random {control} {controls}" if controls else "no control was run"
        facts.append(Fact(f"Refused, {side}", value, f"plain → {verb}; {beside}"))
        degenerate = f"{base.degenerate.value:.2f} → {hit.degenerate.value:.2f}"
        facts.append(Fact(f"Degenerate, {side}", degenerate, f"plain → {verb}"))
    best = record.selection.survivors[0] if record.selection is not None and record.selection.survivors else None
    if best is not None and record.combination is None:
        facts.append(Fact("KL under ablation", _number(best.kl_nats), "nats, harmless validation prompts"))
    if "ablation" in record.losses:
        for name, base_loss in list(record.losses["baseline"].items())[:1]:
            delta = record.losses["ablation"][name].ce_loss - base_loss.ce_loss
            facts.append(Fact("CE loss, ablated", signed(delta, 3), f"nats per token, {name}"))
    return facts


def _bindings(record: RunRecord) -> list[tuple[str, str, int, int]]:
    if record.scores is None or record.selection is None:
        return []
    return bindings(record.scores, record.selection)


def _survivors(record: RunRecord) -> list[tuple[Any, str]]:
    """The best candidates with the text of their tokens."""
    rows = record.selection.survivors[:N_SURVIVORS] if record.selection is not None else ()
    return [
        (row, token_text(record.tokens[row.position]) if len(record.tokens) >= -row.position else "") for row in rows
    ]


def _loss_rows(record: RunRecord) -> list[tuple[str, list[tuple[float, float | None]]]]:
    """(name, [(loss, change from the plain model)]) for each intervention."""
    base = record.losses.get("baseline", {})
    return [
        (
            intervention_name(label, "harmful"),
            [
                (by_text[name].ce_loss, None if label == "baseline" else by_text[name].ce_loss - base[name].ce_loss)
                for name in base
            ],
        )
        for label, by_text in record.losses.items()
    ]


def _splits(record: RunRecord) -> list[tuple[str, str, int, int]]:
    """(side, split, prompts sampled, prompts kept by the filter)."""
    if record.prompts is None:
        return []
    return [
        (side, part, len(rows), sum(row.kept is not False for row in rows))
        for side in SIDES
        for part, rows in vars(record.prompts.side(side)).items()
    ]


def _command(record: RunRecord) -> str:
    """The command that repeats this."""
    combination = record.combination
    said = () if combination is None else (combination.ranks, combination.multi)
    return command_line(record.run.model, record.run.options, *said)


def _rate(rate: Any) -> str:
    low, high = rate.interval
    return f"{rate.value:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: int | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"
