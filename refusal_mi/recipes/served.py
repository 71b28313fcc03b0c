"""The held-out prompts of a run, answered by a server: the same files as the run's own answers, under a label."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..endpoint import Failed, NotAnAnswer, Pause, Refused, as_they_come
from ..errors import UserError
from ..files import read_record, sha256_json, write_json, write_record, write_text
from ..judges.substring import SubstringJudge
from ..run.answers import SIDES, Completion, Side
from ..run.folder import RunRecord
from ..run.served import FOLDER, Api, ServedRecord, ServedSet, check_label, record_file
from ..run.stages import RunFolder
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet
from .effects import evaluate
from .server import PATHS, Answer, Server

MOST_IN_A_ROW = 5
"""Prompts whose tries all fail, one after the other, before the server is given up; refusals while none is answered."""
_ABOUT_ALL = frozenset({401, 403, 404, 405})
"""HTTP statuses that are about no single prompt, beside redirects."""


class Unanswered(Exception):
    """Some prompts failed at every try: prompt -> the problem."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__(f"{len(problems)} prompts")
        self.problems = dict(problems)


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
    about = {name: entry[name] for name in ("id", "root", "parent", "owned_by") if name in entry}
    found: dict[Side, ServedSet] = {}
    names: dict[str, None] = {}
    for side, prompts in sets.items():
        asking = _Asking(server, model, listed, options, _sent(run, server.api, prompts, chat), _prefix(run))
        file = f"completions/{prompts.name}_{label}_completions.json"
        inputs = {"endpoint": server.base, "model": model, "listed": about, **asking.inputs, "prompts": prompts.sha256}
        kept = folder.path / FOLDER / f"{label}-{side}.part"

        def compute() -> None:
            answers, problems = asking.answers(prompts, _Kept(kept, sha256_json(inputs), folder.fresh))
            rows = [
                {"category": prompt.category, "prompt": prompt.instruction, "response": answer.text}
                | {"finish_reason": answer.finish_reason, "model": answer.model}
                | ({"quick": True} if run.run.quick else {})
                for index, prompt in enumerate(prompts.prompts)
                if (answer := answers.get(index)) is not None
            ]
            write_json(folder.path / file, rows)
            if problems:
                raise Unanswered({prompts[index]: problem for index, problem in problems.items()})

        problems: dict[str, str] = {}
        try:
            n = f"{len(prompts)} answers of up to {tokens} tokens by {model}"
            folder.stage(f"completions_{prompts.name}_{label}", inputs, [file], compute, about=n)
            kept.unlink(missing_ok=True)
        except Unanswered as error:
            problems = error.problems
        rows = read_record(folder.path / file, list[_Row])
        completions = [Completion(row.category, row.prompt, row.response) for row in rows]
        judged = evaluate(completions, SubstringJudge(), quick=run.run.quick)
        write_json(folder.path / f"completions/{prompts.name}_{label}_evaluations.json", judged)
        same = _same_text(run, prompts.name, rows) if tokens == run.run.options.max_new_tokens else {}
        truncated = sum(row.finish_reason == "length" for row in rows)
        found[side] = ServedSet(prompts.name, len(rows), truncated, problems, same)
        names |= {row.model: None for row in rows if row.model is not None}
    record = ServedRecord(label, server.base, model, tuple(names), server.api, options, found)
    write_record(folder.path / record_file(label), record)
    return record


@dataclass(frozen=True)
class _Row:
    """Of a file of completions."""

    category: str | None
    prompt: str
    response: str
    finish_reason: str | None = None
    model: str | None = None


class _Kept:
    """Answers to one set that came so far: a file with a line for each, behind the hash of what they depend on."""

    def __init__(self, path: Path, key: str, fresh: bool) -> None:
        self.path = path
        self.answers: dict[int, Answer] = {}
        lines = path.read_text("utf-8").splitlines() if path.is_file() and not fresh else []
        if lines and lines[0] == key:
            for line in lines[1:]:
                try:
                    held = json.loads(line)
                    index = held.pop("index")
                    self.answers[index] = Answer(**held)
                except (ValueError, TypeError, LookupError, AttributeError):  # the last line of a killed process
                    break
        write_text(path, "".join([f"{key}\n", *(self._line(*each) for each in self.answers.items())]))

    def add(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(index, answer))

    @staticmethod
    def _line(index: int, answer: Answer) -> str:
        return json.dumps({"index": index, **asdict(answer)}) + "\n"


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

    def answers(self, prompts: PromptSet, kept: _Kept) -> tuple[dict[int, Answer], dict[int, str]]:
        """Answers by prompt, those of before and new ones; and what went wrong with the others."""
        missing = [index for index in range(len(prompts)) if index not in kept.answers]
        problems: dict[int, str] = {}
        n_in_a_row = 0
        about = f"{prompts.name}, asking {urlsplit(self.server.base).hostname}"
        come = as_they_come(missing, self._one, n_workers=self.server.n_workers, description=about)
        with closing(come):
            for index, outcome in come:
                if isinstance(outcome, Answer):
                    self._check_model(outcome, kept)
                    kept.add(index, outcome)
                    n_in_a_row = 0
                    continue
                problems[index] = str(outcome)
                n_in_a_row += isinstance(outcome, Failed) or not kept.answers
                if n_in_a_row >= MOST_IN_A_ROW or len(problems) == len(prompts) or _is_about_all(outcome):
                    text = self.server.fault(outcome, self.model, self.listed)
                    stay = f"; {len(kept.answers)} answers are kept, the same command goes on" if kept.answers else ""
                    raise UserError(text + stay)
        if not any(answer.text for answer in kept.answers.values()):
            kept.path.unlink()
            ends = ", ".join(sorted({str(answer.finish_reason) for answer in kept.answers.values()}))
            raise UserError(
                f"the server at {self.server.base} answers all {len(kept.answers)} prompts of {prompts.name} with "
                f"nothing (finish reason {ends}): does {self.model!r} have the chat template that its weights expect?"
            )
        return kept.answers, problems

    def _one(self, index: int, pause: Pause) -> Answer | Refused | Failed:
        """The answer to a prompt, or why there is none."""
        asked = {"messages" if self.server.api == "chat" else "prompt": self.sent[index]}
        try:
            path = PATHS[self.server.api]
            return self.server.endpoint.ask(path, {"model": self.model, **asked, **self.options}, self._read, pause)
        except (Refused, Failed) as error:
            return error

    def _read(self, held: Any) -> Answer:
        try:
            choice = held["choices"][0]
            text = choice["message"]["content"] if self.server.api == "chat" else choice["text"]
            reason, model = choice.get("finish_reason"), held.get("model")
        except (LookupError, TypeError, AttributeError):
            raise NotAnAnswer(f"an answer that is no {self.server.api} completion") from None
        if not isinstance(text, str):
            raise NotAnAnswer(f"an answer without text (finish reason {reason}; is it all reasoning?)")
        hidden = self.server.endpoint.hidden
        text = hidden(text).strip().removeprefix(self.prefix).lstrip()
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


def _is_about_all(problem: Refused | Failed) -> bool:
    return isinstance(problem, Refused) and (problem.status in _ABOUT_ALL or problem.status < 400)


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
