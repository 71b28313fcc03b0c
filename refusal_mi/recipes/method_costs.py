"""What removals do where nothing harmful is asked: over-refusal, tasks, and what they leave of each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..directions import Direction
from ..errors import UserError
from ..estimators.repind import dependence
from ..files import read_record, write_record
from ..harness.requests import Requests
from ..harness.tasks import CHOICES, TaskAnswers, answer_choices, answer_task, choices_inputs, task_inputs
from ..interventions import Ablate
from ..run.answers import SIDES
from ..run.capability import TaskEffect, VariantAnswers, effects_of
from ..run.folder import RunInputs
from ..run.methods import BesideRow, SetRefusals
from ..search.passes import Basis
from ..stats import Paired, Rate
from ..text.prompts import PromptSet
from ..values import Value
from .localize import Judged
from .method_stages import Comparison, folder_of
from .removing import Task
from .spans import random_span

PLAIN, RANDOM, OWN = "plain", "random", "held-out"
N_DEPENDENCE = 32
"""Harmful validation prompts that dependence is read on, at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Removed(Value):
    """A span, how much of it is removed, and a hash of it."""

    label: str
    basis: Basis | None
    """None: the plain model."""
    strength: float
    sha256: str | None

    @property
    def interventions(self) -> list[Ablate]:
        return [] if self.basis is None else [Ablate(self.basis, self.strength)]


@dataclass(frozen=True, eq=False, repr=False)
class _Tasks(Value):
    """`{label}/task-{name}.json`."""

    tasks: tuple[TaskAnswers, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Dependence(Value):
    table: tuple[tuple[float, ...], ...]


def random_controls(ranks: Sequence[int], width: int) -> list[Removed]:
    """A whole random subspace of every rank, the first of `Spans.controls`."""
    return [Removed(f"{RANDOM}:{k}", random_span(k, width, 0), 1.0, f"random {k} of {width}") for k in ranks]


def over_refusal_sets(run: RunInputs, given: Sequence[PromptSet]) -> list[PromptSet]:
    """The run's own held-out harmless prompts, and those of other sets that directions were not made or chosen by.

    Of a larger set as many as the run's own at most, drawn by the run's seed.

    Raises:
        UserError: nothing is left of a set, or two have one name.
    """
    own = PromptSet.from_list(run.prompts("harmless"), OWN)
    used = [run.record.side(side).kept_set(part) for side in SIDES for part in ("train", "val")]
    found = [own]
    for each in given:
        left = each.without(*used)
        if not len(left):
            raise UserError(f"--over-refusal {each.name}: the run found its direction with all of these prompts")
        found.append(left.sample(min(len(left), run.max_prompts), run.options.seed))
    if len({each.name for each in found}) < len(found):
        raise UserError(f"--over-refusal takes sets of different names, not {', '.join(each.name for each in found)}")
    return found


def beside(
    work: Comparison, removed: Sequence[Removed], sets: Sequence[PromptSet], tasks: Sequence[str]
) -> tuple[BesideRow, ...]:
    """Over-refusal and tasks under every removal, each beside the first of them, the plain model."""
    refused = _refused(work, removed, sets)
    answers = [_answers(work, each, tasks) for each in removed]
    rows = []
    for each, of_sets, of_tasks in zip(removed, refused, answers, strict=True):
        shares = [
            SetRefusals(
                prompts.name,
                Rate.of(found.refused),
                Rate.of(found.degenerate),
                Paired.of(plain.refused, found.refused).describe(),
            )
            for prompts, found, plain in zip(sets, of_sets, refused[0], strict=True)
        ]
        effects: tuple[TaskEffect, ...] = effects_of(answers[0], of_tasks) if tasks else ()
        rows.append(BesideRow(each.label, each.strength, tuple(shares), effects))
    return tuple(rows)


def dependences(work: Comparison, directions: Mapping[str, Direction]) -> tuple[tuple[float, ...], ...]:
    """How much ablating each of these directions changes the cosines of the stream with each other one."""
    where, run = "dependence.json", work.run
    prompts = run.prompts("harmful", "val")[:N_DEPENDENCE]

    def compute() -> None:
        table = dependence(run.model, run.chat, list(directions.values()), prompts, batch_size=run.batch_size)
        write_record(work.folder.path / where, _Dependence(tuple(map(tuple, table.tolist()))))

    inputs = work.inputs | {"directions": {label: each.unit.tolist() for label, each in directions.items()}}
    inputs |= {"n_prompts": len(prompts)}
    about = f"{len(directions)} directions, {len(prompts)} validation prompts"
    work.folder.stage("dependence", inputs, [where], compute, about=about)
    return read_record(work.folder.path / where, _Dependence).table


def _inputs(work: Comparison, removed: Removed) -> dict[str, Any]:
    strength = {"basis": removed.sha256, "strength": removed.strength}
    return work.inputs | strength


def _refused(work: Comparison, removed: Sequence[Removed], sets: Sequence[PromptSet]) -> list[list[Judged]]:
    """Judged answers to every set under every removal, of one removal after the other."""
    pieces = []
    for each in removed:
        for index, prompts in enumerate(sets):
            inputs = _inputs(work, each) | {"set": prompts.sha256, "n": work.max_new_tokens}
            about = f"{len(prompts)} prompts of {prompts.name} at strength {each.strength:.3g}"
            task = Task("beside", f"{each.label}, {prompts.name}", (prompts.instructions, each.basis, each.strength))
            pieces.append(work.piece(each.label, f"over-refusal-{index}.json", inputs, about, task))
    work.held_out.run(pieces)
    found = iter(read_record(work.folder.path / piece.outputs[0], Judged) for piece in pieces)
    return [[next(found) for _ in sets] for _ in removed]


def _answers(work: Comparison, removed: Removed, tasks: Sequence[str]) -> VariantAnswers:
    found: list[TaskAnswers] = []
    run = work.run
    for task in tasks:
        name = f"task-{folder_of(task)}"
        where = f"{folder_of(removed.label)}/{name}.json"

        def compute(task: str = task, where: str = where) -> None:
            requests = Requests(run.model, None, removed.interventions, work.batch_size)
            rows = (answer_choices(requests),) if task == CHOICES else answer_task(requests, task)
            write_record(work.folder.path / where, _Tasks(rows))

        inputs = _inputs(work, removed) | (choices_inputs() if task == CHOICES else task_inputs(task, None))
        about = f"at strength {removed.strength:.3g}"
        work.folder.stage(f"{folder_of(removed.label)}-{name}", inputs, [where], compute, about=about)
        found += read_record(work.folder.path / where, _Tasks).tasks
    about = "none" if removed.basis is None else f"{removed.label} at {removed.strength:.3g}"
    return VariantAnswers(removed.label, work.model, about, tuple(found))
