"""The model card of an export: what was changed, how closely it matches, how to undo it."""

from pathlib import Path

from ..files import write_text
from ..provenance import display_name
from .report import ExportReport

_TITLES = {"checkpoint": "Edited weights", "adapter": "LoRA adapter"}


def write_card(report: ExportReport, path: Path) -> None:
    """Write `README.md`; the source's own card lies beside it as `README.source.md`."""
    write_text(path, card(report))


def card(report: ExportReport) -> str:
    """The text of the card."""
    removed = [figure.removed for figure in report.figures.values()]
    lines = [
        "---",
        "tags: [refusal-direction, interpretability]",
        *([f"base_model: {report.source}"] if not Path(report.source).is_absolute() else []),
        "---",
        "",
        f"# {_TITLES[report.kind]} of {display_name(report.source)}",
        "",
        f"Made with refusal_mi from `{report.source}`"
        + (f" at revision `{report.revision}`" if report.revision else "")
        + ". The edit changes how the model reacts to harmful requests; it is meant for research on that.",
        "",
        "## What was changed",
        "",
        *[f"- {_sentence(step)}" for step in report.interventions],
        f"- {len(removed)} tensors were edited"
        + (f"; of a tensor, {min(removed):.2%} to {max(removed):.2%} was removed" if removed else ""),
        *[f"- {note}" for note in report.notes],
        *[f"- {name} was not copied: it may hold unedited weights" for name in report.left_behind],
        "",
        "## How closely it matches the hooked model",
        "",
        *_measured(report),
        "",
        "## How to undo it",
        "",
        _undo(report),
        "",
        "`refusal_mi.json` lists every edited tensor, the directions, versions and hashes.",
        "",
    ]
    return "\n".join(lines)


def _sentence(step: object) -> str:
    assert isinstance(step, dict)
    places = ", ".join(f"position {item['pos']}, layer {item['layer']}" for item in step["directions"])
    if step["kind"] == "add":
        where = f"the stream entering layer {step['layer']}"
        return f"{step['coefficient']} times the direction ({places}) is added to {where}"
    blocks = "all blocks" if step["layers"] is None else f"blocks {', '.join(map(str, step['layers'])) or 'none'}"
    text = f"{step['strength']} of the span of {len(step['directions'])} direction(s) ({places}) is removed from the "
    text += f"writes of {', '.join(step['components'])} of {blocks}"
    if step["constants"] is not None:
        text += f"; instead the stream has the constant components {step['constants']}"
    return text


def _measured(report: ExportReport) -> list[str]:
    found = report.verification
    if found is None:
        return ["Not measured (`--verify none`)."]
    verdict = "within" if found.passed else "BEYOND"
    lines = [
        f"{found.n_prompts} prompts, {found.n_positions} positions ({found.mode}); {verdict} the limits.",
        "",
        f"- largest logit difference {found.max_logit_difference:.1e} "
        f"(largest logit {found.largest_logit:.1f}; the edit itself moves logits by up to {found.max_effect:.1e})",
        f"- mean KL to the float32 hooked model {found.mean_kl_nats:.1e} nats"
        + (f" (hooked model in this dtype: {found.hooked_kl_nats:.1e})" if found.hooked_kl_nats is not None else ""),
        f"- equal greedy tokens {found.same_greedy:.1%}, over {found.n_new_tokens} new tokens of each prompt",
    ]
    return lines + [f"- {failure}" for failure in found.failures]


def _undo(report: ExportReport) -> str:
    if report.kind == "adapter":
        return f"Unload or disable the adapter: the weights of `{report.source}` were not changed."
    revision = f" at revision `{report.revision}`" if report.revision else ""
    others = (
        "Tensors that are not listed as edited have their original bytes."
        if report.dtype == "keep"
        else f"Every other floating-point tensor was only converted to {report.dtype}."
    )
    return (
        f"Use the original, `{report.source}`{revision}: a projection throws away what it removes, so these weights "
        f"alone cannot be turned back. {others}"
    )
