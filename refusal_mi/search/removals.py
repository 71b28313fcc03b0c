"""Removals of a direction from some writes only: described, turned into `Ablate`, and scored many to a pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..interventions import Ablate, Constant, PromptWidth, check_width, hook_of
from ..measures import RefusalPrefixes, RefusalTokens, kl_nats
from ..model.points import Component, Hook, HookedModel, check_raw_basis, model_device, write_hooks
from ..model.running import check_fits, running, tail_logits
from ..precision import as_double
from ..text.batches import TokenBatch, batches_by_length, left_pad
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..values import Value
from .passes import PASS_TOKENS

Weights = Mapping[str, float]
"""Hook point of a write -> the fraction of the component along the direction that is removed there; others keep it."""
Shape = Literal["flat", "peak"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
MOST_LOGITS = 2**26
"""Numbers in the logits of one pass."""
MOST_PLAIN = 2**29
"""Numbers in the plain model's logits, which are kept for the KL."""


@dataclass(frozen=True, eq=False, repr=False)
class Removal(Value):
    """A direction removed from the writes of a band of blocks.

    "flat" removes `strength` of it in every block of [first, last). "peak" removes
    w(l) = strength + (|l − centre| / half)(floor − strength) up to a distance of `half` blocks, and nothing beyond.
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
    """Everything except what a removal touches, whole."""
    touched = removal.weights(n_layers)
    return {name: 1.0 for name in write_hooks(n_layers) if name not in touched}


@dataclass(frozen=True, eq=False, repr=False)
class AblateWritesEach(Value):
    """`Ablate` with a direction and strengths of its own for every group of rows, which come group by group."""

    units: Float[Tensor, "group d_model"]
    weights: tuple[Weights, ...]

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook per write that any group changes."""
        names = [name for name in write_hooks(model.cfg.n_layers) if any(each.get(name) for each in self.weights)]
        return [self._hook(name, prompt_width) for name in names]

    def _hook(self, name: str, prompt_width: PromptWidth) -> Hook:
        units = Constant(self.units)
        amounts = Constant(torch.tensor([each.get(name, 0.0) for each in self.weights], dtype=torch.float64))

        def project_out(x: Tensor) -> Tensor:
            columns = units.beside(x)[:, :, None]
            grouped = x.reshape(len(self.units), -1, x.shape[-1])
            removed = amounts.beside(x)[:, None, None] * (grouped @ columns)
            return torch.baddbmm(grouped, removed, columns.mT, alpha=-1).reshape(x.shape)

        return name, hook_of(project_out, "all", prompt_width)


