"""What an intervention does to completions and to CE loss, as stages of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..directions import Direction
from ..errors import UserError
from ..files import as_json, read_record, sha256_json, write_json
from ..generation import Generated, generate
from ..interventions import Ablate, Add, Intervention
from ..judges.http import LLAMA_GUARD
from ..judges.named import identify, judge_named
from ..judges.protocol import ClassJudge, GradingJudge, Judge, Label
from ..judges.substring import SubstringJudge, is_degenerate
from ..measures import LossResult, ScoredText, answers_to_score, ce_loss, texts_to_score
from ..run.answers import UNREAD, Completion, Evaluation, JudgedAnswer, Side, SideEffects
from ..run.options import RunOptions
from ..run.record import DIRECTION, Losses
from ..text.prompts import PromptSet, load_prompts
from ..values import Value
from .context import Prepared

OWN_ANSWERS = "completions/harmless_baseline_completions.json"


@dataclass(frozen=True, eq=False, repr=False)
class Labelled(Value):
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
    labelled = [
        Labelled("ablation", (Ablate(direction),), {"strength": 1.0}),
        Labelled("actadd", (Add(direction, sign),), {"coefficient": sign}),
    ]
    for seed in range(n_random):
        control = direction.random_like(seed)
        if side == "harmful":
            labelled.append(Labelled(f"random_ablation_{seed}", (Ablate(control),), {"seed": seed}))
        else:
            labelled.append(
                Labelled(f"random_actadd_{seed}", (Add(control, sign),), {"coefficient": sign, "seed": seed})
            )
    return labelled


def completions(run: Prepared, side: str, labelled: Labelled, where: str = "") -> Evaluation:
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
                engine=run.engine,
            )

        answers = run.timed("answer", len(prompts), lambda: run.batched(answer))
        rows = [
            Completion(prompt.category, prompt.instruction, answer.text)
            for prompt, answer in zip(prompts.prompts, answers, strict=True)
        ]
        write_json(run.path / files[0], [as_json(row) | run.mark for row in rows])

    def judge() -> None:
        rows = read_record(run.path / files[0], list[Completion])
        write_json(run.path / files[1], evaluate(rows, *judges, quick=run.options.quick))

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
    judged = run.inputs(files[0], judges=["substring", *map(identify, judges[1:])])
    about = "" if len(judges) == 1 else f"{len(prompts)} verdicts of {judges[-1].name}"
    run.stage(_stage(where, f"evaluations_{prompts.name}_{labelled.label}"), judged, files[1:], judge, about)
    return Evaluation.load(run.path / files[1])


def rates(run: Prepared, side: Side, interventions: Sequence[Labelled], where: str = "") -> SideEffects:
    """Refusal and degenerate-text rates on held-out prompts: the baseline of the run folder, then each intervention.

    Another judge than the substrings adds its rate of success ("unsafe") under its name.

    Args:
        where: folder inside the run folder for the completions under interventions, with its slash.
    """
    folders = [(BASELINE, ""), *((each, where) for each in interventions)]
    effects = (completions(run, side, labelled, folder).effect(labelled.label) for labelled, folder in folders)
    return SideEffects(side, run.test(side).name, tuple(effects))


def evaluate(rows: Sequence[Completion], judge: Judge, *others: Judge, quick: bool = False) -> Evaluation:
    """What the judges say of completions, and which of them are no text.

    Args:
        judge: says what a refusal is.
        others: add their own columns.

    Raises:
        UserError: some verdicts of the first judge could not be read.
    """
    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    said = [_Said.of(each, prompts, responses) for each in (judge, *others)]
    if unread := list(said[0].complied).count(None):
        raise UserError(
            f"{unread} of {len(rows)} verdicts of {judge.name} could not be read, and it is to count the refusals; put "
            "a judge that reads all of them before it"
        )
    answers = (
        JudgedAnswer(
            row.prompt,
            row.response,
            row.category,
            {each.name: flag for each in said if (flag := each.complied[i]) is not None},
            is_degenerate(row.response),
            {each.name: each.labels[i] or UNREAD for each in said if each.labels},
            {each.name: score for each in said if each.scores and (score := each.scores[i]) is not None},
        )
        for i, row in enumerate(rows)
    )
    return Evaluation(tuple(answers), quick)


@dataclass(frozen=True, eq=False, repr=False)
class _Said(Value):
    """All that one judge says of some answers; labels and scores are empty where it gives none."""

    name: str
    complied: Sequence[bool | None]
    labels: Sequence[Label | None] = ()
    scores: Sequence[float | None] = ()

    @classmethod
    def of(cls, judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> "_Said":
        if not isinstance(judge, ClassJudge):
            return cls(judge.name, [bool(flag) for flag in judge.complied(prompts, responses)])
        grades = judge.graded(prompts, responses) if isinstance(judge, GradingJudge) else []
        graded: list[Label | None] = [None if each is None else each.label for each in grades]
        labels = graded or judge.labels(prompts, responses)
        complied = [None if label is None else label == "comply" for label in labels]
        return cls(judge.name, complied, labels, [None if each is None else each.score for each in grades])


def _judges(run: Prepared, side: str) -> list[Judge]:
    """The substring judge, and the one asked for; LlamaGuard on harmful prompts alone: harmless answers are safe."""
    options, substring = run.options, SubstringJudge()
    if options.judge == "substring":
        return [substring]
    asked = judge_named(options.judge, model=options.judge_model, labels=options.judge_labels)
    return [substring] if side != "harmful" and asked.name == LLAMA_GUARD.name else [substring, asked]


def losses(
    run: Prepared, labelled: Labelled, texts: Mapping[str, Sequence[ScoredText]], where: str = ""
) -> Mapping[str, LossResult]:
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
            engine=run.engine,
        )

    def compute() -> None:
        by_set = {
            name: run.timed("text", len(texts[name]), lambda: run.batched(lambda size: loss(name, size)))
            for name in texts
        }
        write_json(run.path / path, by_set | run.mark)

    about_it: dict[str, Any] = {"label": labelled.label, "record": dict(labelled.record), "texts": texts_sha256(texts)}
    inputs = run.inputs(*_direction_file(labelled), **about_it)
    n_texts = sum(map(len, texts.values()))
    about = f"CE loss of {n_texts} texts{run.estimate('text', n_texts)}"
    run.stage(_stage(where, f"loss_{labelled.label}"), inputs, [path], compute, about)
    return read_record(run.path / path, Losses)


def texts_sha256(texts: Mapping[str, Sequence[ScoredText]]) -> dict[str, str]:
    """Hash of the tokens of every text set: what identifies them among a stage's inputs."""
    return {name: sha256_json([[text.first, *text.token_ids] for text in scored]) for name, scored in texts.items()}


