"""Tasks of lm-evaluation-harness, the bundled ones among them, and what a model answered to each of their items."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import NoSuchName, UserError, cause
from ..files import read_json, sha256_file
from ..values import Value
from .requests import Requests, as_harness_model, harness_version

DATA = Path(__file__).parents[1] / "data"
CHOICES, NUMBERS, TEXTS = "everyday", "sums", "plain_text"
BUNDLED = {name: DATA / f"{name}.json" for name in (CHOICES, NUMBERS, TEXTS)}
SEED = 1234
"""Of the examples that a task draws for its prompts, of numpy and of torch: the harness' own default."""
PYTHON_SEED = 0
"""Of Python's random numbers, with which a task can draw its items: the harness' own default."""
VERSION = 1.0
"""Of the bundled questions with choices."""
READING = 2
"""Of answers: what an older one kept is computed again."""
NO_ANSWER = "[invalid]"
"""What the harness' filters make of an answer in which they find none, such as no number."""
PREFERRED = ("acc_norm", "acc", "exact_match", "nats per byte")
"""The metric of a task that has several: the first of these, else its own first."""
PER_UNIT = {"word_perplexity": "nats per word", "byte_perplexity": "nats per byte"}
QUESTION = "Question: {}\nAnswer:"
SHOTS = (
    "Question: Kim has 3 bags with 5 shells each. How many shells does she have?\n"
    "Answer: 3 bags of 5 shells are 3 * 5 = 15 shells. The answer is 15.\n\n"
    "Question: Jo had 11 coins and lost 4. How many coins are left?\nAnswer: 11 - 4 = 7 coins are left. "
    "The answer is 7.\n\n"
)


@dataclass(frozen=True, eq=False, repr=False)
class Item(Value):
    """What a model did with one item of a task."""

    task: str
    """Of a group, the task that the item is in."""
    doc: int
    prompt: str
    """The beginning of the prompt's SHA-256: the same prompt, the same number."""
    answer: str
    """The index of the choice that the metric counts (acc_norm: by length), or what the filter found in the text."""
    is_answered: bool
    """False where the filter found nothing, such as no number."""
    values: Mapping[str, float]
    """Metric -> value."""
    nats: tuple[float, ...] = ()
    """ln p of every choice."""


