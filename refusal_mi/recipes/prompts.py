"""The first stage of a run: the prompts, what the model does with them, and which of them are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import read_record, sha256_json, write_record
from ..generation import discover_response_prefix
from ..judges.substring import caution
from ..labels import (
    Label,
    discover_refusal_tokens,
    find_refusal_tokens,
    label_prompts,
    published_refusal_tokens,
    zero_point,
)
from ..measures import (
    Prefix,
    next_token_logits,
    refusal_score,
    refusal_scores,
)
from ..model.points import model_type
from ..run.answers import SIDES, Completion
from ..run.options import RunOptions
from ..run.record import LABELS, PROMPTS, LabelRow, LabelsRecord, PromptRow, PromptsRecord, SplitRows, TokenRecord
from ..stats import Rate
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet, Splits, load_prompts, load_splits
from .context import Prepared, RunContext

MIN_KEPT_PROMPTS = 8
N_PREFIX_PROMPTS = 16
HARDLY_EVER = 0.2
"""A model that refuses fewer harmful prompts than this, by the whole 95% interval of the rate, does not refuse."""
PARTS = ("train", "val")
CHUNK, MOST_TRIED = 16, 10
"""Prompts that are labelled at once to fill a split, and at most how often its size."""


def prepare(run: RunContext) -> Prepared:
    """`prompts.json`: sample the prompts, find prefix, refusal tokens and zero point, keep what the model treats so.

    Kept are harmful prompts that the model refuses and harmless ones that it answers, by the text of its own short
    answers (`labels.json`); a split that keeps too few is filled from what its source has left, never from the test
    split. A model that does not refuse ends here: `prompts.refuses` is False then.

    Raises:
        UserError: a prompt set does not exist or is too small, or too few prompts are kept.
    """
    o = run.options
    splits = {
        side: load_splits(source, n_train=o.n_train, n_val=o.n_val, n_test=o.n_test, seed=o.seed, column=o.column)
        for side, source in (("harmful", o.harmful), ("harmless", o.harmless))
    }
    evaluation_set = _evaluation_set(o, splits["harmful"])
    harmless_set = _harmless_set(o, splits["harmless"])
    tests = {"harmful": evaluation_set, "harmless": harmless_set}
    sets = {side: [part.sha256 for part in split.parts.values()] for side, split in splits.items()}
    sets["evaluation"] = [evaluation_set.sha256]
    sets |= {} if o.harmless_eval_set is None else {"harmless evaluation": [harmless_set.sha256]}
    asked: dict[str, Any] = {"calibration": o.calibration}
    if o.calibration == "labels":
        spare = {side: [each.sha256 for each in split.spare.values()] for side, split in splits.items()}
        asked |= {"label_tokens": o.label_tokens, "spare": spare}
    inputs = run.inputs(
        sets=sets, filter=o.filter_prompts, tokens=o.refusal_tokens, response_prefix=o.response_prefix, **asked
    )

    def compute() -> None:
        chat = _with_response_prefix(run, splits)
        reading = _Labelled if o.calibration == "labels" else _Scored
        record = reading(run, chat, splits, tests).record()
        write_record(run.path / PROMPTS, record)
        for line in _described(record):
            run.folder.report(f"prompts: {line}")

    about = f"{2 * (o.n_train + o.n_val)} prompts, refusal tokens, filter"
    run.stage("prompts", inputs, [PROMPTS], compute, about)
    prompts = read_record(run.path / PROMPTS, PromptsRecord)
    shared = {each.name: getattr(run, each.name) for each in fields(run)}
    shared["chat"] = run.chat.with_response_prefix(prompts.response_prefix)
    return Prepared(**shared, prompts=prompts, splits=splits, evaluation_set=evaluation_set)


def examples(prompts: PromptsRecord) -> tuple[Completion, ...]:
    """Two answers to harmful prompts that the model does not refuse."""
    rows = [row for row in prompts.harmful.train if row.is_refused is False and row.answer]
    return tuple(Completion(row.category, row.instruction, row.answer or "") for row in rows[:2])


def _evaluation_set(options: RunOptions, split: Splits) -> PromptSet:
    if options.eval_set is None:
        return PromptSet("harmful", split.test.prompts)
    others = _held_out(options.eval_set, options, split)
    if others.name == "harmless":
        raise UserError(
            "the evaluation set is called harmless, as the harmless test prompts are in file names: rename it"
        )
    return others


def _harmless_set(options: RunOptions, split: Splits) -> PromptSet:
    return split.test if options.harmless_eval_set is None else _held_out(options.harmless_eval_set, options, split)


def _held_out(name: str, options: RunOptions, split: Splits) -> PromptSet:
    others = load_prompts(name, column=options.column).without(split.train, split.val)
    if not len(others):
        raise UserError(f"every prompt of the evaluation set {others.name} is among the training or validation ones")
    return others.sample(min(options.n_test, len(others)), options.seed)


def _with_response_prefix(run: RunContext, splits: Mapping[str, Splits]) -> ChatFormat:
    if run.options.response_prefix is not None:
        return run.chat
    half = N_PREFIX_PROMPTS // 2
    mixed = [text for split in splits.values() for text in split.train.instructions[:half]]
    return run.chat.with_response_prefix(discover_response_prefix(run.model, run.chat, mixed))


def _described(prompts: PromptsRecord) -> list[str]:
    """What the labels say, one line each."""
    rates = {side: prompts.refused(side) for side in SIDES}
    lines = [f"refused by text: {rate} of {rate.n} {side} prompts" for side, rate in rates.items() if rate is not None]
    lines += [f"caution: {prompts.judge_caution}"] if prompts.judge_caution else []
    if not prompts.refuses:
        return lines
    tokens = ", ".join(repr(token.text) for token in prompts.refusal_tokens)
    zero = prompts.zero_point_nats
    about = "" if zero is None else f"; zero point of the refusal score {zero:.2f} nats"
    return [*lines, f"refusal tokens: {tokens} ({prompts.refusal_tokens_origin}){about}"]


@dataclass
class _Prompts:
    """What both calibrations do with the prompts."""

    run: RunContext
    chat: ChatFormat
    splits: Mapping[str, Splits]
    tests: Mapping[str, PromptSet]

    def timed(self, n_prompts: int, work: Callable[[int], Any]) -> Any:
        """Run `work(batch_size)` over so many prompts."""
        return self.run.timed("pass", n_prompts, lambda: self.run.batched(work))

    def written(
        self,
        tokens: Sequence[Prefix],
        origin: str,
        rows: Mapping[tuple[str, str], Sequence[PromptRow]],
        zero: float | None = None,
        *,
        refuses: bool = True,
    ) -> PromptsRecord:
        """The record of these rows, by side and part."""
        sides = {}
        for side, test in self.tests.items():
            held_out = tuple(PromptRow(each.instruction, each.category, each.output) for each in test.prompts)
            sides[side] = SplitRows(tuple(rows[side, "train"]), tuple(rows[side, "val"]), held_out)
        published = published_refusal_tokens(model_type(self.run.model), self.chat) or ()
        return PromptsRecord(
            self.run.options.quick,
            self.chat.response_prefix,
            self.chat.record(),
            self.described(tokens),
            origin,
            self.described([(token,) for token in published]),
            sides["harmful"],
            sides["harmless"],
            zero,
            refuses,
            self.caution(),
        )

    def caution(self) -> str | None:
        """What the labels may have missed; a published filter has none."""
        return None

    def described(self, prefixes: Sequence[Prefix]) -> tuple[TokenRecord, ...]:
        """Tokens by id and text."""
        decode = self.run.model.tokenizer.decode
        return tuple(TokenRecord(prefix[0], decode(list(prefix)), prefix[1:]) for prefix in prefixes)

    def check_kept(self, side: str, part: str, n_kept: int, n: int, how: str) -> None:
        """Refuse to go on with too few prompts."""
        if self.run.options.filter_prompts and n_kept < MIN_KEPT_PROMPTS:
            verb = "refused" if side == "harmful" else "answered"
            raise UserError(
                f"only {n_kept} of {n} {side} {part} prompts are {verb} by this model ({how}) and "
                f"{MIN_KEPT_PROMPTS} are needed: give more or other prompts with --n-{part} or --{side}, or keep all "
                f"with --no-filter{f' ({note})' if (note := self.caution()) else ''}"
            )


class _Scored(_Prompts):
    """As published: a prompt is refused where its first token's score is above 0."""

    def record(self) -> PromptsRecord:
        """What `prompts.json` holds."""
        options = self.run.options
        logits = {
            (side, part): self._logits(split.parts[part]) for side, split in self.splits.items() for part in PARTS
        }
        tokens, origin = options.refusal_tokens, "given"
        if not tokens:
            tokens, origin = published_refusal_tokens(model_type(self.run.model), self.chat), "published for the family"
        if not tokens:
            tokens = discover_refusal_tokens(logits["harmful", "train"], logits["harmless", "train"])
            origin = "discovered on the training split"
        rows = {}
        for (side, part), table in logits.items():
            scores = refusal_score(table, tokens).tolist()
            sign = 1 if side == "harmful" else -1
            kept = [not options.filter_prompts or sign * score > 0 for score in scores]
            self.check_kept(side, part, sum(kept), len(kept), "by the score of its first token")
            rows[side, part] = [
                PromptRow(prompt.instruction, prompt.category, prompt.output, score, keep)
                for prompt, score, keep in zip(self.splits[side].parts[part].prompts, scores, kept, strict=True)
            ]
        return self.written([(token,) for token in tokens], origin, rows)

    def _logits(self, prompts: PromptSet) -> Any:
        texts = prompts.instructions
        return self.timed(len(texts), lambda size: next_token_logits(self.run.model, self.chat, texts, batch_size=size))


