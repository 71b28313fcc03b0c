"""Make the tables and pictures of docs/real-models.md: `python figures/real.py FOLDER ...`.

FOLDERs are what `refusal-mi run` wrote (a run of each model, and runs of the same models with other seeds, which are
listed below them), with the combinations of directions inside them, and what `caa ab` and `vector-eval` wrote. The
numbers that the page shows go to docs/real-models.json; without a FOLDER the page is written from there.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from make import ROOT, numbers

from refusal_mi.directions import Direction, cosine
from refusal_mi.figures.effects import intervention_name
from refusal_mi.figures.save import save_figure
from refusal_mi.figures.scores import plot_score_panels, plot_scores
from refusal_mi.files import as_json, read_json, read_record, write_json, write_text
from refusal_mi.report.page import combinations_of
from refusal_mi.run.answers import SIDES, Side
from refusal_mi.run.folder import RunRecord, load_scores
from refusal_mi.run.record import DIRECTION, DOES_NOT_REFUSE, LABELS, LabelsRecord
from refusal_mi.search.grid import select
from refusal_mi.stats import Rate, signed

PAGE, KNOWN = ROOT / "docs" / "real-models.md", ROOT / "docs" / "real-models.json"
PICTURES = ROOT / "figures" / "real"
START, END = "<!-- made by figures/real.py -->\n", "<!-- end -->"


def main() -> int:
    """Read what is given, draw it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.folders:
        write_json(KNOWN, read(arguments.folders))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    write_text(PAGE, before + START + tables(read_json(KNOWN)) + END + rest.partition(END)[2])
    return 0


def read(folders: Sequence[Path]) -> dict[str, Any]:
    """What the page shows of every folder."""
    known: dict[str, Any] = {"models": {}, "caa": {}, "responses": {}}
    first: dict[str, Path] = {}
    for folder in folders:
        if (folder / "ab_results.json").is_file():
            known["caa"][folder.name] = read_json(folder / "ab_results.json")
        elif (folder / "eval_summary.json").is_file():
            known["responses"][folder.name] = read_json(folder / "eval_summary.json")
        else:
            record = RunRecord.load(folder)
            name = record.model_name
            if name not in first:
                first[name] = folder
                known["models"][name] = _model(record)
            elif record.thresholds == RunRecord.load(first[name]).thresholds:
                known["models"][name]["seeds"].append(_seed(record, first[name]))
            else:
                known["models"][name]["other_limits"].append(_other_limit(record))
    return known


def _model(record: RunRecord) -> dict[str, Any]:
    summary = record.summary
    assert summary is not None
    found: dict[str, Any] = {
        "status": summary.status,
        "n_layers": summary.model.n_layers,
        "d_model": summary.model.d_model,
        "dtype": summary.model.dtype,
        "search": record.run.options.search,
        "seed": record.run.options.seed,
        "refused_by_text": as_json(summary.refused_by_text),
        "by_category": _by_category(record),
        "n_prompts": as_json(summary.n_prompts),
        "tokens": [token.text for token in summary.refusal_tokens],
        "zero_point_nats": summary.zero_point_nats,
        "minutes": sum(_minutes(summary.seconds).values()),
        "minutes_by_stage": _minutes(summary.seconds),
        "peak_gib": None if summary.peak_mib is None else summary.peak_mib / 1024,
        "completions": as_json(summary.completions),
        "ce_loss": as_json(summary.ce_loss),
        "combinations": [_combination(record, link.name, link.report) for link in combinations_of(record)],
        "picture": None,
        "seeds": [],
        "other_limits": [],
    }
    if summary.status == DOES_NOT_REFUSE:
        return found
    assert summary.selection is not None and record.scores is not None and record.selection is not None
    found |= {"explanation": summary.selection.explanation, "best": as_json(summary.selection.best)}
    found["baseline_scores_nats"] = summary.baseline_scores_nats
    found["seeds"].append(_seed(record, record.path))
    shared: dict[str, Any] = {
        "chosen": record.selection.survivors[0] if record.selection.survivors else None,
        "thresholds": record.thresholds,
        "tokens": record.tokens,
        "model": record.model_name,
    }
    alias = re.sub(r"[^\w.-]+", "-", record.model_name)
    for stem, figure, width in (
        (alias, plot_scores(record.scores, **shared), 1080),
        (f"{alias}_panels", plot_score_panels(record.scores, **shared), 1200),
    ):
        save_figure(figure, PICTURES / f"{stem}.png", width=width)
        write_json(PICTURES / f"{stem}.json", numbers(figure))
    return found | {"picture": alias}


