"""What lm-evaluation-harness asks of a model, answered by this package's own batches under interventions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ..errors import UserError, cause
from ..generation import complete
from ..interventions import Interventions
from ..likelihoods import Likelihood, log_likelihoods, windows
from ..measures import ScoredText
from ..model.points import HookedModel
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat

NEW_TOKENS = 256
"""Of an answer whose task does not say: the harness' own default."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for how long an answer may be; the first that a task has counts."""


def harness_version() -> str:
    """The version of lm-evaluation-harness that is installed.

    Raises:
        UserError: there is none.
    """
    try:
        import_module("lm_eval.api.model")
    except ImportError as error:
        raise UserError(
            f"capability needs lm-evaluation-harness ({cause(error)}): pip install 'refusal_mi[eval]'"
        ) from None
    return version("lm_eval")


@dataclass(frozen=True)
class Writing:
    """How a task asks for text."""

    until: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def read(cls, asked: Mapping[str, Any]) -> "Writing":
        """From a task's `generation_kwargs`.

        Raises:
            UserError: it asks for sampled text, or for beams.
        """
        said = asked.get("do_sample")
        is_sampled = float(asked.get("temperature") or 0) > 0 if said is None else bool(said)
        if is_sampled or int(asked.get("num_beams") or 1) > 1:
            raise UserError("a task asks for sampled text or for beams, and capability reads greedy answers only")
        until = asked.get("until") or ()
        length = next((asked[name] for name in LENGTHS if asked.get(name) is not None), NEW_TOKENS)
        return cls((until,) if isinstance(until, str) else tuple(until), int(length))


@dataclass
class Requests:
    """Answers the three kinds of requests of the harness, as its own model of Hugging Face does.

    Contexts that are too long lose their beginning. Nothing here needs the harness: `as_harness_model` wraps it.
    """

    model: HookedModel
    chat: ChatFormat | None = None
    """For tasks that are asked with the chat template; None: a task that asks for it is refused."""
    interventions: Interventions = ()
    batch_size: int | None = None
    """None: as many as fit."""
    n_cut: int = 0
    """Contexts that have lost their beginning so far."""

    @property
    def n_ctx(self) -> int:
        return self.model.cfg.n_ctx

    @property
    def _tokenizer(self) -> Any:
        return self.model.tokenizer

    @cached_property
    def pad_id(self) -> int:
        """Masked, so any valid id serves where the tokenizer has none."""
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token for token in ids if token is not None)

    @cached_property
    def prefix_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError("this tokenizer has neither a BOS nor an EOS token to put before a text without a context")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds, unless the text begins with BOS itself."""
        has_bos = text.startswith(self._tokenizer.decode([self.prefix_id]))
        return self._tokenizer.encode(text, **({"add_special_tokens": False} if has_bos else {}))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of every (context, continuation); spaces at the end of a context count to the continuation."""
        return self._scored([self._cut(*self._encoded(*pair), pair[1]) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p (nats) of whole texts, in windows where they are longer than the context; of an empty one 0."""
        pieces = [windows(self.encode(text), self.prefix_id, self.n_ctx) for text in texts]
        nats = iter(self._scored([piece for each in pieces for piece in each]))
        return [math.fsum(next(nats).nats for _ in each) for each in pieces]

    def completions(self, context: Sequence[str], until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuations, each up to the first of `until`."""
        room = self.n_ctx - max_new_tokens
        if room < 1:
            raise UserError(f"a task asks for {max_new_tokens} new tokens, and the model's context has {self.n_ctx}")
        rows = [self.encode(text) or [self.prefix_id] for text in context]
        self.n_cut += sum(len(row) > room for row in rows)

        def write(size: int) -> list[str]:
            return complete(
                self.model,
                [row[-room:] for row in rows],
                self.pad_id,
                interventions=self.interventions,
                max_new_tokens=max_new_tokens,
                until=until,
                batch_size=size,
            )

        return with_smaller_batches(write, self.batch_size)

    def rendered(self, messages: Sequence[Mapping[str, str]], *, is_question: bool) -> str:
        """A conversation through the chat template; with an unfinished answer at its end where it is no question."""
        if self.chat is None:
            raise UserError("this model has no chat template: leave out --apply-chat-template")
        told = [{"role": each["role"], "content": each["content"]} for each in messages]
        if self.chat.system is not None and told[0]["role"] != "system":
            told = [{"role": "system", "content": self.chat.system}, *told]
        if is_question:
            return self.chat.render(told)  # type: ignore[arg-type]
        *before, answer = told
        return self.chat.render(before) + answer["content"]  # type: ignore[arg-type]

    def _scored(self, texts: Sequence[ScoredText]) -> list[Likelihood]:
        def read(size: int) -> list[Likelihood]:
            return log_likelihoods(self.model, texts, self.pad_id, interventions=self.interventions, batch_size=size)

        return with_smaller_batches(read, self.batch_size)

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context.strip():
            continuation = context + continuation
            ids = self._tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_id] else ([self.prefix_id], ids)
        before = self.encode(context.rstrip())
        return before, self.encode(context + continuation)[len(before) :]

    def _cut(self, context: list[int], continuation: list[int], text: str) -> ScoredText:
        """The end of a row that fits: the last token is only predicted."""
        if not continuation:
            raise UserError(f"the tokenizer leaves no token of the answer {text[:60]!r} of a task after its question")
        if len(continuation) > self.n_ctx:
            raise UserError(f"an answer of a task has {len(continuation)} tokens, more than the context: {text[:60]!r}")
        row = (context + continuation)[-(self.n_ctx + 1) :]
        self.n_cut += len(row) < len(context) + len(continuation)
        return ScoredText(tuple(row), len(row) - len(continuation))


def as_harness_model(requests: Requests) -> Any:
    """An `lm_eval.api.model.LM` that answers with `requests`.

    Raises:
        UserError: lm-evaluation-harness is not installed.
    """
    harness_version()
    from lm_eval.api.model import LM

    class HookedLM(LM):  # type: ignore[misc]
        tokenizer_name = "refusal_mi"

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = self.answers.log_likelihoods([each.args for each in requests])
            return [(each.nats, each.is_greedy) for each in found]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return self.answers.rolling([each.args[0] for each in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [(each.args[0], Writing.read(each.args[1])) for each in requests]
            found: dict[int, str] = {}
            for how in dict.fromkeys(how for _, how in asked):
                places = [index for index, (_, each) in enumerate(asked) if each == how]
                texts = [asked[index][0] for index in places]
                found |= dict(zip(places, self.answers.completions(texts, how.until, how.max_new_tokens), strict=True))
            return [found[index] for index in range(len(asked))]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.answers.rendered(chat_history, is_question=add_generation_prompt)

    wrapped = HookedLM()
    wrapped.answers = requests
    return wrapped
