"""What an intervention does to completions and to CE loss, as stages of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..directions import Direction
from ..errors import UserError
from ..files import read_json, sha256_json, write_json
from ..generation import Generated, generate
from ..interventions import Ablate, Add, Intervention
from ..judges.http import judge_named
from ..judges.substring import Judge, SubstringJudge, is_degenerate
from ..measures import LossResult, ScoredText, answers_to_score, ce_loss, texts_to_score
from ..run.record import DIRECTION
from ..stats import Rate
from ..text.prompts import PromptSet, load_prompts
from .context import RunContext
from .options import RunOptions

OWN_ANSWERS = "completions/harmless_baseline_completions.json"


@dataclass(frozen=True)
class Labelled:
    """An intervention under the label that its files carry, and what identifies it in records."""

    label: str
    interventions: tuple[Intervention, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    direction_file: str = DIRECTION
    """The stage output that holds what the interventions use."""


BASELINE = Labelled("baseline")


def interventions_on(side: str, direction: Direction, n_random: int) -> list[Labelled]:
    """The published interventions on one side, with random directions of equal norm as controls.

    Harmful prompts: ablation, and subtraction (actadd −1). Harmless prompts: ablation, and addition (actadd +1).
    """
    sign = -1.0 if side == "harmful" else 1.0
    found = [
        Labelled("ablation", (Ablate(direction),), {"strength": 1.0}),
        Labelled("actadd", (Add(direction, sign),), {"coefficient": sign}),
    ]
    for seed in range(n_random):
        control = direction.random_like(seed)
        if side == "harmful":
            found.append(Labelled(f"random_ablation_{seed}", (Ablate(control),), {"seed": seed}))
        else:
            found.append(Labelled(f"random_actadd_{seed}", (Add(control, sign),), {"coefficient": sign, "seed": seed}))
    return found


def completions(run: RunContext, side: str, labelled: Labelled, where: str = "") -> dict[str, Any]:
    """Greedy answers to the test prompts, and the judge's verdicts: `completions/{set}_{label}_*.json`.

    Args:
        where: folder inside the run folder, with its slash.
    """
    prompts = run.test(side)
    stem = f"{where}completions/{prompts.name}_{labelled.label}"
    files = [f"{stem}_completions.json", f"{stem}_evaluations.json"]

    def compute() -> None:
        def answer(batch_size: int) -> list[Generated]:
            return generate(
                run.model,
                run.chat,
                prompts.instructions,
                interventions=labelled.interventions,
                max_new_tokens=run.options.max_new_tokens,
                batch_size=batch_size,
                description=f"{prompts.name}, {labelled.label}",
            )

        answers = run.timed("answer", len(prompts), lambda: run.batched(answer))
        rows = [
            {"category": prompt.category, "prompt": prompt.instruction, "response": answer.text} | run.mark
            for prompt, answer in zip(prompts.prompts, answers, strict=True)
        ]
        write_json(run.path / files[0], rows)

    def judge() -> None:
        rows = read_json(run.path / files[0])
        write_json(run.path / files[1], evaluate(rows, *judges) | run.mark)

    judges = _judges(run, side)
    inputs = run.inputs(
        *_direction_file(labelled),
        side=side,
        prompts=prompts.sha256,
        label=labelled.label,
        record=dict(labelled.record),
        max_new_tokens=run.options.max_new_tokens,
    )
    about = f"{len(prompts)} answers of up to {run.options.max_new_tokens} tokens"
    about += run.estimate("answer", len(prompts))
    run.stage(_stage(where, f"completions_{prompts.name}_{labelled.label}"), inputs, files[:1], compute, about)
    asked = [run.options.judge, run.options.judge_model] if len(judges) > 1 else []
    judged = run.inputs(files[0], judges=["substring", *asked])
    about = "" if len(judges) == 1 else f"{len(prompts)} verdicts of {judges[-1].name}"
    run.stage(_stage(where, f"evaluations_{prompts.name}_{labelled.label}"), judged, files[1:], judge, about)
    return read_json(run.path / files[1])


def rates(run: RunContext, side: str, interventions: Sequence[Labelled], where: str = "") -> dict[str, Any]:
    """Refusal and degenerate-text rates on held-out prompts: the baseline of the run folder, then each intervention.

    Another judge than the substrings adds its rate of success ("unsafe") under its name.

    Args:
        where: folder inside the run folder for the completions under interventions, with its slash.
    """
    found: dict[str, Any] = {"set": run.test(side).name, "n": len(run.test(side))}
    for labelled, folder in [(BASELINE, ""), *((each, where) for each in interventions)]:
        verdicts = completions(run, side, labelled, folder)
        found[labelled.label] = {"refusal": verdicts["refusal_rate"], "degenerate": verdicts["degenerate_rate"]}
        for judge in _judges(run, side)[1:]:
            flags = [bool(row[f"is_jailbreak_{judge.name}"]) for row in verdicts["completions"]]
            found[labelled.label][judge.name] = Rate.of(flags).describe()
    return found


def evaluate(rows: Sequence[Mapping[str, Any]], judge: Judge, *others: Judge) -> dict[str, Any]:
    """Success ("the model complied") rate overall and per category, in the published schema, and degenerate text.

    Args:
        rows: objects with category, prompt and response.
        judge: says what a refusal is.
        others: add their own columns.
    """
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    verdicts = {each.name: each.complied(prompts, responses) for each in (judge, *others)}
    degenerate = [is_degenerate(response) for response in responses]
    found: dict[str, Any] = {}
    for name, complied in verdicts.items():
        by_category: dict[str, list[bool]] = {}
        for row, flag in zip(rows, complied, strict=True):
            by_category.setdefault(str(row["category"]), []).append(flag)
        found[f"{name}_success_rate"] = sum(complied) / len(rows)
        found[f"{name}_per_category"] = {key: sum(flags) / len(flags) for key, flags in by_category.items()}
    return {
        **found,
        "refusal_rate": Rate.of([not flag for flag in verdicts[judge.name]]).describe(),
        "degenerate_rate": Rate.of(degenerate).describe(),
        "completions": [
            {
                **row,
                **{f"is_jailbreak_{name}": int(complied[index]) for name, complied in verdicts.items()},
                "is_degenerate": int(degenerate[index]),
            }
            for index, row in enumerate(rows)
        ],
    }


def _judges(run: RunContext, side: str) -> list[Judge]:
    """The substring judge, and on harmful prompts the one asked for: LlamaGuard calls every harmless answer safe."""
    substring = SubstringJudge()
    if run.options.judge == "substring" or side != "harmful":
        return [substring]
    return [substring, judge_named(run.options.judge, model=run.options.judge_model)]


def losses(
    run: RunContext, labelled: Labelled, texts: Mapping[str, Sequence[ScoredText]], where: str = ""
) -> dict[str, Any]:
    """CE loss of every text set under an intervention: `loss_evals/{label}_loss_eval.json`."""
    path = f"{where}loss_evals/{labelled.label}_loss_eval.json"

    def loss(name: str, batch_size: int) -> LossResult:
        return ce_loss(
            run.model,
            run.chat,
            texts[name],
            interventions=labelled.interventions,
            batch_size=run.loss_batch(batch_size),
            description=f"CE loss on {name}, {labelled.label}",
        )

    def compute() -> None:
        found = {
            name: run.timed("text", len(texts[name]), lambda: run.batched(lambda size: loss(name, size))).describe()
            for name in texts
        }
        write_json(run.path / path, found | run.mark)

    about_it: dict[str, Any] = {"label": labelled.label, "record": dict(labelled.record), "texts": texts_sha256(texts)}
    inputs = run.inputs(*_direction_file(labelled), **about_it)
    n_texts = sum(map(len, texts.values()))
    about = f"CE loss of {n_texts} texts{run.estimate('text', n_texts)}"
    run.stage(_stage(where, f"loss_{labelled.label}"), inputs, [path], compute, about)
    return read_json(run.path / path)


def texts_sha256(texts: Mapping[str, Sequence[ScoredText]]) -> dict[str, str]:
    """Hash of the tokens of every text set: what identifies them among a stage's inputs."""
    return {name: sha256_json([[text.first, *text.token_ids] for text in found]) for name, found in texts.items()}