@dataclass(frozen=True, eq=False, repr=False)
class TaskAnswers(Value):
    """A task's items under one intervention, read by one filter."""

    task: str
    """As it was asked for: a task or a group."""
    filter: str
    """The name of what finds the answer in a text; "none" for choices."""
    metric: str
    is_choice: bool
    n_shots: int
    """Solved examples in every prompt, at most."""
    n_cut: int
    """Requests whose context was too long for the model and lost its beginning."""
    versions: Mapping[str, str]
    """Task -> its version in the harness."""
    items: tuple[Item, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The metric's, one for each item."""
        return tuple(item.values[self.metric] for item in self.items)

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether each value is 0 or 1."""
        return set(self.values) <= {0.0, 1.0}

    @property
    def chance(self) -> float | None:
        """The share that is right by guessing, where items have choices that are right or wrong."""
        if not self.is_choice or not self.is_right_or_wrong:
            return None
        return sum(1 / len(item.nats) for item in self.items) / len(self.items)


def task_inputs(task: str, include_path: Path | None) -> dict[str, Any]:
    """What a task's answers depend on beside the model, as far as it lies here, as JSON values."""
    bundled = BUNDLED.get(task) if include_path is None else None
    files = {} if bundled is None else {bundled.name: sha256_file(bundled)}
    if include_path is not None:  # less what Python writes there itself when it loads a task
        own = [each for each in sorted(include_path.rglob("*")) if each.is_file() and "__pycache__" not in each.parts]
        files = {each.relative_to(include_path).as_posix(): sha256_file(each) for each in own}
    return {"task": task, "harness": harness_version(), "task_files": files, "reading": READING}


def choices_inputs() -> dict[str, Any]:
    """The same of `answer_choices`, which needs no harness."""
    files = {BUNDLED[CHOICES].name: sha256_file(BUNDLED[CHOICES])}
    asked = {"version": VERSION, "question": QUESTION}
    return {"task": CHOICES, "task_files": files, "reading": READING, **asked}


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> None:
    """Make sure that every task exists, before a model is loaded.

    Raises:
        UserError: the harness is not installed, one of the names is none, or the folder holds no tasks.
    """
    harness_version()
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"--tasks takes names, each once, such as {','.join(BUNDLED)}, not {','.join(tasks)!r}")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path takes a folder with tasks (.yaml), and {include_path} is none")
    for task in tasks:
        if task not in BUNDLED and task not in _manager_of(task, include_path).all_tasks:
            near = get_close_matches(task, [*BUNDLED, *_manager(include_path).all_tasks], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise NoSuchName(
                f"lm-evaluation-harness {harness_version()} has no task {task!r}{hint}; bundled are "
                f"{', '.join(BUNDLED)}, and --include-path names a folder with tasks of your own"
            )


def answer_task(
    requests: Requests,
    task: str,
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
) -> tuple[TaskAnswers, ...]:
    """What a model answers to a task or to all tasks of a group: one record for every filter of answers.

    Args:
        limit: only the first items of each task.
        include_path: a folder with tasks of one's own, in the harness' YAML, which can run Python.

    Raises:
        UserError: the task or its data cannot be had, or it asks for what a language model alone cannot do.
    """
    check_tasks([task], include_path)
    n_cut_before = requests.n_cut
    with _quiet(), _seeded():
        loaded = _loaded(task, include_path)
        samples = _evaluated(requests, task, loaded, limit, apply_chat_template)
    filters = dict.fromkeys(sample["filter"] for rows in samples.values() for sample in rows)
    configs = {name: each.config for name, each in loaded["tasks"].items()}
    found = []
    for filter_name in filters:
        rows = [(name, each) for name, some in samples.items() for each in some if each["filter"] == filter_name]
        rows.sort(key=_place)
        metric = _metric(task, [_values(row) for _, row in rows])
        items = tuple(_item(name, row, loaded["tasks"][name], metric) for name, row in rows)
        found.append(
            TaskAnswers(
                task,
                filter_name,
                metric,
                all(each.output_type == "multiple_choice" for each in configs.values()),
                max(each.num_fewshot or 0 for each in configs.values()),
                requests.n_cut - n_cut_before,
                {name: str((each.metadata or {}).get("version", "unknown")) for name, each in configs.items()},
                items,
            )
        )
    return tuple(found)


def answer_choices(requests: Requests, limit: int | None = None) -> TaskAnswers:
    """What a model answers to the bundled questions with choices: as `answer_task`, without the harness.

    Args:
        limit: only the first items.
    """
    rows, n_cut_before = read_json(BUNDLED[CHOICES])[:limit], requests.n_cut
    contexts = [QUESTION.format(row["question"]) for row in rows]
    pairs = [(text, f" {choice}") for text, row in zip(contexts, rows, strict=True) for choice in row["choices"]]
    each_nats = iter(each.nats for each in requests.log_likelihoods(pairs))
    items = []
    for doc, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        nats = tuple(next(each_nats) for _ in row["choices"])
        by_length = [ln_p / len(choice) for ln_p, choice in zip(nats, row["choices"], strict=True)]
        chosen = {"acc": _largest(nats), "acc_norm": _largest(by_length)}
        values = {metric: float(index == row["answer"]) for metric, index in chosen.items()}
        prompt = sha256(context.encode()).hexdigest()[:16]
        items.append(Item(CHOICES, doc, prompt, str(chosen["acc_norm"]), True, values, nats))
    n_cut = requests.n_cut - n_cut_before
    return TaskAnswers(CHOICES, "none", "acc_norm", True, 0, n_cut, {CHOICES: str(VERSION)}, tuple(items))


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


@cache
def _manager(include_path: Path | None, include_defaults: bool = True) -> Any:
    """The harness' index of tasks; its own are thousands of files, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        own = None if include_path is None else str(include_path)
        return TaskManager(include_path=own, include_defaults=include_defaults)


def _manager_of(task: str, include_path: Path | None) -> Any:
    """The index that has a task: that of the folder alone, if it is there."""
    own = _manager(include_path, include_defaults=False)
    return own if task in own.all_tasks else _manager(include_path)


def _loaded(task: str, include_path: Path | None) -> Any:
    try:
        if task in BUNDLED:
            loaded = _manager(None, include_defaults=False).load([_config(task)])
        else:
            loaded = _manager_of(task, include_path).load([task])
    except Exception as error:  # foreign code: the hub, the data sets, a task's own Python
        raise UserError(
            f"the task {task} cannot be loaded ({type(error).__name__}: {cause(error)}); without a network use the "
            f"bundled {', '.join(BUNDLED)}, or tasks of your own with --include-path"
        ) from error
    for each in loaded["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=SEED)
    return loaded


def _evaluated(
    requests: Requests, task: str, loaded: Any, limit: int | None, apply_chat_template: bool
) -> Mapping[str, Sequence[Any]]:
    from lm_eval.evaluator import evaluate

    try:
        done = evaluate(
            lm=as_harness_model(requests),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # foreign code: what a task does to its items and answers
        raise UserError(
            f"the task {task} failed in lm-evaluation-harness: {type(error).__name__}: {cause(error)}"
        ) from error
    samples: Mapping[str, Sequence[Any]] = done["samples"]
    return samples


def _item(name: str, sample: Mapping[str, Any], task: Any, metric: str) -> Item:
    found, answer, nats = sample["filtered_resps"], "", tuple[float, ...]()
    is_answered = True
    if task.config.output_type == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        each_nats = [float(each[0]) for each in found]
        nats, scores = tuple(each_nats[: len(choices)]), each_nats[: len(choices)]
        if metric in ("acc_norm", "acc_bytes"):
            lengths = [len(each) if metric == "acc_norm" else len(each.encode()) for each in choices]
            scores = [ln_p / length if length else -math.inf for ln_p, length in zip(scores, lengths, strict=True)]
        elif metric == "acc_mutual_info":
            scores = [ln_p - alone for ln_p, alone in zip(scores, each_nats[len(choices) :], strict=True)]
        answer = str(_largest(scores))
    elif task.config.output_type == "generate_until":
        answer = " | ".join(map(str, found))
        has_sign = any(map(str.isalnum, answer))
        is_answered = answer != NO_ANSWER and (has_sign or not _finds_numbers(task, sample["filter"]))
    elif task.config.output_type == "loglikelihood":
        nats = tuple(float(each[0]) for each in found)
    return Item(name, int(sample["doc_id"]), sample["prompt_hash"][:16], answer, is_answered, _values(sample), nats)


def _finds_numbers(task: Any, filter_name: str) -> bool:
    """Whether a filter looks for digits, as those of GSM8K, which also find "..."."""
    steps = [step for each in task.config.filter_list or () if each["name"] == filter_name for step in each["filter"]]
    patterns = [str(step.get("regex_pattern", "0-9")) for step in steps if step["function"] == "regex"]
    return any("0-9" in each or "\\d" in each for each in patterns)


def _values(sample: Mapping[str, Any]) -> dict[str, float]:
    return dict(_numbers({metric: sample[metric] for metric in sample["metrics"]}))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics that are one number for an item; of a text's likelihood that of a word or byte."""
    for name, value in values.items():
        if isinstance(value, tuple | list):
            if name in PER_UNIT and len(value) == 2 and value[1]:
                yield PER_UNIT[name], -float(value[0]) / float(value[1])
        elif isinstance(value, bool | int | float) or hasattr(value, "__float__"):
            yield "nats" if name == "perplexity" else name, float(value)


def _metric(task: str, values: Sequence[Mapping[str, float]]) -> str:
    shared = [name for name in (values[0] if values else ()) if all(name in each for each in values)]
    if not shared:
        raise UserError(f"the items of {task} have no metric in common that is one number: name its tasks one by one")
    return next((name for name in PREFERRED if name in shared), shared[0])


def _place(row: tuple[str, Mapping[str, Any]]) -> tuple[str, int]:
    return row[0], row[1]["doc_id"]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its bars and advice: this package says itself how far it is."""
    import lm_eval.api.task as tasks

    logger, before, bar = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, tasks.tqdm
    logger.setLevel(logging.ERROR)
    tasks.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        tasks.tqdm = bar
        logger.setLevel(before)


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers begin as in the harness' own evaluation, so that a task draws the same items for every model."""
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)
        torch.default_generator.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def _config(task: str) -> dict[str, Any]:
    """A bundled set as a task of the harness."""
    shared = {"task": task, "custom_dataset": _rows_of(BUNDLED[task]), "test_split": "test", "num_fewshot": 0}
    question = QUESTION.format("{{question}}")
    if task == CHOICES:
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_text": question,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": VERSION},
        }
    if task == TEXTS:
        return shared | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
            "metadata": {"version": 1.0},
        }
    numbers = [
        {"function": "regex", "group_select": -1, "regex_pattern": r"(-?\$?[0-9][$0-9.,]*)"},
        {"function": "take_first"},
    ]
    ignored = [",", "\\$", "\\.$"]
    return shared | {
        "output_type": "generate_until",
        "doc_to_text": SHOTS + question,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "last number", "filter": numbers}],
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": ignored}],
        "metadata": {"version": 1.0},
    }


def _rows_of(path: Path) -> Callable[..., dict[str, Any]]:
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(read_json(path))}

    return load
