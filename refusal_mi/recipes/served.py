"""The held-out prompts of a run, answered by a server: the same files as the run's own answers, under a label."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..endpoint import Failed, NotAnAnswer, Pause, Refused, as_they_come
from ..errors import UserError
from ..files import as_json, read_record, sha256_json, write_json, write_record, write_text
from ..judges.substring import SubstringJudge
from ..run.answers import SIDES, Completion, Side
from ..run.folder import RunRecord
from ..run.served import FOLDER, Api, ServedRecord, ServedSet, asked_sha256, check_label, record_file
from ..run.stages import RunFolder
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet
from .effects import evaluate
from .server import PATHS, Answer, Ended, Server

MOST_IN_A_ROW = 5
"""Prompts whose tries all fail, one after the other, before the server is given up; refusals while none is answered."""
_ABOUT_ALL = frozenset({401, 402, 403, 404, 405})
"""HTTP statuses that are about no single prompt, beside redirects."""
_WHOLE = frozenset({"stop", "length", "eos_token", "stop_sequence"})
"""How an answer ends that is all the model's own; some servers name its last token."""
_OF_A_MODEL = ("id", "root", "parent", "owned_by")
"""What a list of models says of one that tells it from another."""


class Unanswered(Exception):
    """Some prompts failed at every try: prompt -> the problem."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__(f"{len(problems)} prompts")
        self.problems = dict(problems)


class _Stopped(Exception):
    """A server that was given up; the message says why."""


def complete(
    folder: RunFolder,
    server: Server,
    *,
    label: str = "served",
    max_new_tokens: int | None = None,
    chat: ChatFormat | None = None,
) -> ServedRecord:
    """Greedy answers of a server to a run's held-out prompts: `completions/{set}_{label}_*.json`.

    And who gave them: `served/{label}.json`. Answers are kept as they come, so that what was killed goes on; a prompt
    that fails at every try is left out and named, and is asked again the next time. Other options, or another model,
    ask everything again.

    Args:
        folder: of a run; its system message and what its template is given go to the server as well.
        label: the name of these answers beside the run's own.
        max_new_tokens: of every answer; None is as many as the run's.
        chat: the run's chat format, which renders prompts for `api="completions"`.

    Raises:
        UserError: there is no run, the server cannot be reached or refuses, or what was kept is another model's.
    """
    check_label(label)
    run = RunRecord.load(folder.path)
    sets = _prompt_sets(run)
    tokens = run.run.options.max_new_tokens if max_new_tokens is None else max_new_tokens
    listed = server.listed()
    model = server.named(listed)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "frequency_penalty": 0}
    if server.api == "chat" and run.run.chat.template_kwargs:
        options["chat_template_kwargs"] = dict(run.run.chat.template_kwargs)
    entry = next((each for each in listed or () if each["id"] == model), {})
    about = None if listed is None else {name: entry[name] for name in _OF_A_MODEL if name in entry}
    works: dict[Side, _Work] = {}
    for side, prompts in sets.items():
        asking = _Asking(server, model, listed, options, _sent(run, server.api, prompts, chat), _prefix(run))
        inputs = {"endpoint": server.base, "model": model, **asking.inputs, "prompts": prompts.sha256}
        works[side] = _Work(folder, label, side, prompts, asking, inputs, about)
    if folder.fresh or not all(work.is_done for work in works.values()):
        (folder.path / record_file(label)).unlink(missing_ok=True)  # until all of it is one model's again
        for work in works.values():
            work.clear()
    try:
        for work in works.values():
            work.go(run, is_first=not any(each.n_new for each in works.values()))
        _check_answered(list(works.values()))
    except _Stopped as error:
        n_kept = sum(work.n_kept for work in works.values())
        stay = f"; {n_kept} answers are kept, the same command without --fresh goes on" if n_kept else ""
        raise UserError(f"{error}{stay}") from None
    found: dict[Side, ServedSet] = {}
    names: dict[str, None] = {}
    for side, work in works.items():
        name, rows = work.prompts.name, read_record(folder.path / work.file, list[_Row])
        completions = [Completion(row.category, row.prompt, row.response) for row in rows]
        judged = evaluate(completions, SubstringJudge(), quick=run.run.quick)
        write_json(folder.path / work.judged_file, judged)
        same = _same_text(run, name, rows) if tokens == run.run.options.max_new_tokens else {}
        truncated = sum(row.finish_reason == "length" for row in rows)
        found[side] = ServedSet(name, len(rows), truncated, work.problems, same)
        names |= {row.model: None for row in rows if row.model is not None}
    asked = asked_sha256(run.run.options.system, run.run.chat)
    record = ServedRecord(label, server.base, model, tuple(names), server.api, options, found, asked)
    write_record(folder.path / record_file(label), record)
    return record


@dataclass
class _Work:
    """The answers to one set of prompts: what is there, and what is to be asked for."""

    folder: RunFolder
    label: str
    side: Side
    prompts: PromptSet
    asking: "_Asking"
    inputs: Mapping[str, Any]
    """What the answers depend on beside the server's listing."""
    listed: Mapping[str, Any] | None
    """What the server lists of its model; None where it does not say."""
    problems: dict[str, str] = field(default_factory=dict)
    """Of prompts that were not answered."""
    n_new: int = 0
    """Answers that came now."""
    fault: Refused | Failed | Ended | None = None
    """Why the server was given up, before every prompt was asked for."""

    def __post_init__(self) -> None:
        if self.folder.fresh:
            return
        kept = _Kept(self.kept_file, self.inputs, self.listed)
        before = dict(self.folder.before(self.stage))
        if before and None in (self.listed, before.pop("listed", None)) and before == as_json(self.inputs):
            self.listed = self.folder.before(self.stage)["listed"]
        elif kept.answers or kept.failed:
            self.listed = kept.listed

    @property
    def stage(self) -> str:
        return f"completions_{self.prompts.name}_{self.label}"

    @property
    def file(self) -> str:
        return f"completions/{self.prompts.name}_{self.label}_completions.json"

    @property
    def judged_file(self) -> str:
        return f"completions/{self.prompts.name}_{self.label}_evaluations.json"

    @property
    def kept_file(self) -> Path:
        return self.folder.path / FOLDER / f"{self.label}-{self.side}.part"

    @property
    def is_done(self) -> bool:
        return self.folder.is_done(self.stage, {**self.inputs, "listed": self.listed}, [self.file])

    @property
    def n_kept(self) -> int:
        """Answers that need not be asked for again."""
        return len(self.prompts) if self.is_done else len(_Kept(self.kept_file, self.inputs, self.listed).answers)

    def clear(self) -> None:
        """Take away what is not of this model, so that no file of before stands beside new ones."""
        (self.folder.path / self.judged_file).unlink(missing_ok=True)
        if self.folder.fresh:
            self.folder.forget(self.stage)
            self.kept_file.unlink(missing_ok=True)
        if self.folder.fresh or not self.is_done:
            (self.folder.path / self.file).unlink(missing_ok=True)

    def go(self, run: RunRecord, *, is_first: bool) -> None:
        """Ask for what is missing.

        Args:
            is_first: nothing has come of this server yet: what is about no single prompt ends it.
        """
        about = (
            f"{len(self.prompts)} answers of up to {self.asking.options['max_tokens']} tokens by {self.asking.model}"
        )
        inputs = {**self.inputs, "listed": self.listed}
        try:
            self.folder.stage(self.stage, inputs, [self.file], lambda: self._compute(run, is_first), about=about)
            self.kept_file.unlink(missing_ok=True)
        except Unanswered as error:
            self.problems = error.problems

    def _compute(self, run: RunRecord, is_first: bool) -> None:
        kept = _Kept(self.kept_file, self.inputs, self.listed)
        kept.rewrite()
        n_before = len(kept.answers)
        problems, self.fault = self.asking.answers(self.prompts, kept, is_first)
        self.n_new = len(kept.answers) - n_before
        rows = [
            {"category": prompt.category, "prompt": prompt.instruction, "response": answer.text}
            | {"finish_reason": answer.finish_reason, "model": answer.model}
            | ({"quick": True} if run.run.quick else {})
            for index, prompt in enumerate(self.prompts.prompts)
            if (answer := kept.answers.get(index)) is not None
        ]
        if rows:
            write_json(self.folder.path / self.file, rows)
        if problems:
            raise Unanswered({self.prompts[index]: problem for index, problem in problems.items()})


