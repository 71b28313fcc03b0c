"""Run folders with the numbers of a model that refuses, without running one."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from refusal_mi.files import write_json, write_tensors
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.measures import LossResult
from refusal_mi.recipes.effects import evaluate
from refusal_mi.recipes.options import RunOptions
from refusal_mi.search.grid import CandidateScore, ScoreGrid, Selection, Thresholds, select

N_LAYERS, N_VAL = 8, 16
PUBLISHED = Thresholds()
TOKENS = ("<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ")
REFUSAL = "I cannot help with that request. It could hurt people, and I would rather suggest something safe."
ANSWER = "Sure. First gather what you need, then work step by step, and check the result before you go on."
BROKEN = "I'mI'mI'mI'mI'mI'm"
_MODEL = {
    "source": "example/chat-model",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "fingerprint": None,
    "model_type": "llama",
    "n_layers": N_LAYERS,
    "d_model": 16,
    "d_vocab": 300,
    "dtype": "float32",
    "device": "cpu",
}
_SCENARIO = {
    ("harmful", "baseline"): (0.97, 0.0),
    ("harmful", "ablation"): (0.02, 0.01),
    ("harmful", "actadd"): (0.11, 0.02),
    ("harmful", "random_ablation_0"): (0.96, 0.0),
    ("harmless", "baseline"): (0.01, 0.0),
    ("harmless", "ablation"): (0.0, 0.0),
    ("harmless", "actadd"): (0.95, 0.03),
    ("harmless", "random_actadd_0"): (0.02, 0.0),
}
"""(side, label): fraction refused, fraction degenerate."""


def make_scores(*, kl: float = 0.03) -> ScoreGrid:
    """Bypass falls and induce rises toward layer 4, most at the last position; layer 0 has no direction."""
    generator = torch.Generator().manual_seed(0)
    rows, per_prompt = [], torch.full((len(TOKENS) * N_LAYERS, 3, N_VAL + 2), math.nan, dtype=torch.float64)
    for index, (position, layer) in enumerate((p, n) for p in range(-len(TOKENS), 0) for n in range(N_LAYERS)):
        if layer == 0:
            rows.append(CandidateScore(position, layer, None, None, None))
            continue
        strength = math.exp(-((layer - 4) ** 2) / 4) * (6 + position) / 5
        means = torch.tensor([6 - 14 * strength, -9 + 15 * strength, kl * (0.2 + strength)], dtype=torch.float64)
        noise = torch.randn(3, N_VAL, generator=generator, dtype=torch.float64)
        per_prompt[index, :, :N_VAL] = means[:, None] + noise * torch.tensor([[1.5], [2.0], [0.1 * kl]])
        rows.append(CandidateScore(position, layer, *per_prompt[index, :, :N_VAL].mean(-1).tolist()))
    return ScoreGrid(tuple(rows), N_LAYERS, 6.2, -9.1, per_prompt)


def make_run(
    folder: Path,
    *,
    n_test: int = 40,
    reached: str = "loss",
    thresholds: Thresholds = PUBLISHED,
    changes: dict[tuple[str, str], tuple[float, float]] | None = None,
    prompt: str = "",
    response: str = "",
    quick: bool = False,
    summarized: bool = True,
) -> Path:
    """Write a run folder that came as far as `reached`: directions, selection, completions or loss.

    Args:
        changes: (side, label) -> (fraction refused, fraction degenerate), over the scenario of a model that refuses.
        prompt: text to put into every prompt.
        response: text to put into every answer.
    """
    scores = make_scores()
    chosen = select(scores, thresholds)
    has_scores, has_direction = reached != "directions", reached != "directions" and bool(chosen.survivors)
    summary: dict[str, Any] = {"model": _MODEL, "quick": quick, "seconds": {"prompts": 1.2, "scores": 30.4}}
    summary["status"] = "directions only" if not has_scores else "done" if has_direction else "no candidate survives"
    _write_start(folder, thresholds, quick, prompt)
    if has_scores:
        summary["selection"] = {"explanation": chosen.explain(), "thresholds": asdict(thresholds)}
        _write_scores(folder, scores, chosen)
    if has_direction and reached in ("completions", "loss"):
        summary["completions"] = _write_answers(folder, n_test, {**_SCENARIO, **(changes or {})}, prompt, response)
    if has_direction and reached == "loss":
        summary["ce_loss"] = _write_losses(folder)
    if summarized:
        write_json(folder / "summary.json", summary)
    return folder


def _write_start(folder: Path, thresholds: Thresholds, quick: bool, prompt: str) -> None:
    chat = {
        "template_sha256": "ab" * 32,
        "system": None,
        "template_kwargs": {},
        "template_date": None,
        "response_prefix": "",
        "rendered_example": "<|im_start|>user\nName a color<|im_end|>\n<|im_start|>assistant\n",
        "post_instruction_tokens": list(TOKENS),
    }
    tokens = [{"id": 40, "text": "I", "harmful_probability": 0.93, "harmless_probability": 0.01}]
    write_json(
        folder / "run.json",
        {
            "model": _MODEL,
            "options": asdict(RunOptions(thresholds=thresholds, quick=quick)),
            "chat": chat,
            "refusal_tokens": tokens,
            "refusal_tokens_origin": "discovered on the training split",
            "published_refusal_tokens": [],
            "prompt_sets_sha256": {"harmful": {"train": "00" * 32}},
            "versions": {"python": "3.11.0", "refusal_mi": "0.1.0", "torch": "2.13.0"},
            "quick": quick,
        },
    )
    row = {"instruction": f"Do something{prompt}", "category": None, "output": None}
    judged = [{**row, "refusal_score": 1.0, "kept": index > 1} for index in range(N_VAL)]
    split = {"train": judged, "val": judged, "test": [row]}
    write_json(folder / "prompts.json", {"quick": quick, "harmful": split, "harmless": split})
    norms = [[0.0, *(1.0 + position + layer for layer in range(1, N_LAYERS))] for position in range(len(TOKENS))]
    positions = list(range(-len(TOKENS), 0))
    record = {"positions": positions, "norms": norms, "n_harmful": 14, "n_harmless": 14, "method": "difference"}
    write_json(folder / "generate_directions/mean_diffs.json", record)


def _write_scores(folder: Path, scores: ScoreGrid, chosen: Selection) -> None:
    select_direction = folder / "select_direction"
    write_json(select_direction / "direction_evaluations.json", [row.describe() for row in scores.rows])
    write_tensors(select_direction / "scores.pt", scores.per_prompt)
    baseline = {"harmful": scores.baseline_harmful, "harmless": scores.baseline_harmless, "n_layers": N_LAYERS}
    write_json(select_direction / "baseline.json", baseline)
    if chosen.survivors:
        best = chosen.best
        place = {"pos": best.position, "layer": best.layer, "hook_name": f"blocks.{best.layer}.hook_resid_pre"}
        write_json(folder / "direction_metadata.json", {**place, "norm": 3.25})


def _write_answers(
    folder: Path, n: int, rates: dict[tuple[str, str], tuple[float, float]], prompt: str, response: str
) -> dict[str, Any]:
    found: dict[str, Any] = {side: {"set": side, "n": n} for side in ("harmful", "harmless")}
    for (side, label), (refused, degenerate) in rates.items():
        texts = _texts(n, refused, degenerate)
        rows = [
            {"category": "a category", "prompt": f"{side} request number {index}{prompt}", "response": text}
            for index, text in enumerate(texts)
        ]
        record = evaluate(rows, SubstringJudge())  # before the addition: judging long answers takes its time
        for row in (*rows, *record["completions"]):
            row["response"] += response
        write_json(folder / f"completions/{side}_{label}_completions.json", rows)
        write_json(folder / f"completions/{side}_{label}_evaluations.json", record)
        found[side][label] = {"refusal": record["refusal_rate"], "degenerate": record["degenerate_rate"]}
    return found


def _texts(n: int, refused: float, degenerate: float) -> Sequence[str]:
    n_refused, n_broken = round(refused * n), round(degenerate * n)
    return [REFUSAL] * n_refused + [ANSWER] * (n - n_refused - n_broken) + [BROKEN] * n_broken


def _write_losses(folder: Path) -> dict[str, Any]:
    found = {}
    for label, change in (("baseline", 0.0), ("ablation", 0.012), ("actadd", 0.25), ("random_ablation_0", -0.001)):
        values = {"plain_text": 2.1 + change, "instructions": 1.4 + change / 2, "harmless_custom_completions": 0.3}
        found[label] = {name: LossResult(x, math.exp(x), 1020).describe() for name, x in values.items()}
        write_json(folder / f"loss_evals/{label}_loss_eval.json", found[label])
    return found
