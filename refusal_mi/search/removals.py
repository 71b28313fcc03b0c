"""Removals of a direction from some writes only: described, turned into `Ablate`, and scored many to a pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..engine.jobs import Engine
from ..errors import UserError
from ..interventions import Ablate
from ..measures import RefusalPrefixes, RefusalTokens, kl_nats
from ..model.points import Component, HookedModel, check_raw_basis, model_device, write_hooks
from ..model.running import check_fits, running, tail_logits
from ..precision import as_double
from ..progress import track
from ..text.batches import TokenBatch, batches_by_length, left_pad
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import Value
from .block_passes import passes_for
from .passes import PASS_TOKENS, AblateWritesEach, Basis, Passes, Weights

Shape = Literal["flat", "peak"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
AT_ONCE = 8
"""Removals that share passes."""
MOST_LOGITS = 2**26
"""Numbers in the logits of one pass."""
MOST_PLAIN = 2**29
"""Numbers in the plain model's logits, which are kept for the KL."""


@dataclass(frozen=True, eq=False, repr=False)
class Removal(Value):
    """A direction removed from the writes of a band of blocks.

    "flat" removes `strength` of it in every block of [first, last). "peak" removes
    w(l) = strength + (|l − centre| / half)(floor − strength) up to a distance of `half` blocks, and nothing beyond.

    Examples:
        >>> Removal(direction, 2, 4).strengths()
        {2: 1.0, 3: 1.0}
        >>> Removal(direction, 2, 4, ("mlp",), strength=0.5).label
        'blocks 2:4, mlp, strength 0.5, direction of layer 2'
    """

    direction: Direction
    first: int
    last: int
    components: tuple[Component, ...] = COMPONENTS
    """The embedding counts as a write of block 0."""
    strength: float = 1.0
    shape: Shape = "flat"
    floor: float = 0.0
    """Of "peak": what is still removed at its ends."""

    def strengths(self) -> dict[int, float]:
        """Block -> the fraction that its writes lose; blocks that keep all are left out."""
        centre, half = (self.first + self.last - 1) / 2, (self.last - self.first) / 2
        by_block = {
            block: self.strength
            if self.shape == "flat"
            else self.strength + abs(block - centre) / half * (self.floor - self.strength)
            for block in range(self.first, self.last)
        }
        return {block: strength for block, strength in by_block.items() if strength != 0}

    def weights(self, n_layers: int) -> dict[str, float]:
        """The same by hook point."""
        return {
            name: strength
            for block, strength in self.strengths().items()
            for name in write_hooks(n_layers, layers=[block], components=self.components)
        }

    @property
    def interventions(self) -> tuple[Ablate, ...]:
        """The same as what hooks and exports take: one `Ablate`, of a peak one for each block."""
        if self.shape == "flat":
            return (Ablate(self.direction, self.strength, range(self.first, self.last), self.components),)
        return tuple(
            Ablate(self.direction, strength, [block], self.components) for block, strength in self.strengths().items()
        )

    @property
    def label(self) -> str:
        """In words, blocks as a half-open range."""
        parts = "+".join(self.components)
        shape = "" if self.shape == "flat" else f" at its peak, {self.floor:.3g} at its ends"
        return (
            f"blocks {self.first}:{self.last}, {parts}, strength {self.strength:.3g}{shape}, "
            f"direction of layer {self.direction.layer}"
        )


def complement(removal: Removal, n_layers: int) -> dict[str, float]:
    """Everything except what a removal touches, whole.

    Examples:
        >>> n = model.cfg.n_layers
        >>> some = Removal(direction, 2, 4)
        >>> len(some.weights(n)) + len(complement(some, n)) == 1 + 2 * n
        True
    """
    touched = removal.weights(n_layers)
    return {name: 1.0 for name in write_hooks(n_layers) if name not in touched}


@dataclass(frozen=True, eq=False, repr=False)
class RemovalItem(Value):
    """Removals that share passes, and the prompts they are scored on; an item of a `RemovalScorer`."""

    removed: tuple[Direction | Basis, ...]
    weights: tuple[Weights, ...]
    n_harmful: int
    """The first so many prompts."""
    n_harmless: tuple[int, ...]
    """The last of them are scored. The plain model runs the first so many in turn, each time those that are new: which
    prompts share one of its passes changes the rounding."""

    def __str__(self) -> str:
        return f"{len(self.weights)} removals on {self.n_harmful} and {self.n_harmless[-1]} prompts"