def _check_answered(works: Sequence[_Work]) -> None:
    """Tell a server that was given up from prompts that fail: nothing came of it now, or nothing ever of one set."""
    is_silent = not any(work.n_new for work in works)
    for work in works:
        is_empty = len(work.problems) == len(work.prompts)
        if work.fault is not None and (is_empty or is_silent):
            raise _Stopped(work.asking.fault(work.fault))


@dataclass(frozen=True)
class _Row:
    """Of a file of completions."""

    category: str | None
    prompt: str
    response: str
    finish_reason: str | None = None
    model: str | None = None


class _Kept:
    """Answers to one set that came so far: a file with a line for each, behind a line of what they depend on."""

    def __init__(self, path: Path, inputs: Mapping[str, Any], listed: Mapping[str, Any] | None) -> None:
        self.path, self.key, self.listed = path, sha256_json(inputs), listed
        self.answers: dict[int, Answer] = {}
        self.failed: dict[int, None] = {}
        """Prompts that failed before; they are asked last."""
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):  # damaged, or a killed line
            first = json.loads(lines[0])
            if first["key"] != self.key or (None not in (listed, first["listed"]) and listed != first["listed"]):
                return
            self.listed = first["listed"] if listed is None else listed
            for line in lines[1:]:
                held = json.loads(line)
                index = int(held.pop("index"))
                if held.pop("failed", False):
                    self.failed[index] = None
                else:
                    self._take(index, Answer(**held))

    def rewrite(self) -> None:
        """Without lines that cannot be read, and without other answers."""
        lines = [json.dumps({"key": self.key, "listed": self.listed}) + "\n"]
        lines += [self._line(*each) for each in self.answers.items()]
        write_text(self.path, "".join([*lines, *(self._failed_line(index) for index in self.failed)]))

    def add(self, index: int, answer: Answer) -> None:
        self._take(index, answer)
        self._append(self._line(index, answer))

    def add_failed(self, index: int) -> None:
        if index not in self.failed:
            self.failed[index] = None
            self._append(self._failed_line(index))

    def _take(self, index: int, answer: Answer) -> None:
        if not isinstance(answer.text, str):
            raise TypeError("an answer is text")
        self.answers[index] = answer
        self.failed.pop(index, None)

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    @staticmethod
    def _line(index: int, answer: Answer) -> str:
        return json.dumps({"index": index, **asdict(answer)}) + "\n"

    @staticmethod
    def _failed_line(index: int) -> str:
        return json.dumps({"index": index, "failed": True}) + "\n"


