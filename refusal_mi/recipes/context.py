"""What every stage of a run shares: model, options, prompts, folder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar

from ..errors import UserError
from ..files import read_json, write_json
from ..generation import discover_response_prefix
from ..measures import discover_refusal_tokens, next_token_logits, published_refusal_tokens, refusal_score
from ..model.points import HookedModel, model_type
from ..model.provenance import describe_model, versions
from ..run.stages import RunFolder
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..text.prompts import Prompt, PromptSet, Splits, load_prompts, load_splits
from .options import RunOptions

MIN_KEPT_PROMPTS = 8
N_PREFIX_PROMPTS = 16
Result = TypeVar("Result")


class RunContext:
    """One model, one set of options, one folder; reading `prompts` runs the first stage."""

    def __init__(self, model: HookedModel, source: str, options: RunOptions, folder: RunFolder) -> None:
        self.model, self.options, self.folder = model, options, folder
        self.path = folder.path
        self.model_record = describe_model(model, source)
        _check_tokens(options.refusal_tokens, self.model_record.d_vocab)
        self.hashes: dict[str, str] = {}
        self._seconds_each: dict[str, float] = {}
        prefix = options.response_prefix or ""
        self._template = ChatFormat(model.tokenizer, options.system, options.template_kwargs, prefix)
        folder.claim(self.model_record)

    @cached_property
    def splits(self) -> dict[str, Splits]:
        """The sampled prompts of both sides, before the filter."""
        o = self.options
        return {
            side: load_splits(source, n_train=o.n_train, n_val=o.n_val, n_test=o.n_test, seed=o.seed, column=o.column)
            for side, source in (("harmful", o.harmful), ("harmless", o.harmless))
        }

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """`prompts.json`: refusal tokens, response prefix, every prompt with its score and whether it was kept."""
        o = self.options
        sets = {side: [part.sha256 for part in vars(split).values()] for side, split in self.splits.items()}
        sets["evaluation"] = [self._evaluation_set.sha256]
        inputs = self.inputs(
            sets=sets, filter=o.filter_prompts, tokens=o.refusal_tokens, response_prefix=o.response_prefix
        )
        about = f"{2 * (o.n_train + o.n_val)} prompts, refusal tokens, filter"
        self.stage("prompts", inputs, ["prompts.json"], self._write_prompts, about)
        return read_json(self.path / "prompts.json")

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format, with the response prefix that the model's answers share."""
        return self._template.with_response_prefix(self.prompts["response_prefix"])

    def kept(self, side: str, part: str) -> list[str]:
        """Instructions of a training or validation split that passed the filter."""
        return [row["instruction"] for row in self.prompts[side][part] if row["kept"]]

    def test(self, side: str) -> PromptSet:
        """The held-out prompts that completions are reported on."""
        name = self._evaluation_set.name if side == "harmful" else side
        return PromptSet(name, tuple(Prompt(**row) for row in self.prompts[side]["test"]))

    def stage(
        self, name: str, inputs: dict[str, Any], outputs: Sequence[str], compute: Callable[[], None], about: str
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
            "chat": (self.chat if "prompts.json" in self.hashes else self._template).record(),
            "versions": versions(),
            "quick": self.options.quick,
            "files": {file: self.hashes[file] for file in files},
            **values,
        }

    def timed(self, unit: str, n_units: int, work: Callable[[], Result]) -> Result:
        """Run `work` and remember what each of its units took, for later estimates."""
        start = time.perf_counter()
        result = work()
        self._seconds_each[unit] = (time.perf_counter() - start) / n_units
        return result

    def estimate(self, unit: str, n_units: int, *, most: bool = False) -> str:
        """How long `n_units` will take, or take at most, if the unit has been timed in this run."""
        if unit not in self._seconds_each:
            return ""
        return f", {'at most' if most else 'about'} {self._seconds_each[unit] * n_units:.0f} s"

    def batched(self, work: Callable[[int], Result]) -> Result:
        """Run `work(batch_size)` at the size asked for, or at the largest that fits."""
        return with_smaller_batches(work, self.options.batch_size)

    def loss_batch(self, batch_size: int) -> int:
        """Texts per pass of CE loss, whose logits at every position need more memory; a size asked for is kept."""
        return batch_size if self.options.batch_size is not None else max(1, batch_size // 4)

    @property
    def mark(self) -> dict[str, bool]:
        """What a quick run adds to every record it writes."""
        return {"quick": True} if self.options.quick else {}

    @cached_property
    def _evaluation_set(self) -> PromptSet:
        split = self.splits["harmful"]
        if self.options.eval_set is None:
            return PromptSet("harmful", split.test.prompts)
        found = load_prompts(self.options.eval_set, column=self.options.column).without(split.train, split.val)
        if found.name == "harmless":
            raise UserError(
                "the evaluation set is called harmless, as the harmless test prompts are in file names: rename it"
            )
        if not len(found):
            raise UserError(f"every prompt of the evaluation set {found.name} is among the training or validation ones")
        return found.sample(min(self.options.n_test, len(found)), self.options.seed)

    def _write_prompts(self) -> None:
        o, chat = self.options, self._template
        if o.response_prefix is None:
            half = N_PREFIX_PROMPTS // 2
            mixed = [text for split in self.splits.values() for text in split.train.instructions[:half]]
            chat = chat.with_response_prefix(discover_response_prefix(self.model, chat, mixed))

        def read(texts: list[str]) -> Any:
            forward = lambda size: next_token_logits(self.model, chat, texts, batch_size=size)  # noqa: E731
            return self.timed("pass", len(texts), lambda: self.batched(forward))

        logits = {
            (side, part): read(getattr(split, part).instructions)
            for side, split in self.splits.items()
            for part in ("train", "val")
        }
        tokens = o.refusal_tokens or discover_refusal_tokens(logits["harmful", "train"], logits["harmless", "train"])
        published = published_refusal_tokens(model_type(self.model), chat)
        record: dict[str, Any] = {
            "quick": o.quick,
            "response_prefix": chat.response_prefix,
            "chat": chat.record(),
            "refusal_tokens": self._describe_tokens(tokens),
            "refusal_tokens_origin": "given" if o.refusal_tokens else "discovered on the training split",
            "published_refusal_tokens": self._describe_tokens(published or ()),
        }
        for side, split in self.splits.items():
            record[side] = {
                part: self._filtered(side, part, getattr(split, part), refusal_score(logits[side, part], tokens))
                for part in ("train", "val")
            }
            test = self._evaluation_set if side == "harmful" else split.test
            record[side]["test"] = [asdict(prompt) for prompt in test.prompts]
        write_json(self.path / "prompts.json", record)

    def _filtered(self, side: str, part: str, prompts: PromptSet, scores: Any) -> list[dict[str, Any]]:
        sign = 1 if side == "harmful" else -1
        kept = [not self.options.filter_prompts or sign * score > 0 for score in scores.tolist()]
        if self.options.filter_prompts and sum(kept) < MIN_KEPT_PROMPTS:
            verb = "refused" if side == "harmful" else "answered"
            raise UserError(
                f"only {sum(kept)} of {len(kept)} {side} {part} prompts are {verb} by this model (judged by its first "
                f"token) and {MIN_KEPT_PROMPTS} are needed: keep all with --no-filter, or name --refusal-tokens"
            )
        return [
            {**asdict(prompt), "refusal_score": score, "kept": keep}
            for prompt, score, keep in zip(prompts.prompts, scores.tolist(), kept, strict=True)
        ]

    def _describe_tokens(self, tokens: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": token, "text": self.model.tokenizer.decode([token])} for token in tokens]


def _check_tokens(tokens: Sequence[int] | None, d_vocab: int) -> None:
    if tokens is None:
        return
    if len(set(tokens)) < len(tokens):
        raise UserError(f"the refusal tokens {', '.join(map(str, tokens))} name a token twice")
    outside = [token for token in tokens if not 0 <= token < d_vocab]
    if outside:
        raise UserError(f"no token {outside[0]}: the model's token ids are 0..{d_vocab - 1}; see --refusal-tokens")