class RemovalScorer:
    """Refusal scores of harmful prompts and KL of harmless ones under removals, without generating; an engine's `Job`.

    The KL is the mean over the first tokens of an answer, teacher-forced on the plain model's own; over the first
    token alone it is the KL of the search for directions.

    Examples:
        >>> scorer = RemovalScorer(model, chat, harmful, harmless, [5, 7])
        >>> scorer.score([direction], [Removal(direction, 2, 4).weights(model.cfg.n_layers)], range(2)).shape
        torch.Size([1, 2])
    """

    _n_read: tuple[int, ...] = ()
    """How many harmless prompts were scored, in the order of the first time."""

    def __init__(
        self,
        model: HookedModel,
        chat: ChatFormat,
        harmful: Prompts,
        harmless: Prompts,
        tokens: RefusalTokens,
        *,
        answers: Sequence[Sequence[int]] = (),
        n_kl: int = 1,
        batch_size: int | None = None,
    ) -> None:
        """
        Args:
            answers: token ids of the plain model's greedy answers to the harmless prompts, for `n_kl` over 1.
            n_kl: over how many of their tokens the KL goes; shorter ones have what they have.
            batch_size: most rows (prompts × removals) in a pass.
        """
        check_raw_basis(model)
        harmful, harmless = as_prompts(harmful), as_prompts(harmless)
        given: dict[str, Any] = {"answers": answers, "n_kl": n_kl, "batch_size": batch_size}
        sets = {"chat": chat, "harmful": list(harmful), "harmless": list(harmless), "tokens": tokens}
        self._again: Callable[[HookedModel], RemovalScorer] = partial(RemovalScorer, **sets, **given)  # type: ignore[arg-type]
        if not harmful or not harmless:
            raise UserError(f"removals need prompts on both sides, not {len(harmful)} and {len(harmless)}")
        if n_kl > 1 and len(answers) != len(harmless):
            raise UserError(f"KL over {n_kl} tokens needs the plain answer to every harmless prompt")
        self.model, self.pad_id, self.batch_size = model, chat.pad_id, batch_size
        self.tokens, self.n_harmful, self.n_harmless = RefusalPrefixes.of(tokens), len(harmful), len(harmless)
        encoded = chat.encode_all([*harmful, *harmless])
        asked, harmless_rows = encoded[: len(harmful)], encoded[len(harmful) :]
        rows = [*([*row, *context] for context in self.tokens.contexts for row in asked), *harmless_rows]
        check_fits(model, rows)
        self.passes: Passes = passes_for(model, rows, chat.pad_id, batch_size)
        self._first_harmless = len(rows) - len(harmless)
        self._answered = None if n_kl == 1 else _Answered.of(harmless_rows, answers, n_kl)
        if self._answered is not None:
            check_fits(model, self._answered.rows)
        self._plain: dict[int, Tensor] = {}

    def measure(
        self,
        removed: Sequence[Direction | Basis],
        weights: Sequence[Weights],
        n_prompts: int,
        *,
        about: str,
        engine: Engine | None = None,
        at_once: int = AT_ONCE,
    ) -> tuple[Float[Tensor, "removal harmful"], Float[Tensor, "removal harmless"]]:
        """Scores and KL of the first prompts of both sides under every removal, measured here or by an engine."""
        items = self._cut(removed, weights, n_prompts, at_once)
        here = ((index, self._scored(item)) for index, item in enumerate(items))
        runs = here if engine is None else engine.run(self, self.model, items)
        found = dict(track(runs, about, total=len(items)))
        scores, kl = zip(*(found[index] for index in range(len(items))), strict=True)
        return torch.cat(scores), torch.cat(kl)

    def _cut(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], n_prompts: int, at_once: int
    ) -> list[RemovalItem]:
        n_harmful, n = min(n_prompts, self.n_harmful), min(n_prompts, self.n_harmless)
        if n not in self._n_read:
            self._n_read = (*self._n_read, n)
        before = self._n_read[: self._n_read.index(n) + 1]
        parts = [slice(start, start + at_once) for start in range(0, len(weights), at_once)]
        return [RemovalItem(tuple(removed[some]), tuple(weights[some]), n_harmful, before) for some in parts]

    def start(self, model: HookedModel) -> Callable[[RemovalItem], tuple[Tensor, Tensor]]:
        """`run`, for another copy of the model that of a scorer like this one."""
        return (self if model is self.model else self._again(model)).run

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None, "_again": self._again}

    def run(self, item: RemovalItem) -> tuple[Float[Tensor, "removal harmful"], Float[Tensor, "removal harmless"]]:
        """Scores and KL under the removals of an item."""
        for n in item.n_harmless[:-1]:
            self._run_plain(range(n))
        return self._scored(item)

    def _scored(self, item: RemovalItem) -> tuple[Tensor, Tensor]:
        return (
            self.score(item.removed, item.weights, range(item.n_harmful)),
            self.kl(item.removed, item.weights, range(item.n_harmless[-1])),
        )

    def _run_plain(self, harmless: Sequence[int]) -> None:
        if self._answered is not None:
            self._read_plain(self._answered, harmless)
        else:
            self.passes.plain([self._first_harmless + prompt for prompt in harmless])

    def score(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], harmful: Sequence[int]
    ) -> Float[Tensor, "removal prompt"]:
        """Refusal score (nats, float64) of these prompts under every removal: of a direction, or of a basis' span."""
        p: list[list[Tensor]] = [[] for _ in weights]
        for index, context in enumerate(self.tokens.contexts):
            places = [index * self.n_harmful + prompt for prompt in harmful]
            for of_removal, logits in zip(p, self.passes.removed(removed, weights, places), strict=True):
                of_removal.append(as_double(logits).softmax(-1)[:, self.tokens.after(context)].cpu())
        return torch.stack([self.tokens.score_of(of_removal) for of_removal in p])

    def kl(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], harmless: Sequence[int]
    ) -> Float[Tensor, "removal prompt"]:
        """KL (nats per token, float64) of these prompts under every removal."""
        if self._answered is not None:
            return self._kl_of_answers(self._answered, removed, weights, harmless)
        places = [self._first_harmless + prompt for prompt in harmless]
        plain, changed = self.passes.plain(places), self.passes.removed(removed, weights, places)
        return torch.stack([kl_nats(plain, logits).cpu() for logits in changed])

    def _kl_of_answers(
        self,
        answered: "_Answered",
        removed: Sequence[Direction | Basis],
        weights: Sequence[Weights],
        harmless: Sequence[int],
    ) -> Float[Tensor, "removal prompt"]:
        self._read_plain(answered, harmless)
        table = torch.empty(len(weights), len(harmless), dtype=torch.float64)
        for some, places, logits in self._passes(answered, removed, weights, harmless):
            for column, prompt in enumerate(harmless[place] for place in places):
                changed = logits[:, column, -answered.n_read[prompt] :]
                plain = self._plain[prompt].to(changed).expand_as(changed)
                kl = kl_nats(plain.flatten(0, 1), changed.flatten(0, 1)).reshape(len(changed), -1)
                table[some, places[column]] = kl.mean(-1).cpu()
        return table

    def _read_plain(self, answered: "_Answered", harmless: Sequence[int]) -> None:
        new = [prompt for prompt in harmless if prompt not in self._plain]
        for _, places, logits in self._passes(answered, [], [], new) if new else ():
            for column, prompt in enumerate(new[place] for place in places):
                self._plain[prompt] = logits[0, column, -answered.n_read[prompt] :].cpu()
        if sum(each.numel() for each in self._plain.values()) > MOST_PLAIN:
            raise UserError("the plain model's logits take more than 2 GiB: use fewer --kl-tokens or fewer prompts")

    def _passes(
        self,
        answered: "_Answered",
        removed: Sequence[Direction | Basis],
        weights: Sequence[Weights],
        harmless: Sequence[int],
    ) -> Iterator[tuple[slice, list[int], Float[Tensor, "removal prompt pos d_vocab"]]]:
        """Logits of the answers' positions under some removals, of some prompts; no removals is the plain model."""
        rows, device = [answered.rows[prompt] for prompt in harmless], model_device(self.model)
        width, n_tail = max(map(len, rows)), max(answered.n_read[prompt] for prompt in harmless)
        most = self.batch_size or min(
            PASS_TOKENS.get(device.type, PASS_TOKENS["cpu"]) // width, MOST_LOGITS // (n_tail * self.model.cfg.d_vocab)
        )
        for places in batches_by_length(rows, max(1, most)):
            batch = left_pad([rows[place] for place in places], self.pad_id).to(device)
            n_at_once = max(1, most // len(places))
            for start in range(0, max(1, len(weights)), n_at_once):
                some = slice(start, min(start + n_at_once, max(1, len(weights))))
                yield some, places, self._logits(removed[some], weights[some], batch, n_tail)

    def _logits(
        self, removed: Sequence[Direction | Basis], weights: Sequence[Weights], batch: TokenBatch, n_tail: int
    ) -> Float[Tensor, "removal prompt pos d_vocab"]:
        n_copies = max(1, len(weights))
        hooks = AblateWritesEach.of(removed, weights).hooks(self.model) if weights else []
        repeated = TokenBatch(batch.tokens.repeat(n_copies, 1), batch.mask.repeat(n_copies, 1))
        with torch.no_grad(), running(self.model, hooks):
            logits = tail_logits(self.model, repeated, n_tail)
        return logits.unflatten(0, (n_copies, len(batch.tokens)))


@dataclass(frozen=True)
class _Answered:
    """Prompts with the beginning of the plain model's answer, and how many of the last positions are read."""

    rows: list[list[int]]
    n_read: list[int]

    @classmethod
    def of(cls, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], n: int) -> "_Answered":
        given = [list(answer)[: n - 1] for answer in answers]
        return cls(
            [[*row, *answer] for row, answer in zip(asked, given, strict=True)], [1 + len(each) for each in given]
        )
