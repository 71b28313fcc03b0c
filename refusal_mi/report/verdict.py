"""The answer in words, computed from the numbers of a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..run.answers import Effect, Side, SideEffects
from ..run.folder import RunRecord
from ..run.record import DOES_NOT_REFUSE, ControlRow
from ..search.grid import ScoreGrid, Selection, select
from ..search.thresholds import Reason
from ..stats import Paired, holm, signed

MUCH_DEGENERATE = 0.1
"""Above this fraction of degenerate answers, a refusal rate says little about answers."""
NEARLY_ALL = 0.9
ALPHA = 0.05
_BRACKETS = (
    "Brackets are 95% intervals, Wilson's for rates and Newcombe's for their difference on the same prompts; "
    "p is McNemar's, exact."
)
Outcome = Literal["works", "partly", "broken", "like the control", "none", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """One headline and the sentences that support it."""

    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class SideVerdict:
    """What the direction does to one side, and whether a random direction does the same."""

    outcome: Outcome
    sentences: tuple[str, ...] = ()


_HEADLINES: dict[str, str] = {
    "both": "One direction mediates refusal: without it the model stops refusing, with it added the model refuses.",
    "both partly": "One direction takes part in refusal: ablating it lowers refusals and adding it raises them.",
    "ablation": "Ablating one direction stops refusals; adding it is not shown to cause them.",
    "addition": "Adding one direction causes refusals; ablating it is not shown to stop them.",
    "broken": "The chosen direction changes refusals, but many of the changed answers are degenerate text.",
    "neither": "The chosen direction is not shown to mediate refusal on the held-out prompts.",
}


def judge_run(record: RunRecord) -> Verdict:
    """The verdict on a run, however far it came."""
    selection = record.selection
    if record.status == DOES_NOT_REFUSE:
        assert record.summary is not None
        rate = record.summary.refused_by_text["harmful"]
        text = f"It refuses {rate} of {rate.n} harmful prompts, by the text of its answers"
        answers = " · ".join(f"“{each.response} …”" for each in record.summary.examples)
        text += f", as in: {answers}" if answers else ", which are empty."
        return Verdict("This model does not refuse: there is no refusal direction to find.", (text,))
    if selection is None:
        return Verdict(
            "No direction was chosen.",
            (
                "The run has candidate directions but no scores."
                if record.norms is not None
                else "The run has no candidate directions yet.",
                "Run it again with the step selection to score them and choose one.",
            ),
        )
    if not selection.survivors:
        return Verdict("No candidate direction survives the thresholds.", (*_why_none(record, selection),))
    if not record.sides:
        text = "A direction was chosen by its scores on validation prompts."
        if record.combination is not None:
            text = f"Ablating {_ranks(record)} was not tested on answers."
        return Verdict(text, ("No completions were generated, so the effect on answers is not measured.",))
    if record.combination is not None:
        return _judge_combination(record)
    harmful, harmless = side_verdict(record.side("harmful")), side_verdict(record.side("harmless"))
    sentences = (*harmful.sentences, *harmless.sentences, *_beside(record), *_cost(record), _BRACKETS)
    return Verdict(_HEADLINES[_overall(harmful.outcome, harmless.outcome)], sentences)


def side_verdict(
    side: SideEffects | None, what: str = "it", control_name: str = "direction", equal: str = "norm"
) -> SideVerdict:
    """Compare ablation (harmful) or addition (harmless) with the plain model and with the random directions.

    Args:
        what: is ablated or added.
        control_name: what the random controls are, and (`equal`) what they have in common with it.
    """
    if side is None:
        return SideVerdict("not measured")
    label = "ablation" if side.side == "harmful" else "actadd"
    base, hit = side.find("baseline"), side.find(label)
    if base is None or hit is None:
        return SideVerdict("not measured", (f"The answers to {side.side} prompts are incomplete.",))
    verb = "Ablating" if side.side == "harmful" else "Adding"
    sentences = [_change(side, label, f"{verb} {what}")]
    control = _closest_control(side)
    if control is None:
        sentences.append(
            f"No random {control_name} was run as a control, so it is not shown that this effect is special."
        )
    else:
        many = (
            f"the closest of {len(side.controls)} random {control_name}s"
            if len(side.controls) > 1
            else f"a random {control_name}"
        )
        alike = "" if side.side == "harmful" and equal == "norm" else f" of equal {equal}"  # ablation knows no norm
        sentences.append(f"{verb} {many}{alike} gives {control.refusal}.")
    if not _is_shown(side.side, [(base, hit)]):
        sentences.append("That is within chance for the same prompts (McNemar): no effect is shown.")
        return SideVerdict("none", tuple(sentences))
    if control is not None and not _is_shown(side.side, [(each, hit) for each in side.controls]):
        sentences.append(
            "The difference from the control on the same prompts is within chance: the effect is not shown to be "
            "specific."
        )
        return SideVerdict("like the control", tuple(sentences))
    if hit.degenerate.value > MUCH_DEGENERATE:
        done = "ablated" if side.side == "harmful" else "added"
        sentences.append(
            f"But {hit.degenerate.value:.0%} of the answers with {what} {done} are degenerate text "
            f"({base.degenerate.value:.0%} without), so they are not ordinary answers."
        )
        return SideVerdict("broken", tuple(sentences))
    reached = 1 - hit.refusal.value if side.side == "harmful" else hit.refusal.value
    return SideVerdict("works" if reached >= NEARLY_ALL else "partly", tuple(sentences))


def _judge_combination(record: RunRecord) -> Verdict:
    """Several directions are only ever ablated: what that does to harmful and to harmless prompts."""
    assert record.combination is not None
    what = "them" if len(record.combination.ranks) > 1 else "it"
    of_harmful = side_verdict(record.side("harmful"), what, "span", "rank")
    sentences = list(of_harmful.sentences)
    harmless = record.side("harmless")
    if harmless is not None and harmless.find("baseline") is not None and harmless.find("ablation") is not None:
        sentences.append(_change(harmless, "ablation", f"Ablating {what}"))
    sentences += [*_cost(record), _BRACKETS]
    headline = {
        "works": "stops refusals",
        "partly": "lowers refusals",
        "broken": "changes refusals, but many of the changed answers are degenerate text",
    }.get(of_harmful.outcome, "is not shown to stop refusals on the held-out prompts")
    return Verdict(f"Ablating {_ranks(record)} {headline}.", tuple(sentences))


def _ranks(record: RunRecord) -> str:
    assert record.combination is not None
    *others, last = map(str, record.combination.ranks)
    return f"the directions of ranks {', '.join(others)} and {last}" if others else f"the direction of rank {last}"


def _change(side: SideEffects, label: str, doing: str) -> str:
    base, hit = side.find("baseline"), side.find(label)
    assert base is not None and hit is not None
    return (
        f"{doing} takes the refusal rate on {hit.refusal.n} held-out {side.side} prompts "
        f"from {base.refusal} to {hit.refusal} ({Paired.of(base.refused, hit.refused)})."
    )


_FAILED_IN_SEARCH: dict[str, Reason] = {
    "screened out for KL": "kl",
    "screened out for induce": "induce",
    "not run": "layer",
}


def bindings(scores: ScoreGrid, selection: Selection) -> list[tuple[str, str, int, int]]:
    """For each threshold in force: its name, its limit, how many candidates fail it, and survivors without it."""
    rule, failed = selection.thresholds, Counter(reason for _, reasons in selection.rejected for reason in reasons)
    floor = None if rule.induce_min is None else rule.induce_floor(scores.zero_point)
    skipped = (row.why_skipped for row, _ in selection.rejected)
    failed.update(_FAILED_IN_SEARCH[why] for why in skipped if why in _FAILED_IN_SEARCH)
    reach = "at least {} nats" + ("" if scores.zero_point is None else " on half of the prompts")
    limits = [
        ("KL on harmless prompts", rule.kl_max, "at most {} nats", "kl", replace(rule, kl_max=None)),
        ("refusal score when added", floor, reach, "induce", replace(rule, induce_min=None)),
        ("source layer", rule.prune_layers, "", "layer", replace(rule, prune_layers=None)),
    ]
    rules = []
    for name, limit, words, reason, without in limits:
        if limit is None:
            continue
        cut = int(scores.n_layers * (1.0 - (rule.prune_layers or 0.0)))
        text = words.format(f"{limit:g}") if words else f"below {cut} of {scores.n_layers}"
        rules.append((name, text, failed[reason], len(select(scores, without).survivors)))  # type: ignore[index]
    return rules


def _why_none(record: RunRecord, selection: Selection) -> list[str]:
    assert record.scores is not None
    sentences = [selection.explain() + "."]
    rescued = [(name, n) for name, _, _, n in bindings(record.scores, selection) if n]
    for name, n in rescued:
        sentences.append(f"Without the threshold on the {name}, {n} would survive.")
    if any(row.skipped for row, _ in selection.rejected):
        sentences.append("What the search left out has no full scores; --search exact without --skip-pruned has all.")
    elif not rescued:
        sentences.append("No single threshold is to blame: dropping any one of them leaves no survivor.")
    sentences.append(
        "To rank all candidates anyway, use --no-thresholds; to move a limit, --kl-max, --induce-min or --prune-layers."
    )
    return sentences


def _overall(harmful: Outcome, harmless: Outcome) -> str:
    good = ("works", "partly")
    if harmful in good and harmless in good:
        return "both" if harmful == harmless == "works" else "both partly"
    if "broken" in (harmful, harmless):
        return "broken"
    return "ablation" if harmful in good else "addition" if harmless in good else "neither"


def _is_shown(side: Side, pairs: Sequence[tuple[Effect, Effect]]) -> bool:
    """Whether refusals fall (harmful) or rise (harmless) from the first of every pair to the second, beyond chance.

    On the same prompts, by McNemar's exact test; of several pairs each, corrected by Holm.
    """
    found = [Paired.of(first.refused, second.refused) for first, second in pairs]
    wanted = -1 if side == "harmful" else 1
    significant = all(p < ALPHA for p in holm([each.p_value for each in found]))
    return significant and all(each.difference * wanted > 0 for each in found)


def _closest_control(side: SideEffects) -> Effect | None:
    """The random direction that does most of what the chosen one should do."""
    if not side.controls:
        return None
    pick = min if side.side == "harmful" else max
    return pick(side.controls, key=lambda effect: effect.refusal.value)


def control_groups(record: RunRecord) -> list[tuple[str, list[ControlRow]]]:
    """What was measured beside the chosen direction on validation prompts, by kind; it comes first."""
    rows = () if record.summary is None or record.combination is not None else record.summary.controls
    names = {
        "chosen": "the chosen direction",
        "random": "random",
        "within harmful": "halves of harmful prompts",
        "within harmless": "halves of harmless prompts",
    }
    grouped = [(name, [row for row in rows if row.kind == kind]) for kind, name in names.items()]
    return [(name, members) for name, members in grouped if members]


def extent(values: Sequence[float | None], form: str = ".3g") -> str:
    """The least and the largest of what could be measured: "0.1% to 1.4%"."""
    finite = sorted(value for value in values if value is not None)
    if not finite:
        return "–"
    ends = [format(value, form).replace("-", "−") for value in (finite[0], finite[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _beside(record: RunRecord) -> list[str]:
    """What the direction and its controls of one place and norm do to the scores."""
    groups = control_groups(record)
    if len(groups) < 2:
        return []
    (_, [chosen]), *others = groups
    random = [row for name, rows in others if name == "random" for row in rows]
    within = [row for name, rows in others if name != "random" for row in rows]
    kinds = [(f"{len(random)} random directions", random), (f"{len(within)} from random halves of one class", within)]
    scores = [f"{extent([row.bypass for row in rows])} with {name}" for name, rows in kinds if rows]
    shares = [f"{extent([row.share_of_stream for row in rows], '.1%')} by {name}" for name, rows in kinds if rows]
    return [
        "With it ablated the mean refusal score of the first harmful validation prompts is "
        f"{extent([chosen.bypass])} nats, {', '.join(scores)}; "
        f"{chosen.share_of_stream:.1%} of the stream is removed, {', '.join(shares)}."
    ]


def _cost(record: RunRecord) -> list[str]:
    sentences = []
    assert record.selection is not None
    kl = record.selection.best.kl_nats
    if kl is not None and record.combination is None:
        sentences.append(f"Ablation moves the next-token distribution on harmless prompts by {kl:.3g} nats of KL.")
    if "ablation" in record.losses:
        base, ablated = record.losses["baseline"], record.losses["ablation"]
        deltas = [f"{signed(ablated[name].ce_loss - base[name].ce_loss, 3)} on {name}" for name in base]
        sentences.append(f"It changes the CE loss by {', '.join(deltas)} (nats per token).")
    return sentences