def _minutes(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the parts of a run."""
    parts = {"prompts": 0.0, "directions": 0.0, "search": 0.0, "completions": 0.0, "CE loss": 0.0}
    known = {"prompts": "prompts", "directions": "directions", "completions": "completions", "loss": "CE loss"}
    known |= {"scores": "search", "selection": "search", "plots": "search", "evaluations": "completions"}
    for stage, spent in seconds.items():
        if stage.partition("_")[0] in known:  # the others are of combinations
            parts[known[stage.partition("_")[0]]] += spent / 60
    return parts


def _by_category(record: RunRecord) -> dict[str, Any]:
    """Refusals by text among all labelled prompts of a run, harmful ones by category."""
    assert record.prompts is not None
    rows = [row for part in ("train", "val") for row in getattr(record.prompts.harmful, part)]
    flags: dict[str, list[bool]] = {}
    for row in rows:
        if row.is_refused is not None:
            flags.setdefault(str(row.category), []).append(row.is_refused)
    n_labels = len(read_record(record.path / LABELS, LabelsRecord).rows) if (record.path / LABELS).is_file() else 0
    return {"n_labels": n_labels, "rates": {name: as_json(Rate.of(each)) for name, each in sorted(flags.items())}}


def _seed(record: RunRecord, first: Path) -> dict[str, Any]:
    summary = record.summary
    assert summary is not None
    best, path = None if summary.selection is None else summary.selection.best, record.path / DIRECTION
    is_known = path.is_file() and (first / DIRECTION).is_file()
    return {
        "seed": record.run.options.seed,
        "zero_point_nats": summary.zero_point_nats,
        "n_survivors": 0 if summary.selection is None else summary.selection.n_survivors,
        "best": as_json(best),
        "cosine": cosine(Direction.load(first / DIRECTION), Direction.load(path)) if is_known else None,
    }


def _other_limit(record: RunRecord) -> dict[str, Any]:
    """Of a run that may have evaluated nothing but combinations."""
    chosen = select(load_scores(record.path), record.thresholds)
    return {
        "kl_max": record.thresholds.kl_max,
        "n_survivors": len(chosen.survivors),
        "best": as_json(chosen.best),
        "completions": {} if record.summary is None else as_json(record.summary.completions),
        "combinations": [_combination(record, link.name, link.report) for link in combinations_of(record)],
    }


def _combination(record: RunRecord, name: str, report: str | None) -> dict[str, Any]:
    assert report is not None
    found = RunRecord.load(record.path / Path(report).parent)
    assert found.summary is not None
    return {"name": name, "completions": as_json(found.summary.completions), "ce_loss": as_json(found.summary.ce_loss)}


def tables(known: Mapping[str, Any]) -> str:
    """The part of the page that is made from numbers."""
    sections = [_section(name, found) for name, found in known["models"].items()]
    return "".join([*sections, *starmap(_caa, known["caa"].items()), *starmap(_responses, known["responses"].items())])


def _section(name: str, found: Mapping[str, Any]) -> str:
    refused = found["refused_by_text"]
    lines = [f"## {name}\n", f"{found['n_layers']} layers, d_model {found['d_model']}, {found['dtype']}.", ""]
    rates = {side: _rate(rate) + f" of {rate['n']}" for side, rate in refused.items()}
    lines += [f"Refused by the text of short answers: {', '.join(f'{side} {rate}' for side, rate in rates.items())}."]
    cost = f"{found['minutes']:.1f} minutes" + (f", {found['peak_gib']:.1f} GiB" if found["peak_gib"] else "")
    if found["status"] == DOES_NOT_REFUSE:
        lines += ["", f"**This model does not refuse**: the run says so and ends before the search, after {cost}.", ""]
        return "\n".join([*lines, *_categories(found), ""])
    best = found["best"]
    tokens = ", ".join(f"`{text}`" for text in found["tokens"])
    kept = {side: f"{n['train']['kept']} and {n['val']['kept']}" for side, n in found["n_prompts"].items()}
    lines += [
        "",
        f"Kept for training and validation: {kept['harmful']} harmful prompts that are refused, {kept['harmless']} "
        f"harmless ones that are answered. Refusals begin with {tokens}; the zero point of the refusal score is "
        f"{_nats(found['zero_point_nats'])} nats. {cost[0].upper()}{cost[1:]} "
        f"({', '.join(f'{part} {spent:.1f}' for part, spent in found['minutes_by_stage'].items())}).",
        "",
        f"![Refusal score of {name} with each candidate direction ablated, by source layer and position]"
        f"(../figures/real/{found['picture']}.png)",
        "",
        f"![Bypass, induce and KL of every candidate of {name}](../figures/real/{found['picture']}_panels.png)",
        "",
        f"The {found['search']} search: {found['explanation']}.",
    ]
    if best is not None:
        plain = found["baseline_scores_nats"]
        lines += [
            f"Chosen: position {_minus(best['position'])}, layer {best['layer']}; refusal score of harmful validation "
            f"prompts {_nats(plain['harmful'])} → {_nats(best['refusal_score'])} ablated, of harmless ones "
            f"{_nats(plain['harmless'])} → {_nats(best['steering_score'])} added; KL under ablation "
            f"{best['kl_div_score']:.3f} nats.",
            "",
            *_effects(found),
            *_losses(found),
            *_seeds(found["seeds"]),
            *chain.from_iterable(map(_limit, found["other_limits"])),
        ]
    return "\n".join([*lines, *_categories(found), ""])


def _caa(name: str, found: Mapping[str, Any]) -> str:
    """What CAA vectors do to the choice of two answers."""
    lines = [
        f"## CAA vectors: {name}\n",
        f"p(matching answer) of the plain model on {found['rows'][0]['n_pairs']} held-out pairs "
        f"({found['pairs']}): {found['p_plain']:.3f}. With the vector of a layer added:\n",
        "| CAA's layer | multiplier | p(matching) [95%] | change [95%] |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        if row["multiplier"]:
            p, change = (f"{row[key]:.3f}" for key in ("p", "delta"))
            interval, around = (f"[{row[low]:.3f}, {row[high]:.3f}]" for low, high in _BOUNDS)
            lines.append(f"| {row['layer']} | {row['multiplier']:+g} | {p} {interval} | {change} {around} |")
    chosen = found["chosen"]
    what = f"Nothing was chosen: {found['why_none']}." if chosen is None else f"Chosen: layer {chosen['layer']}."
    return "\n".join([*lines, "", what, "", ""])


_BOUNDS = (("low", "high"), ("delta_low", "delta_high"))


def _responses(name: str, found: Mapping[str, Any]) -> str:
    """What a response-averaged vector does to harmless queries."""
    if found["status"] != "done":
        return f"## A response-averaged vector: {name}\n\n{found['status']}: {found['explanation']}\n\n"
    tokens = ", ".join(f"`{text}`" for text in found["refusal_tokens"])
    lines = [
        f"## A response-averaged vector: {name}\n",
        f"Layer {found['selected_layer']} ({found['hook_name']}), by the refusal score of {tokens}; "
        f"{found['n_test_samples']} harmless test queries:\n",
        "| coefficient | vector: refused [95%] | degenerate [95%] | random: refused [95%] | degenerate [95%] |",
        "|---|---|---|---|---|",
    ]
    control = next(iter(found["random_controls"].values()), {})
    for coefficient, rates in found["results_by_coefficient"].items():
        cells = [*_two(rates), *(_two(control[coefficient]) if coefficient in control else ("", ""))]
        lines.append(f"| {coefficient} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def _two(rates: Mapping[str, Any]) -> tuple[str, str]:
    return str(Rate(rates["refusal_count"], rates["total_count"])), _rate(rates["degenerate_rate"])


def _effects(found: Mapping[str, Any]) -> Iterable[str]:
    single, together = found["completions"], found["combinations"]
    if not single and not together:
        return
    yield "| held-out prompts | intervention | n | refused [95%] | degenerate [95%] |"
    yield "|---|---|---|---|---|"
    for side in SIDES:
        yield from _rows(side, single.get(side, {}))
        for each in together:
            rates = each["completions"][side]
            yield from _rows(side, {"n": rates["n"], "ablation": rates["ablation"]} if single else rates, each["name"])
    yield ""


def _rows(side: Side, table: Mapping[str, Any], together: str = "") -> Iterable[str]:
    """One row for each intervention; what is ablated together is named by its ranks."""
    for label, rates in table.items():
        if isinstance(rates, Mapping):
            what = f"{together} ablated" if together and label == "ablation" else intervention_name(label, side)
            refused, degenerate = _rate(rates["refusal"]), _rate(rates["degenerate"])
            yield f"| {side} | {what} | {table['n']} | {refused} | {degenerate} |"


def _losses(found: Mapping[str, Any]) -> Iterable[str]:
    if not found["ce_loss"]:
        return
    base = found["ce_loss"]["baseline"]
    yield "| CE loss, nats per token | " + " | ".join(base) + " |"
    yield "|---" * (len(base) + 1) + "|"
    yield "| plain | " + " | ".join(f"{each['ce_loss']:.3f}" for each in base.values()) + " |"
    for label, table in found["ce_loss"].items():
        if label != "baseline":
            deltas = [signed(table[name]["ce_loss"] - base[name]["ce_loss"], 3) for name in base]
            yield f"| {intervention_name(label, 'harmful')} | " + " | ".join(deltas) + " |"
    yield ""


def _seeds(seeds: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if len(seeds) < 2:
        return
    yield "Search and choice on other samples of the prompts (labels are shared):"
    yield ""
    yield "| seed | zero point | survivors | position, layer | bypass | induce | KL | cosine with the first |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in seeds:
        best = each["best"]
        cells = ["none", "", "", "", ""]
        if best is not None:
            scores = (_nats(best[key]) for key in ("refusal_score", "steering_score"))
            place = f"{_minus(best['position'])}, {best['layer']}"
            cells = [place, *scores, f"{best['kl_div_score']:.3f}", f"{each['cosine']:.2f}"]
        yield f"| {each['seed']} | {_nats(each['zero_point_nats'])} | {each['n_survivors']} | {' | '.join(cells)} |"
    yield ""


def _limit(found: Mapping[str, Any]) -> Iterable[str]:
    """What a looser limit on KL lets through, alone and together."""
    best = found["best"]
    yield (
        f"With `--kl-max {found['kl_max']:g}`, {found['n_survivors']} candidates survive, and position "
        f"{_minus(best['position'])}, layer {best['layer']} is chosen (KL {best['kl_div_score']:.3f} nats):"
    )
    yield ""
    yield from _effects(found)


def _categories(found: Mapping[str, Any]) -> Iterable[str]:
    rates = found["by_category"]["rates"]
    yield (
        "Refused by category of the bundled harmful prompts (of those that were labelled): "
        + ", ".join(f"{name} {rate['count']} of {rate['n']}" for name, rate in rates.items())
        + "."
    )
    yield ""


def _rate(rate: Mapping[str, Any]) -> str:
    return str(Rate(rate["count"], rate["n"]))


def _minus(position: int) -> str:
    return f"−{-position}"


def _nats(score: float) -> str:
    return f"{score:.2f}".replace("-", "−")


if __name__ == "__main__":
    sys.exit(main())