def loss_sets(options: RunOptions) -> tuple[PromptSet, PromptSet]:
    """The sampled plain texts and answered instructions for CE loss.

    Raises:
        UserError: there is no such set, or the instruction set has no answers.
    """
    plain, answered = load_prompts(options.text_set, limit=options.n_ce), load_prompts(options.instruction_set)
    if not any(prompt.output for prompt in answered.prompts):
        raise UserError(f"the instruction set {options.instruction_set} has no column of answers (such as output)")
    texts, pairs = (each.sample(min(options.n_ce, len(each)), options.seed) for each in (plain, answered))
    return texts, pairs


def loss_texts(
    run: Prepared, sets: tuple[PromptSet, PromptSet], *, own_answers: bool = True
) -> dict[str, list[ScoredText]]:
    """Plain text, answered instructions and the run's own answers, under the published keys where they apply.

    A set of which nothing can be scored, such as answers that are all empty, is left out and reported.

    Args:
        sets: from `loss_sets`.
        own_answers: with the plain model's answers to the harmless test prompts, which are written if need be.
    """
    plain, answered = sets
    pairs = [(prompt.instruction, prompt.output) for prompt in answered.prompts if prompt.output]
    texts = {
        plain.name: texts_to_score(run.chat, plain.instructions),
        answered.name: answers_to_score(run.chat, pairs),
    }
    if own_answers:
        if OWN_ANSWERS not in run.hashes:
            completions(run, "harmless", BASELINE)
        rows = read_record(run.path / OWN_ANSWERS, list[Completion])
        family = "alpaca" if run.splits["harmless"].train.name == "alpaca" else "harmless"
        own = [(row.prompt, row.response) for row in rows if row.response]
        texts[f"{family}_custom_completions"] = answers_to_score(run.chat, own)
    for name in [name for name, scored in texts.items() if not scored]:
        run.folder.report(f"CE loss on {name} is left out: nothing in it can be scored, all texts or answers are empty")
        del texts[name]
    return texts


def _direction_file(labelled: Labelled) -> list[str]:
    return [labelled.direction_file] if labelled.interventions else []


def _stage(where: str, name: str) -> str:
    return where.replace("/", "_") + name