class RemovalScorer:
    """Refusal scores of harmful prompts and KL of harmless ones under removals, without generating.

    The KL is the mean over the first tokens of an answer, teacher-forced on the plain model's own; over the first
    token alone it is the KL of the search for directions.
    """

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
        if not harmful or not harmless:
            raise UserError(f"removals need prompts on both sides, not {len(harmful)} and {len(harmless)}")
        if n_kl > 1 and len(answers) != len(harmless):
            raise UserError(f"KL over {n_kl} tokens needs the plain answer to every harmless prompt")
        self.model, self.pad_id, self.batch_size = model, chat.pad_id, batch_size
        self.tokens, self.n_harmful, self.n_harmless = RefusalPrefixes.of(tokens), len(harmful), len(harmless)
        encoded = chat.encode_all([*harmful, *harmless])
        self._asked = encoded[: len(harmful)]
        given = [list(answer)[: n_kl - 1] for answer in answers] or [[]] * len(harmless)
        self._answered = [[*row, *answer] for row, answer in zip(encoded[len(harmful) :], given, strict=True)]
        self._n_kl = [1 + len(answer) for answer in given]
        check_fits(model, [[*row, *context] for context in self.tokens.contexts for row in self._asked])
        check_fits(model, self._answered)
        self._plain: dict[int, Tensor] = {}

    def score(
        self, directions: Sequence[Direction], weights: Sequence[Weights], harmful: Sequence[int]
    ) -> Float[Tensor, "removal prompt"]:
        """Refusal score (nats, float64) of these prompts under every removal."""
        by_context = []
        for context in self.tokens.contexts:
            ids = self.tokens.after(context)
            table = torch.empty(len(weights), len(harmful), len(ids), dtype=torch.float64)
            rows = [[*self._asked[prompt], *context] for prompt in harmful]
            for some, places, logits in self._passes(directions, weights, rows, 1):
                p = as_double(logits[:, :, 0]).softmax(-1)[..., ids].cpu()
                table[some, places] = p
            by_context.append(table)
        return torch.stack([self.tokens.score_of([table[row] for table in by_context]) for row in range(len(weights))])

    def kl(
        self, directions: Sequence[Direction], weights: Sequence[Weights], harmless: Sequence[int]
    ) -> Float[Tensor, "removal prompt"]:
        """KL (nats per token, float64) of these prompts under every removal."""
        self._read_plain(harmless)
        table = torch.empty(len(weights), len(harmless), dtype=torch.float64)
        rows, n_most = [self._answered[prompt] for prompt in harmless], max(self._n_kl[prompt] for prompt in harmless)
        for some, places, logits in self._passes(directions, weights, rows, n_most):
            for column, place in enumerate(places):
                prompt = harmless[place]
                changed = logits[:, column, -self._n_kl[prompt] :]
                plain = self._plain[prompt].to(changed).expand_as(changed)
                kl = kl_nats(plain.flatten(0, 1), changed.flatten(0, 1)).reshape(len(changed), -1)
                table[some, place] = kl.mean(-1).cpu()
        return table

    def _read_plain(self, harmless: Sequence[int]) -> None:
        new = [prompt for prompt in harmless if prompt not in self._plain]
        if not new:
            return
        n_most = max(self._n_kl[prompt] for prompt in new)
        for _, places, logits in self._passes([], [], [self._answered[prompt] for prompt in new], n_most):
            for column, place in enumerate(places):
                self._plain[new[place]] = logits[0, column, -self._n_kl[new[place]] :].cpu()
        if sum(each.numel() for each in self._plain.values()) > MOST_PLAIN:
            raise UserError("the plain model's logits take more than 2 GiB: use fewer --kl-tokens or fewer prompts")

    def _passes(
        self, directions: Sequence[Direction], weights: Sequence[Weights], rows: Sequence[Sequence[int]], n_tail: int
    ) -> Iterator[tuple[slice, list[int], Float[Tensor, "removal prompt pos d_vocab"]]]:
        """Logits of the last positions of some rows under some removals; none at all is the plain model."""
        width, device = max(map(len, rows)), model_device(self.model)
        most = self.batch_size or min(
            PASS_TOKENS.get(device.type, PASS_TOKENS["cpu"]) // width, MOST_LOGITS // (n_tail * self.model.cfg.d_vocab)
        )
        for places in batches_by_length(rows, max(1, most)):
            batch = left_pad([rows[place] for place in places], self.pad_id).to(device)
            n_at_once = max(1, most // len(places))
            for start in range(0, max(1, len(weights)), n_at_once):
                some = slice(start, min(start + n_at_once, max(1, len(weights))))
                yield some, places, self._logits(directions[some], weights[some], batch, n_tail)

    def _logits(
        self, directions: Sequence[Direction], weights: Sequence[Weights], batch: TokenBatch, n_tail: int
    ) -> Float[Tensor, "removal prompt pos d_vocab"]:
        n_copies, hooks = max(1, len(weights)), list[Hook]()
        if weights:
            units = torch.stack([direction.unit for direction in directions])
            check_width(units.shape[-1], self.model.cfg.d_model)
            hooks = AblateWritesEach(units, tuple(weights)).hooks(self.model)
        repeated = TokenBatch(batch.tokens.repeat(n_copies, 1), batch.mask.repeat(n_copies, 1))
        with torch.no_grad(), running(self.model, hooks):
            logits = tail_logits(self.model, repeated, n_tail)
        return logits.unflatten(0, (n_copies, len(batch.tokens)))