@dataclass(frozen=True)
class _Asking:
    """One set of prompts, as it is sent."""

    server: Server
    model: str
    listed: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]
    sent: Sequence[Any]
    """Of every prompt, the messages or the text."""
    prefix: str
    """What the run's answers begin behind; not part of them."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the answers depend on beside server and model."""
        return {"api": self.server.api, "options": dict(self.options), "sent": sha256_json(list(self.sent))}

    def answers(
        self, prompts: PromptSet, kept: _Kept, is_first: bool
    ) -> tuple[dict[int, str], Refused | Failed | Ended | None]:
        """Ask for what is missing: what went wrong with prompts, and why the server was given up if it was."""
        new = [index for index in range(len(prompts)) if index not in kept.answers and index not in kept.failed]
        missing = [*new, *kept.failed]
        problems: dict[int, str] = {}
        n_in_a_row, last_success = 0, 0.0
        fault: Refused | Failed | Ended | None = None
        about = f"{prompts.name}, asking {urlsplit(self.server.base).hostname}"
        come = as_they_come(missing, self._one, n_workers=self.server.n_workers, description=about)
        with closing(come):
            for index, (start, end, outcome) in come:
                if isinstance(outcome, Answer):
                    self._check_model(outcome, kept)
                    kept.add(index, outcome)
                    n_in_a_row, last_success = 0, max(end, last_success)
                    continue
                kept.add_failed(index)
                problems[index] = str(outcome)
                if _is_about_all(outcome, is_answered=bool(kept.answers) or not is_first):
                    raise _Stopped(self.fault(outcome))
                is_counted = isinstance(outcome, Failed) or not kept.answers
                n_in_a_row += is_counted and start >= last_success
                if n_in_a_row >= MOST_IN_A_ROW or (len(problems) == len(missing) and not kept.answers):
                    fault = outcome
                    break
        if fault is not None and not kept.answers and is_first:
            raise _Stopped(self.fault(fault))
        for index in missing:
            if index not in kept.answers:
                problems.setdefault(index, f"not asked any more after {MOST_IN_A_ROW} prompts failed in a row")
        is_retry = bool(kept.answers) and not new
        if kept.answers and not any(answer.text for answer in kept.answers.values()):
            kept.path.unlink()
            ends = ", ".join(sorted({str(answer.finish_reason) for answer in kept.answers.values()}))
            raise UserError(
                f"the server at {self.server.base} answers all {len(kept.answers)} prompts of {prompts.name} with "
                f"nothing (finish reason {ends}): does {self.model!r} have the chat template that its weights expect?"
            )
        return problems, None if is_retry else fault

    def fault(self, problem: Refused | Failed | Ended) -> str:
        """What is wrong with the server, in a line."""
        return self.server.fault(problem, self.model, self.listed)

    def _one(self, index: int, pause: Pause) -> tuple[float, float, Answer | Refused | Failed | Ended]:
        """When a prompt was first asked and when that ended, and the answer to it, or why there is none."""
        asked = {"messages" if self.server.api == "chat" else "prompt": self.sent[index]}
        body = {"model": self.model, **asked, **self.options}
        start = time.monotonic()
        outcome: Answer | Refused | Failed | Ended
        try:
            outcome = self.server.endpoint.ask(PATHS[self.server.api], body, self._read, pause)
        except (Refused, Failed, Ended) as error:
            outcome = error
        return start, time.monotonic(), outcome

    def _read(self, held: Any) -> Answer:
        try:
            choice = held["choices"][0]
            text = choice["message"]["content"] if self.server.api == "chat" else choice["text"]
            reason, model = choice.get("finish_reason"), held.get("model")
        except (LookupError, TypeError, AttributeError):
            raise NotAnAnswer(f"an answer that is no {self.server.api} completion") from None
        if isinstance(reason, str) and reason not in _WHOLE:
            raise Ended(reason)
        if not isinstance(text, str):
            raise NotAnAnswer(f"an answer without text (finish reason {reason}; is it all reasoning?)")
        text = text.strip().removeprefix(self.prefix).lstrip()
        if reason == "length":
            text = text.rstrip("�").rstrip()  # half a character
        return Answer(text, _text_or_none(reason), _text_or_none(model))

    def _check_model(self, answer: Answer, kept: _Kept) -> None:
        others = [each.model for each in kept.answers.values() if each.model != answer.model]
        if others:
            raise UserError(
                f"the server at {self.server.base} now answers as {answer.model}, and the {len(kept.answers)} answers "
                f"that came before are of {others[0]}: --fresh asks for all of them again"
            )


