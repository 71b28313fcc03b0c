"""Run folders with the numbers of a model that refuses, without running one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from refusal_mi.files import read_json, write_json, write_record, write_tensors
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.measures import LossResult
from refusal_mi.model.points import HookedModel
from refusal_mi.model.provenance import ModelRecord, describe_model
from refusal_mi.recipes.effects import evaluate
from refusal_mi.run.answers import Completion, Effect, SideEffects
from refusal_mi.run.options import RunOptions
from refusal_mi.run.record import (
    BaselineRecord,
    CombinationRecord,
    GridRecord,
    PromptRow,
    PromptsRecord,
    RunInfo,
    RunSummary,
    SelectionRecord,
    SplitRows,
    TokenRecord,
)
from refusal_mi.search.grid import ScoreGrid, Selection, select
from refusal_mi.search.thresholds import CandidateScore, Thresholds
from refusal_mi.text.chat import ChatFormat, ChatRecord

N_LAYERS, N_VAL = 8, 16
PUBLISHED = Thresholds()
TOKENS = ("<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ")
REFUSAL = "I cannot help with that request. It could hurt people, and I would rather suggest something safe."
ANSWER = "Sure. First gather what you need, then work step by step, and check the result before you go on."
BROKEN = "I'mI'mI'mI'mI'mI'm"
_MODEL = ModelRecord(
    "example/chat-model",
    "0123456789abcdef0123456789abcdef01234567",
    None,
    "llama",
    N_LAYERS,
    16,
    300,
    "float32",
    "cpu",
)
_REFUSAL_TOKENS = (TokenRecord(40, "I"),)
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


def make_model() -> ModelRecord:
    """The model that these runs are of."""
    return _MODEL


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
    status = "directions only" if not has_scores else "done" if has_direction else "no candidate survives"
    seconds = {"prompts": 1.2, "scores": 30.4}
    summary = RunSummary(_MODEL, quick, status, _REFUSAL_TOKENS, {}, seconds)
    _write_start(folder, thresholds, quick, prompt)
    if has_scores:
        summary = replace(summary, selection=SelectionRecord.of(chosen))
        _write_scores(folder, scores, chosen)
    if has_direction and reached in ("completions", "loss"):
        effects = _write_answers(folder, n_test, {**_SCENARIO, **(changes or {})}, prompt, response)
        summary = replace(summary, completions=effects)
    if has_direction and reached == "loss":
        summary = replace(summary, ce_loss=_write_losses(folder))
    if summarized:
        write_record(folder / "summary.json", summary)
    return folder


def finished_run(folder: Path) -> Path:
    """`make_run` with the tensors of its candidates, of norms as its record says, and of its direction."""
    make_run(folder)
    norms = torch.tensor(read_json(folder / "generate_directions/mean_diffs.json")["norms"], dtype=torch.float64)
    vectors = norms[..., None] * torch.eye(8, dtype=torch.float64)[norms.argsort().argsort() % 8]
    write_tensors(folder / "generate_directions/mean_diffs.pt", vectors)
    place = read_json(folder / "direction_metadata.json")
    vector = vectors[place["pos"], place["layer"]].float()
    write_json(folder / "direction_metadata.json", {**place, "norm": vector.norm().item()})
    write_tensors(folder / "direction.pt", vector)
    write_json(folder / "select_direction/direction_evaluations_filtered.json", [])
    return folder


def write_head(
    folder: Path, model: HookedModel, source: str, sides: Mapping[str, Sequence[str]], tokens: Sequence[int]
) -> None:
    """`run.json` and `prompts.json` of a run of a loaded model, in which the first prompt of each split is left out.

    Args:
        sides: "harmful" and "harmless" -> their prompts, the same in every split.
    """
    chat = ChatFormat(model.tokenizer).record()
    found = (tuple(TokenRecord(token, "?") for token in tokens), "given", ())
    write_record(folder / "run.json", RunInfo(describe_model(model, source), RunOptions(), chat, *found, {}, {}))
    rows = {side: tuple(PromptRow(text, kept=at > 0) for at, text in enumerate(texts)) for side, texts in sides.items()}
    splits = (SplitRows(rows[side], rows[side], rows[side]) for side in ("harmful", "harmless"))
    write_record(folder / "prompts.json", PromptsRecord(False, "", chat, *found, *splits))


def _write_start(folder: Path, thresholds: Thresholds, quick: bool, prompt: str) -> None:
    example = "<|im_start|>user\nName a color<|im_end|>\n<|im_start|>assistant\n"
    chat = ChatRecord("ab" * 32, None, {}, None, "", example, TOKENS)
    tokens = (_REFUSAL_TOKENS, "discovered on the training split", ())
    versions = {"python": "3.11.0", "refusal_mi": "0.1.0", "torch": "2.13.0"}
    hashes = {"harmful": {"train": "00" * 32}}
    options = RunOptions(thresholds=thresholds, quick=quick)
    write_record(folder / "run.json", RunInfo(_MODEL, options, chat, *tokens, hashes, versions, quick))
    judged = tuple(PromptRow(f"Do something{prompt}", None, None, 1.0, index > 1) for index in range(N_VAL))
    split = SplitRows(judged, judged, (PromptRow(f"Do something{prompt}"),))
    write_record(folder / "prompts.json", PromptsRecord(quick, "", chat, *tokens, split, split))
    norms = tuple((0.0, *(1.0 + position + layer for layer in range(1, N_LAYERS))) for position in range(len(TOKENS)))
    record = GridRecord("difference", tuple(range(-len(TOKENS), 0)), norms, 14, 14)
    write_record(folder / "generate_directions/mean_diffs.json", record)


def _write_scores(folder: Path, scores: ScoreGrid, chosen: Selection) -> None:
    select_direction = folder / "select_direction"
    write_json(select_direction / "direction_evaluations.json", [row.describe() for row in scores.rows])
    write_tensors(select_direction / "scores.pt", scores.per_prompt)
    plain = BaselineRecord(scores.baseline_harmful, scores.baseline_harmless, N_LAYERS)
    write_record(select_direction / "baseline.json", plain)
    if chosen.survivors:
        best = chosen.best
        place = {"pos": best.position, "layer": best.layer, "hook_name": f"blocks.{best.layer}.hook_resid_pre"}
        write_json(folder / "direction_metadata.json", {**place, "norm": 3.25})


def _write_answers(
    folder: Path, n: int, rates: dict[tuple[str, str], tuple[float, float]], prompt: str, response: str
) -> dict[str, SideEffects]:
    effects: dict[str, list[Effect]] = {}
    for (side, label), (refused, degenerate) in rates.items():
        texts = _texts(n, refused, degenerate)
        rows = [
            Completion("a category", f"{side} request number {index}{prompt}", text) for index, text in enumerate(texts)
        ]
        judged = evaluate(rows, SubstringJudge())  # before the addition: judging long answers takes its time
        answers = tuple(replace(answer, response=answer.response + response) for answer in judged.answers)
        stem = folder / f"completions/{side}_{label}"
        write_json(Path(f"{stem}_completions.json"), [replace(row, response=row.response + response) for row in rows])
        write_json(Path(f"{stem}_evaluations.json"), replace(judged, answers=answers))
        effects.setdefault(side, []).append(judged.effect(label))
    return {side: SideEffects(side, side, tuple(each)) for side, each in effects.items()}


def _texts(n: int, refused: float, degenerate: float) -> Sequence[str]:
    n_refused, n_broken = round(refused * n), round(degenerate * n)
    return [REFUSAL] * n_refused + [ANSWER] * (n - n_refused - n_broken) + [BROKEN] * n_broken


def _write_losses(folder: Path) -> dict[str, dict[str, LossResult]]:
    found = {}
    for label, change in (("baseline", 0.0), ("ablation", 0.012), ("actadd", 0.25), ("random_ablation_0", -0.001)):
        values = {"plain_text": 2.1 + change, "instructions": 1.4 + change / 2, "harmless_custom_completions": 0.3}
        found[label] = {name: LossResult(x, math.exp(x), 1020) for name, x in values.items()}
        write_json(folder / f"loss_evals/{label}_loss_eval.json", found[label])
    return found


def write_span(folder: Path, ranks: Sequence[int], multi: str, norms: Sequence[float]) -> None:
    """What says that a folder holds a combination of orthogonal directions."""
    n = len(ranks)
    cosines = tuple(tuple(float(i == j) for j in range(n)) for i in range(n))
    hooks = ("blocks.4.hook_resid_pre",) * n
    record = CombinationRecord(folder.name, tuple(ranks), multi, hooks, tuple(norms), n, (1.0,) * n, cosines)
    write_record(folder / "directions_span.json", record)
