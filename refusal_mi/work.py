"""The search cut into pure pieces of work: numbers of candidates and prompts in, scores out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .chat import ChatFormat
from .directions import DirectionGrid
from .errors import UserError
from .models import HookedModel, check_raw_basis
from .passes import Passes, PlainPasses, choose_passes
from .scores import kl_nats, refusal_score

Kind = Literal["ablate", "add"]
Place = tuple[int, int]
"""A candidate: its position and layer."""

ITEM_ROWS = 512
"""Most rows (candidates × prompts) in an item: what bounds the logits that are held at once."""


@dataclass(frozen=True)
class WorkItem:
    """Candidates to be scored on prompts. Nothing is drawn at random: the same item gives the same numbers anywhere."""

    kind: Kind
    """"ablate": refusal score of harmful prompts, KL of harmless ones; "add": refusal score of harmless prompts."""
    candidates: tuple[Place, ...]
    """For "add" all of one layer."""
    prompts: tuple[int, ...]
    """Harmful validation prompts are 0 .. n − 1, harmless ones follow."""

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "WorkItem":
        """Read what `describe` gave, from JSON."""
        return cls(record["kind"], tuple((p, layer) for p, layer in record["candidates"]), tuple(record["prompts"]))


def cut(kind: Kind, candidates: Sequence[Place], prompts: Sequence[int]) -> Iterator[WorkItem]:
    """Items of at most `ITEM_ROWS` rows that together score every candidate on every prompt."""
    groups: dict[int, list[Place]] = {}
    for place in candidates:
        groups.setdefault(place[1] if kind == "add" else 0, []).append(place)
    at_once = max(1, ITEM_ROWS // max(1, len(prompts)))
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), at_once):
            yield WorkItem(kind, tuple(group[start : start + at_once]), tuple(prompts))


class Scorer:
    """Runs items for one model, one grid of candidates and one set of validation prompts."""

    def __init__(
        self,
        model: HookedModel,
        chat: ChatFormat,
        grid: DirectionGrid,
        harmful: Sequence[str],
        harmless: Sequence[str],
        token_sets: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        share_work: bool = True,
    ) -> None:
        check_raw_basis(model)
        if not harmful or not harmless:
            raise UserError(
                f"the sweep needs prompts on both sides, not {len(harmful)} harmful, {len(harmless)} harmless"
            )
        self.grid, self.token_sets = grid, token_sets
        self.n_harmful, self.n_prompts = len(harmful), len(harmful) + len(harmless)
        rows = [chat.encode(instruction) for instruction in (*harmful, *harmless)]
        self.passes: Passes = (choose_passes if share_work else PlainPasses)(model, rows, chat.pad_id, batch_size)

    @cached_property
    def baseline(self) -> Float[Tensor, "token_set prompt"]:
        """Refusal score (nats) of every prompt in the plain model."""
        return self._scores(self.passes.plain(range(self.n_prompts)))

    def run(self, item: WorkItem) -> Float[Tensor, "token_set candidate prompt"]:
        """The item's scores in nats, on the CPU, float64."""
        directions = [self.grid.direction(*place) for place in item.candidates]
        if item.kind == "add":
            return torch.stack([self._scores(logits) for logits in self.passes.added(directions, item.prompts)], dim=1)
        harmless = [index for index, prompt in enumerate(item.prompts) if prompt >= self.n_harmful]
        harmful = [index for index, prompt in enumerate(item.prompts) if prompt < self.n_harmful]
        plain = self.passes.plain([item.prompts[index] for index in harmless]) if harmless else None
        found = torch.empty(len(self.token_sets), len(directions), len(item.prompts), dtype=torch.float64)
        for candidate, logits in enumerate(self.passes.ablated(directions, item.prompts)):
            if harmful:
                found[:, candidate, harmful] = self._scores(logits[harmful])
            if plain is not None:
                found[:, candidate, harmless] = kl_nats(plain, logits[harmless]).cpu()
        return found

    def _scores(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "token_set prompt"]:
        return torch.stack([refusal_score(logits, tokens).cpu().double() for tokens in self.token_sets])
