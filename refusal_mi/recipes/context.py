"""What every stage of a run shares: model, options, folder; and after `prepare` the prompts and the chat format."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..files import read_record, write_record
from ..generation import discover_response_prefix
from ..measures import discover_refusal_tokens, next_token_logits, published_refusal_tokens, refusal_score
from ..model.points import HookedModel, model_type
from ..model.provenance import ModelRecord, describe_model, versions
from ..run.options import RunOptions
from ..run.record import PROMPTS, PromptRow, PromptsRecord, SplitRows, TokenRecord
from ..run.stages import RunFolder
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet, Splits, load_prompts, load_splits

MIN_KEPT_PROMPTS = 8
N_PREFIX_PROMPTS = 16
Result = TypeVar("Result")


@dataclass
class RunContext:
    """One model, one set of options, one folder."""

    model: HookedModel
    options: RunOptions
    folder: RunFolder
    model_record: ModelRecord
    chat: ChatFormat
    """As the options say; after `prepare` with the response prefix that the model's answers share."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of the files that the stages so far wrote."""
    seconds_each: dict[str, float] = field(default_factory=dict)
    """What a unit of work took, by kind."""

    @classmethod
    def start(cls, model: HookedModel, source: str, options: RunOptions, folder: RunFolder) -> "RunContext":
        """Make sure that options, model and folder fit each other.

        Raises:
            UserError: the folder is another model's, or a refusal token is none of this one.
        """
        record = describe_model(model, source)
        _check_tokens(options.refusal_tokens, record.d_vocab)
        folder.claim(record)
        template = ChatFormat(model.tokenizer, options.system, options.template_kwargs, options.response_prefix or "")
        return cls(model, options, folder, record, template)

    def stage(
        self, name: str, inputs: Mapping[str, Any], outputs: Sequence[str], compute: Callable[[], None], about: str
    ) -> None:
        """Run a stage of the folder and remember the hashes of its files."""
        self.hashes |= self.folder.stage(name, inputs, outputs, compute, about=about)

    def inputs(self, *files: str, **values: Any) -> dict[str, Any]:
        """What a stage depends on: the model, the template, versions, files of earlier stages, options."""
        missing = [file for file in files if file not in self.hashes]
        if missing:
            raise RuntimeError(f"a stage needs {missing[0]}, which no stage before it wrote")
        return {
            "model": self.model_record,
            "chat": self.chat.record(),
            "versions": versions(),
            "quick": self.options.quick,
            "files": {file: self.hashes[file] for file in files},
            **values,
        }

    def timed(self, unit: str, n_units: int, work: Callable[[], Result]) -> Result:
        """Run `work` and remember what each of its units took, for later estimates."""
        start = time.perf_counter()
        result = work()
        self.seconds_each[unit] = (time.perf_counter() - start) / n_units
        return result

    def estimate(self, unit: str, n_units: int, *, most: bool = False) -> str:
        """How long `n_units` will take, or take at most, if the unit has been timed in this run."""
        if unit not in self.seconds_each:
            return ""
        return f", {'at most' if most else 'about'} {self.seconds_each[unit] * n_units:.0f} s"

    def batched(self, work: Callable[[int], Result]) -> Result:
        """Run `work(batch_size)` at the size asked for, or at the largest that fits."""
        return with_smaller_batches(work, self.options.batch_size)

    def loss_batch(self, batch_size: int) -> int:
        """Texts per pass of CE loss, whose logits at every position need more memory; a size asked for is kept."""
        return batch_size if self.options.batch_size is not None else max(1, batch_size // 4)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def mark(self) -> dict[str, bool]:
        """What a quick run adds to every published record it writes."""
        return {"quick": True} if self.options.quick else {}


@dataclass
class Prepared(RunContext):
    """A run whose prompts were read by the plain model: what every later stage takes."""

    prompts: PromptsRecord = field(kw_only=True)
    splits: Mapping[str, Splits] = field(kw_only=True)
    """The sampled prompts of both sides, before the filter."""
    evaluation_set: PromptSet = field(kw_only=True)
    """The harmful prompts that completions are reported on."""

    def kept(self, side: str, part: str) -> list[str]:
        """Instructions of a training or validation split that passed the filter."""
        return self.prompts.side(side).kept(part)

    def test(self, side: str) -> PromptSet:
        """The held-out prompts that completions are reported on."""
        name = self.evaluation_set.name if side == "harmful" else side
        rows = self.prompts.side(side).test
        return PromptSet(name, tuple(Prompt(row.instruction, row.category, row.output) for row in rows))


def prepare(run: RunContext) -> Prepared:
    """The first stage, `prompts.json`: sample the prompts, find prefix and refusal tokens, filter by first token.

    Raises:
        UserError: a prompt set does not exist or is too small, or too few prompts pass the filter.
    """
    o = run.options
    splits = {
        side: load_splits(source, n_train=o.n_train, n_val=o.n_val, n_test=o.n_test, seed=o.seed, column=o.column)
        for side, source in (("harmful", o.harmful), ("harmless", o.harmless))
    }
    evaluation_set = _evaluation_set(o, splits["harmful"])
    sets = {side: [part.sha256 for part in vars(split).values()] for side, split in splits.items()}
    sets["evaluation"] = [evaluation_set.sha256]
    inputs = run.inputs(sets=sets, filter=o.filter_prompts, tokens=o.refusal_tokens, response_prefix=o.response_prefix)
    about = f"{2 * (o.n_train + o.n_val)} prompts, refusal tokens, filter"
    compute = lambda: write_record(run.path / PROMPTS, _read_prompts(run, splits, evaluation_set))  # noqa: E731
    run.stage("prompts", inputs, [PROMPTS], compute, about)
    prompts = read_record(run.path / PROMPTS, PromptsRecord)
    shared = {each.name: getattr(run, each.name) for each in fields(run)}
    shared["chat"] = run.chat.with_response_prefix(prompts.response_prefix)
    return Prepared(**shared, prompts=prompts, splits=splits, evaluation_set=evaluation_set)


def _evaluation_set(options: RunOptions, split: Splits) -> PromptSet:
    if options.eval_set is None:
        return PromptSet("harmful", split.test.prompts)
    others = load_prompts(options.eval_set, column=options.column).without(split.train, split.val)
    if others.name == "harmless":
        raise UserError(
            "the evaluation set is called harmless, as the harmless test prompts are in file names: rename it"
        )
    if not len(others):
        raise UserError(f"every prompt of the evaluation set {others.name} is among the training or validation ones")
    return others.sample(min(options.n_test, len(others)), options.seed)


def _read_prompts(run: RunContext, splits: Mapping[str, Splits], evaluation_set: PromptSet) -> PromptsRecord:
    options, chat = run.options, run.chat
    if options.response_prefix is None:
        half = N_PREFIX_PROMPTS // 2
        mixed = [text for split in splits.values() for text in split.train.instructions[:half]]
        chat = chat.with_response_prefix(discover_response_prefix(run.model, chat, mixed))

    def read(texts: list[str]) -> Any:
        forward = lambda size: next_token_logits(run.model, chat, texts, batch_size=size)  # noqa: E731
        return run.timed("pass", len(texts), lambda: run.batched(forward))

    logits = {
        (side, part): read(getattr(split, part).instructions)
        for side, split in splits.items()
        for part in ("train", "val")
    }
    given = options.refusal_tokens
    tokens = given or discover_refusal_tokens(logits["harmful", "train"], logits["harmless", "train"])

    def rows(side: str, part: str) -> tuple[PromptRow, ...]:
        scores = refusal_score(logits[side, part], tokens).tolist()
        return _filtered(options, side, part, getattr(splits[side], part), scores)

    def described(ids: Sequence[int]) -> tuple[TokenRecord, ...]:
        return tuple(TokenRecord(token, run.model.tokenizer.decode([token])) for token in ids)

    tests = {"harmful": evaluation_set, "harmless": splits["harmless"].test}
    sides = {
        side: SplitRows(
            rows(side, "train"),
            rows(side, "val"),
            tuple(PromptRow(each.instruction, each.category, each.output) for each in test.prompts),
        )
        for side, test in tests.items()
    }
    return PromptsRecord(
        options.quick,
        chat.response_prefix,
        chat.record(),
        described(tokens),
        "given" if given else "discovered on the training split",
        described(published_refusal_tokens(model_type(run.model), chat) or ()),
        sides["harmful"],
        sides["harmless"],
    )


def _filtered(
    options: RunOptions, side: str, part: str, prompts: PromptSet, scores: Sequence[float]
) -> tuple[PromptRow, ...]:
    sign = 1 if side == "harmful" else -1
    kept = [not options.filter_prompts or sign * score > 0 for score in scores]
    if options.filter_prompts and sum(kept) < MIN_KEPT_PROMPTS:
        verb = "refused" if side == "harmful" else "answered"
        raise UserError(
            f"only {sum(kept)} of {len(kept)} {side} {part} prompts are {verb} by this model (judged by its first "
            f"token) and {MIN_KEPT_PROMPTS} are needed: keep all with --no-filter, or name --refusal-tokens"
        )
    return tuple(
        PromptRow(prompt.instruction, prompt.category, prompt.output, score, keep)
        for prompt, score, keep in zip(prompts.prompts, scores, kept, strict=True)
    )


def _check_tokens(tokens: Sequence[int] | None, d_vocab: int) -> None:
    if tokens is None:
        return
    if len(set(tokens)) < len(tokens):
        raise UserError(f"the refusal tokens {', '.join(map(str, tokens))} name a token twice")
    outside = [token for token in tokens if not 0 <= token < d_vocab]
    if outside:
        raise UserError(f"no token {outside[0]}: the model's token ids are 0..{d_vocab - 1}; see --refusal-tokens")