Tried = dict[tuple[str, str], list[Prompt]]
"""Side and part -> the prompts that were tried for it, kept or not."""


@dataclass
class _Labelled(_Prompts):
    """By labels: what the model's own answers say."""

    labels: dict[str, Label] = field(default_factory=dict)
    """By instruction."""

    def record(self) -> PromptsRecord:
        """What `prompts.json` holds; `labels.json` grows meanwhile."""
        self._recall()
        tried: Tried = {(side, part): list(self.splits[side].parts[part].prompts) for side in SIDES for part in PARTS}
        for side in SIDES:
            self._label([prompt for part in PARTS for prompt in tried[side, part]])
            if self._refuses(tried) and self.run.options.filter_prompts:
                self._top_up(side, tried)
            if not self._refuses(tried):
                return self._without_refusals(tried)
        texts = [prompt.instruction for prompts in tried.values() for prompt in prompts]
        train = [prompt.instruction for side in SIDES for prompt in tried[side, "train"]]
        tokens, origin = self._tokens([self.labels[text] for text in train])
        self._check_kept(tried, tokens)
        first = self._first_logits(texts)
        scored = self.run.batched(
            lambda size: refusal_scores(self.run.model, self.chat, texts, tokens, first=first, batch_size=size)
        )
        scores = dict(zip(texts, scored.tolist(), strict=True))
        zero = zero_point(
            scored.new_tensor([scores[text] for text in train]), [self.labels[text].is_refused for text in train]
        )
        rows = {
            (side, part): [self._row(side, prompt, scores[prompt.instruction]) for prompt in prompts]
            for (side, part), prompts in tried.items()
        }
        return self.written(tokens, origin, rows, zero)

    def _first_logits(self, texts: Sequence[str]) -> Float[Tensor, "prompt d_vocab"]:
        """Of the first token of every answer: as the labels were made, or read now where they were made before."""
        missing = [text for text in dict.fromkeys(texts) if self.labels[text].first_logits is None]
        read = lambda size: next_token_logits(self.run.model, self.chat, missing, batch_size=size)  # noqa: E731
        known = dict(zip(missing, self.timed(len(missing), read), strict=True)) if missing else {}
        rows = (known[text] if text in known else self.labels[text].first_logits for text in texts)
        return torch.stack([row for row in rows if row is not None])

    def _tokens(self, train: Sequence[Label]) -> tuple[Sequence[Prefix], str]:
        given = self.run.options.refusal_tokens
        if given:
            return [(token,) for token in given], "given"
        tokens = find_refusal_tokens(train)
        if not tokens:
            n = sum(label.is_refused for label in train)
            raise UserError(
                f"no refusal token found: no beginning tells the {n} refusals from the other answers to {len(train)} "
                "training prompts; name the tokens with --refusal-tokens"
            )
        begins = [any(label.token_ids[: len(each)] == each for each in tokens) for label in train]
        hits = [flag for flag, label in zip(begins, train, strict=True) if label.is_refused]
        n_others = len(train) - len(hits)
        return tokens, (
            f"they begin {sum(hits)} of {len(hits)} refusals and {sum(begins) - sum(hits)} of {n_others} other answers "
            "to training prompts"
        )

    def _is_kept(self, side: str, prompt: Prompt) -> bool:
        label = self.labels[prompt.instruction]
        treated_so = label.is_refused if side == "harmful" else bool(label.answer) and not label.is_refused
        return treated_so or not self.run.options.filter_prompts

    def _row(self, side: str, prompt: Prompt, score: float | None) -> PromptRow:
        label = self.labels[prompt.instruction]
        shown = (prompt.instruction, prompt.category, prompt.output)
        return PromptRow(*shown, score, self._is_kept(side, prompt), label.is_refused, label.answer)

    def _rate(self, tried: Tried, side: str) -> Rate:
        return Rate.of([self.labels[each.instruction].is_refused for part in PARTS for each in tried[side, part]])

    def _refuses(self, tried: Tried) -> bool:
        """Whether the model refuses harmful prompts at all; with --no-filter the run goes on anyhow."""
        return not self.run.options.filter_prompts or self._rate(tried, "harmful").interval[1] >= HARDLY_EVER

    def _without_refusals(self, tried: Tried) -> PromptsRecord:
        rows: dict[tuple[str, str], list[PromptRow]] = {}
        for (side, part), prompts in tried.items():
            plain = [PromptRow(each.instruction, each.category, each.output) for each in prompts]
            rows[side, part] = [self._row(side, each, None) for each in prompts] if side == "harmful" else plain
        return self.written((), "none: this model does not refuse", rows, refuses=False)

    def _check_kept(self, tried: Tried, tokens: Sequence[Prefix]) -> None:
        names = ", ".join(repr(token.text) for token in self.described(tokens))
        for (side, part), prompts in tried.items():
            rate = self._rate(tried, side)
            how = f"by the text of its answers; it refuses {rate} of the {side} ones, refusals beginning with {names}"
            self.check_kept(side, part, sum(self._is_kept(side, prompt) for prompt in prompts), len(prompts), how)

    def _top_up(self, side: str, tried: Tried) -> None:
        """Try what the sources have left, in order, for the part that is shortest, until each has what it needs."""
        sizes = {part: len(self.splits[side].parts[part]) for part in PARTS}
        kept = {part: sum(self._is_kept(side, each) for each in tried[side, part]) for part in PARTS}
        held_out = {prompt.instruction for test in self.tests.values() for prompt in test.prompts}
        for parts, spare in self.splits[side].spare.items():
            waiting = [prompt for prompt in spare.prompts if prompt.instruction not in held_out]
            waiting = waiting[: MOST_TRIED * sum(sizes[part] for part in parts)]
            while waiting and (n_missing := sum(sizes[part] - kept[part] for part in parts)):
                n = max(n_missing, CHUNK)
                chunk, waiting = waiting[:n], waiting[n:]
                self._label(chunk)
                for prompt in chunk:
                    part = min(parts, key=lambda each: kept[each] / sizes[each])
                    if kept[part] == sizes[part]:
                        break
                    tried[side, part].append(prompt)
                    kept[part] += self._is_kept(side, prompt)

    def _label(self, prompts: Sequence[Prompt]) -> None:
        """Label what was not labelled before, and save it."""
        missing = [text for text in dict.fromkeys(each.instruction for each in prompts) if text not in self.labels]
        if not missing:
            return
        run, n_tokens = self.run, self.run.options.label_tokens
        labels = run.batched(
            lambda size: label_prompts(run.model, self.chat, missing, n_tokens=n_tokens, batch_size=size)
        )
        self.labels |= dict(zip(missing, labels, strict=True))
        rows = tuple(
            LabelRow(instruction, label.answer, label.token_ids, label.is_refused)
            for instruction, label in self.labels.items()
        )
        write_record(run.path / LABELS, LabelsRecord(self._key, rows))

    def caution(self) -> str | None:
        """What the phrases cannot read in the prompts and answers that were labelled."""
        return caution(list(self.labels), [label.answer for label in self.labels.values()])

    def _recall(self) -> None:
        """The labels that lie in the folder, if they were made by this model in the same way."""
        path = self.run.path / LABELS
        if self.run.folder.fresh or not path.is_file():
            return
        before = read_record(path, LabelsRecord)
        if before.key == self._key:
            self.labels = {row.instruction: Label(row.answer, row.token_ids, row.is_refused) for row in before.rows}

    @property
    def _key(self) -> str:
        """Of everything that a label depends on beside the instruction."""
        shared = self.run.inputs()
        del shared["quick"]
        return sha256_json({**shared, "chat": self.chat.record(), "n_tokens": self.run.options.label_tokens})
