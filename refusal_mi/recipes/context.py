"""What every stage of a run shares: model, options, folder; and once the prompts are prepared, these."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..engine.jobs import Engine
from ..errors import UserError
from ..model.points import HookedModel
from ..model.provenance import ModelRecord, describe_model, versions
from ..run.options import RunOptions
from ..run.record import PromptsRecord
from ..run.stages import RunFolder
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet, Splits

Result = TypeVar("Result")


@dataclass
class RunContext:
    """One model, one set of options, one folder."""

    model: HookedModel
    options: RunOptions
    folder: RunFolder
    model_record: ModelRecord
    chat: ChatFormat
    """As the options say; once prepared, with the response prefix that the model's answers share."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of the files that the stages so far wrote."""
    seconds_each: dict[str, float] = field(default_factory=dict)
    """What a unit of work took, by kind."""
    engine: Engine | None = None
    """Where the search's candidates are scored and answers are written; None is here. Numbers depend on it
    no more than on the number of threads."""

    @classmethod
    def start(
        cls, model: HookedModel, source: str, options: RunOptions, folder: RunFolder, engine: Engine | None = None
    ) -> "RunContext":
        """Make sure that options, model and folder fit each other.

        Raises:
            UserError: the folder is another model's, or a refusal token is none of this one.
        """
        record = describe_model(model, source)
        _check_tokens(options.refusal_tokens, record.d_vocab)
        folder.claim(record)
        template = ChatFormat(
            model.tokenizer,
            options.system,
            options.template_kwargs,
            options.response_prefix or "",
            options.allow_special_tokens,
        )
        return cls(model, options, folder, record, template, engine=engine)

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
        """Texts per pass of CE loss (`loss_batch`)."""
        return loss_batch(self.options, batch_size)

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


def loss_batch(options: RunOptions, batch_size: int) -> int:
    """Texts per pass of CE loss, whose logits at every position need more memory; a size asked for is kept."""
    return batch_size if options.batch_size is not None else max(1, batch_size // 4)


def _check_tokens(tokens: Sequence[int] | None, d_vocab: int) -> None:
    if tokens is None:
        return
    if len(set(tokens)) < len(tokens):
        raise UserError(f"the refusal tokens {', '.join(map(str, tokens))} name a token twice")
    outside = [token for token in tokens if not 0 <= token < d_vocab]
    if outside:
        raise UserError(f"no token {outside[0]}: the model's token ids are 0..{d_vocab - 1}; see --refusal-tokens")