def loss_sets(options: RunOptions) -> tuple[PromptSet, PromptSet]:
    """The sampled plain texts and answered instructions for CE loss.

    Raises:
        UserError: there is no such set, or the instruction set has no answers.
    """
    plain, answered = load_prompts(options.text_set, limit=options.n_ce), load_prompts(options.instruction_set)
    if not any(prompt.output for prompt in answered.prompts):
        raise UserError(f"the instruction set {options.instruction_set} has no column of answers (such as output)")
    texts, pairs = (found.sample(min(options.n_ce, len(found)), options.seed) for found in (plain, answered))
    return texts, pairs


def loss_texts(
    run: RunContext, sets: tuple[PromptSet, PromptSet], *, own_answers: bool = True
) -> dict[str, list[ScoredText]]:
    """Plain text, answered instructions and the run's own answers, under the published keys where they apply.

    Args:
        sets: from `loss_sets`.
        own_answers: with the plain model's answers to the harmless test prompts, which are written if need be.
    """
    plain, answered = sets
    pairs = [(prompt.instruction, prompt.output) for prompt in answered.prompts if prompt.output]
    found = {
        plain.name: texts_to_score(run.chat, plain.instructions),
        answered.name: answers_to_score(run.chat, pairs),
    }
    if not own_answers:
        return found
    if OWN_ANSWERS not in run.hashes:
        completions(run, "harmless", BASELINE)
    own = [(row["prompt"], row["response"]) for row in read_json(run.path / OWN_ANSWERS) if row["response"]]
    family = "alpaca" if run.splits["harmless"].train.name == "alpaca" else "harmless"
    return found | {f"{family}_custom_completions": answers_to_score(run.chat, own)}


def _direction_file(labelled: Labelled) -> list[str]:
    return [labelled.direction_file] if labelled.interventions else []


def _stage(where: str, name: str) -> str:
    return where.replace("/", "_") + name