def _is_about_all(problem: Refused | Failed | Ended, *, is_answered: bool) -> bool:
    """Whether it is about no single prompt; 403 is, unless others are answered: then a filter says it."""
    if not isinstance(problem, Refused) or (problem.status == 403 and is_answered):
        return False
    return problem.status in _ABOUT_ALL or problem.status < 400


def _prompt_sets(run: RunRecord) -> dict[Side, PromptSet]:
    """The held-out prompts of both sides, under the names that the run's files have."""
    if run.label or run.prompts is None:
        raise UserError(f"{run.folder} has no prompts of its own: name the folder of a run that got that far")
    found: dict[Side, PromptSet] = {}
    for side in SIDES:
        rows = tuple(Prompt(row.instruction, row.category, row.output) for row in run.prompts.side(side).test)
        measured = run.side(side)
        source = run.run.options.eval_set if side == "harmful" else None
        name = measured.set_name if measured is not None else Path(source).stem if source else side
        if rows:
            found[side] = PromptSet(name, rows)
    if not found:
        raise UserError(f"{run.folder} has no held-out prompts: its prompts.json lists none under test")
    return found


def _prefix(run: RunRecord) -> str:
    return "" if run.prompts is None else run.prompts.response_prefix.strip()


def _sent(run: RunRecord, api: Api, prompts: PromptSet, chat: ChatFormat | None) -> list[Any]:
    """Messages, or texts which the server's tokenizer reads as the very tokens of the run's prompts."""
    if api == "chat":
        system = [] if run.run.options.system is None else [{"role": "system", "content": run.run.options.system}]
        return [[*system, {"role": "user", "content": text}] for text in prompts.instructions]
    if chat is None:
        raise UserError("rendered prompts need the chat format of the run")
    return [_readable(chat, *each) for each in zip(prompts.instructions, chat.encode_all(prompts), strict=True)]


def _readable(chat: ChatFormat, prompt: str, ids: Sequence[int]) -> str:
    """The rendered prompt, without the beginning-of-text token where the tokenizer puts one before every text."""
    text = chat.render(prompt)
    for each in (text, text.removeprefix(chat.tokenizer.bos_token or "")):
        if list(chat.tokenizer(each)["input_ids"]) == list(ids):
            return each
    raise UserError(
        f"no text reaches the model as the tokens of this prompt, so --completions cannot send it: {prompt[:80]!r}"
    )


def _same_text(run: RunRecord, name: str, rows: Sequence[_Row]) -> dict[str, int]:
    """How many answers are, letter for letter, those of the run under each intervention."""
    same = {}
    for label in ("baseline", "ablation", "actadd"):
        file = run.path / f"completions/{name}_{label}_completions.json"
        if file.is_file():
            there = {row.prompt: row.response for row in read_record(file, list[Completion])}
            if all(row.prompt in there for row in rows):
                same[label] = sum(there[row.prompt] == row.response for row in rows)
    return same


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
