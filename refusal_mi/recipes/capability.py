"""What an intervention costs in tasks: the plain, the hooked and the exported model asked the same questions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_record, sha256_json, write_record
from ..harness.requests import Requests, harness_version
from ..harness.tasks import CHOICES, NUMBERS, TaskAnswers, answer_task, check_tasks, task_inputs
from ..interventions import Ablate, Intervention
from ..model.points import HookedModel
from ..model.provenance import describe_model, versions
from ..run.capability import FILE, CapabilityResult, VariantAnswers, effects_of
from ..run.folder import RunInputs
from ..run.record import RUN, RunInfo
from ..run.stages import RunFolder
from ..text.chat import ChatFormat
from ..values import Value

TASKS, N_RANDOM = (CHOICES, NUMBERS), 1
PLAIN, ABLATED, EXPORTED, NOTHING = "plain", "ablated", "exported", "none"


@dataclass(frozen=True)
class Variant:
    """A model, and what is done to it."""

    label: str
    model: HookedModel
    source: str
    """Directory or hub id of the model."""
    chat: ChatFormat | None
    """For questions through the chat template; None where the model has none."""
    interventions: tuple[Intervention, ...] = ()
    about: str = NOTHING
    """The interventions in words: where these are others, the answers are computed again."""

    def __post_init__(self) -> None:
        if bool(self.interventions) == (self.about == NOTHING):
            raise ValueError("a variant says its interventions in words (about), and has none where it says none")


@dataclass(frozen=True, eq=False, repr=False)
class _Answers(Value):
    """`{variant}/{task}.json`."""

    tasks: tuple[TaskAnswers, ...]


def variants_of_run(run: RunInputs, source: str, n_random: int = N_RANDOM) -> list[Variant]:
    """The plain model of a run, with its direction ablated, and with random ones, which should change little.

    Raises:
        UserError: the run chose no direction, or is of other weights than the model has.
    """
    here, there = describe_model(run.model, source), read_record(run.path / RUN, RunInfo).model
    if None not in (here.fingerprint, there.fingerprint) and here.fingerprint != there.fingerprint:
        raise UserError(f"{run.path} was computed from other weights: {source} has changed since; make it again")
    direction, chat = run.direction, run.chat
    randoms = [direction.random_like(seed) for seed in range(n_random)]
    named = {ABLATED: direction, **{f"random {seed}": each for seed, each in enumerate(randoms)}}
    hooked = [
        Variant(label, run.model, source, chat, (Ablate(each),), f"ablate {_hash(each)}")
        for label, each in named.items()
    ]
    return [Variant(PLAIN, run.model, source, chat), *hooked]


def measure_capability(
    variants: Iterable[Variant],
    folder: RunFolder,
    *,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    batch_size: int | None = None,
) -> CapabilityResult:
    """Ask every variant the items of every task, and compare each with the first, item by item.

    Every task and variant is a stage of the folder, so that what was killed goes on where it was.

    Args:
        variants: the plain model first; they are taken one by one, so that a later one can be loaded when an earlier
            is done.
        tasks: names of lm-evaluation-harness, or of the bundled sets.
        limit: only the first items of each task.
        include_path: a folder with tasks of one's own (YAML of the harness, which can run Python).
        apply_chat_template: whether questions go through the chat template; the harness' default, and that of
            published numbers, is that they do not.

    Raises:
        UserError: the harness is not installed, or a task cannot be had.
    """
    check_tasks(tasks, include_path)
    answered: list[VariantAnswers] = []
    chat = None
    for variant in variants:
        if apply_chat_template and variant.chat is None:
            raise UserError(f"{variant.source} has no chat template: leave out --apply-chat-template")
        model = describe_model(variant.model, variant.source)
        if not answered:
            folder.sign(model)
            chat = variant.chat.record() if apply_chat_template and variant.chat is not None else None
        shared = {"limit": limit, "chat": chat, "versions": versions(), "model": model, "does": variant.about}
        found: list[TaskAnswers] = []
        for task in tasks:
            inputs = {**shared, **task_inputs(task, include_path)}
            where = f"{_name(variant.label)}/{_name(task)}.json"

            def compute(task: str = task, variant: Variant = variant, where: str = where) -> None:
                requests = Requests(
                    variant.model, variant.chat if apply_chat_template else None, variant.interventions, batch_size
                )
                rows = answer_task(
                    requests,
                    task,
                    limit=limit,
                    include_path=include_path,
                    apply_chat_template=apply_chat_template,
                )
                write_record(folder.path / where, _Answers(rows))

            folder.stage(f"{_name(variant.label)}-{_name(task)}", inputs, [where], compute)
            found += read_record(folder.path / where, _Answers).tasks
        answered.append(VariantAnswers(variant.label, model, variant.about, tuple(found)))
    result = compared(answered, tasks, limit, chat)
    write_record(folder.path / FILE, result)
    return result


def compared(
    answered: Sequence[VariantAnswers], tasks: Sequence[str], limit: int | None = None, chat: Any = None
) -> CapabilityResult:
    """Every variant against the first, and an exported model against the hooked one."""
    labelled: Mapping[str, VariantAnswers] = {each.label: each for each in answered}
    both = [labelled[label] for label in (ABLATED, EXPORTED) if label in labelled]
    return CapabilityResult(
        tuple(tasks),
        limit,
        chat,
        {**versions(), "lm_eval": harness_version()},
        tuple(answered),
        tuple(effect for each in answered[1:] for effect in effects_of(answered[0], each)),
        effects_of(*both) if len(both) == 2 else (),
    )


def _hash(direction: Any) -> str:
    return f"direction {sha256_json(direction.vector.double().tolist())[:16]}"


def _name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
