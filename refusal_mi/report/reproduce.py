"""The command line that repeats a run, from its record."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ..pipelines.options import RunOptions
from ..provenance import is_embedded
from ..selection import NO_THRESHOLDS, Thresholds

_ALWAYS = ("harmful", "harmless", "text_set", "instruction_set", "max_new_tokens")
"""Options whose default depends on the model, so that they are always spelled out."""
_ELSEWHERE = ("thresholds", "filter_prompts", "template_kwargs", "refusal_tokens", "steps", "quick")

_OFF = {"kl_max": "inf", "induce_min": "-inf", "prune_layers": "0"}
"""How a threshold is switched off."""


def command_line(run: Mapping[str, Any], combination: Mapping[str, Any] | None = None) -> str:
    """The `refusal-mi run` command that has the options of a `run.json`; options at their default are left out.

    Args:
        combination: what is ablated together, as in its `directions_span.json`.
    """
    options, model, defaults = run["options"], run["model"], RunOptions()
    words = ["refusal-mi", "run"]
    if not is_embedded(model["source"]):
        words.append(model["source"])
    if model.get("revision"):
        words += ["--revision", model["revision"]]
    for name, value in options.items():
        if name in _ELSEWHERE or value is None:
            continue
        if name in _ALWAYS or value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += _switches(options)
    if combination is not None:
        words += ["--directions", "-".join(map(str, combination["ranks"]))]
        words += [] if combination["multi"] == "span" else ["--multi", combination["multi"]]
    words += ["--device", model["device"].partition(":")[0], "--dtype", model["dtype"]]
    lines = ["refusal-mi run"]
    for word in words[2:]:
        lines.append(shlex.quote(word)) if word.startswith("--") else lines.append(
            lines.pop() + " " + shlex.quote(word)
        )
    return " \\\n    ".join(lines)


def _switches(options: Mapping[str, Any]) -> list[str]:
    words = [] if options["filter_prompts"] else ["--no-filter"]
    for key, value in options["template_kwargs"].items():
        words += ["--template-kwargs", f"{key}={json.dumps(value)}"]
    if options["refusal_tokens"]:
        words += ["--refusal-tokens", ",".join(map(str, options["refusal_tokens"]))]
    if tuple(options["steps"]) != RunOptions().steps:
        words += ["--steps", ",".join(options["steps"])]
    rule = Thresholds(**options["thresholds"])
    if rule == NO_THRESHOLDS:
        words.append("--no-thresholds")
    else:
        for name, value in vars(rule).items():
            if value != getattr(Thresholds(), name):
                words += [f"--{name.replace('_', '-')}", _OFF[name] if value is None else str(value)]
    return [*words, "--quick"] if options["quick"] else words
