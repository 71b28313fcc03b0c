"""How a comparison of methods looks in a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import Console, Table, print_lines

if TYPE_CHECKING:
    from ..run.methods import BesideRow, DrawsRow, MethodsResult

Limits = tuple[float | None, float | None, float | None]
"""A value with the ends of its interval."""


def print_methods(found: "MethodsResult", folder: Path) -> None:
    """What every method costs at equal refusal, what else it changes, and the controls."""
    from ..stats import signed

    whole = Table("method", "layer", "refused", "KL", "dependence", title="the whole span removed")
    there = Table("method", "where refused", "strength", "KL", "ratio [95%]", "Δ CE", title="at equal refusal")
    for row in found.rows:
        at, dependent = row.at(1.0), found.dependent(row.label)
        shown = "" if dependent is None else f"{dependent:.3f}"
        whole.add_row(row.label, str(row.layer), str(at.refused), f"{at.kl_nats[0]:.4f}", shown)
        matched = row.matched
        if matched.strength is None or matched.kl_nats is None:
            there.add_row(row.label, "never fewer", "", "", "", "")
            continue
        refused = found.target if matched.refused is None else matched.refused
        cost = f"{matched.strength:.2f}", f"{matched.kl_nats:.4f}", ratio_text(matched.ratio)
        there.add_row(row.label, f"{refused:.2f}", *cost, signed(row.ce_change, 3))
    for table in (whole, there):
        Console().print(table)
    _print_beside(found.beside, {row.label for row in found.rows if row.matched.strength is not None})
    for row in found.rows:
        if row.over_single[0] is not None:
            print_lines(f"{row.label} / one direction of it: {ratio_text(row.over_single)}")
    print_lines(*map(draws_text, found.draws))
    for name in dict.fromkeys(each.label for each in found.controls):
        of_kind = [each for each in found.controls if each.label == name]
        shares = [each.refused_by_score for each in of_kind]
        kl = [each.kl_nats for each in of_kind]
        print_lines(
            f"{name}, {min(each.k for each in of_kind)} to {max(each.k for each in of_kind)} directions: refused by "
            f"score {min(shares):.3f} to {max(shares):.3f}, KL {min(kl):.4f} to {max(kl):.4f}"
        )
    if found.dependence_of and (random := found.dependent(found.dependence_of[-1])) is not None:
        print_lines(
            f"dependence: mean change of the stream's cosines with {found.rows[0].label} where the other is removed, "
            f"or the other way round, the larger; of a random direction {random:.3f}"
        )
    tokens = "1 token" if found.kl_tokens == 1 else f"{found.kl_tokens} tokens"
    print_lines(f"KL: over {tokens} of the plain model's answers to harmless prompts")
    where = f"costs are matched where {found.target:.3f} of {found.n_held_out} held-out prompts are refused, or at more"
    print_lines(
        f"plain: refused {found.plain_refused_by_text}; {where if found.target else 'there is nothing to match'}",
        *opened_lines(found),
        *(f"{label}: left out, {reason}" for label, reason in found.skipped.items()),
        f"{folder}",
    )


def opened_lines(found: "MethodsResult") -> list[str]:
    """When held-out prompts were used."""
    when = [each.created or "an unknown time" for each in found.opened]
    if not when:
        return []
    first = f"held-out prompts are used from {when[0]} on, after all was chosen on validation prompts"
    if len(when) == 1:
        return [first]
    return [f"held-out prompts were in use from {when[0]} on; methods were chosen again by {', '.join(when[1:])}"]


def draws_text(row: "DrawsRow") -> str:
    """The ratio of one fit, every single one over draws of the training prompts, and what its interval is made of."""
    n = len(row.ratios)
    text = f"{row.label} / {row.over}, one fit, over held-out and training prompts: {ratio_text(row.one_fit) or 'none'}"
    text += f"; {n} draws of the training prompts: {singles(row.ratios)}"
    if n < 3:
        text += "; no interval of fewer than 3"
    if row.sd_draws is None:
        return text
    error = "" if row.se_prompts is None else f", SE over held-out prompts {row.se_prompts:.2f}"
    return f"{text}; of the log: SD over draws {row.sd_draws:.2f}{error}"


def singles(ratios: Sequence[float | None]) -> str:
    """Every ratio, that of all training prompts first."""
    return ", ".join("none" if each is None else f"{each:.2f}" for each in ratios)


def ratio_text(found: Limits) -> str:
    """With its interval; nothing where there is none."""
    value, low, high = found
    limits = "[no interval]" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
    return "" if value is None else f"{value:.2f} {limits}"


def change_text(found: Limits) -> str:
    """A difference with its sign and interval."""
    from ..stats import signed

    value, low, high = found
    if value is None:
        return ""
    return signed(value) if low is None or high is None else f"{signed(value)} [{signed(low)}, {signed(high)}]"


def limits(change: Mapping[str, float | int]) -> Limits:
    """Of `Paired.describe`."""
    return change["difference"], change["low"], change["high"]


def _print_beside(rows: "tuple[BesideRow, ...]", matched: set[str]) -> None:
    if not rows:
        return
    table = Table("method", "strength", "set or task", "there", "change [95%]", title="over-refusal and tasks")
    for index, row in enumerate(rows):
        at = f"{row.strength:.2f}" if row.label in matched else "whole" if index else ""
        for of_set in row.over_refusal:
            change = change_text(limits(of_set.change)) if index else ""
            table.add_row(row.label, at, of_set.set_name, str(of_set.refused), change)
        for task in row.capability:
            change = change_text(task.change) if index else ""
            table.add_row(row.label, at, task.task, f"{task.after[0]:.3f}", change)
    Console().print(table)
    plain = rows[0]
    floors = [f"{each.set_name}: the plain model refuses none" for each in plain.over_refusal if not each.refused.count]
    print_lines(*floors, *(f"{each.task}: {each.caveat}" for each in plain.capability if each.caveat))
