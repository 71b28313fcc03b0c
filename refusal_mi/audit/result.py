"""What an audit found: every writer's change, the verdict, and the numbers that it stands on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.families import Role
from ..model.points import Component
from ..values import Value, frame, html_table
from .removal import N_LEADING

Verdict = Literal["removed", "own", "other", "none"]
"""A direction was removed; every tensor lost directions of its own, and none is common to them; weights differ in other
ways alone; they are the same up to rounding."""
COMPONENTS: tuple[Component, ...] = ("embed", "attn", "mlp")


@dataclass(frozen=True)
class GivenAlong:
    """What is left of what the base writes along the span of the given directions."""

    strength: float
    """1 is removed whole."""
    left: float
    """‖R′Q‖ / ‖R Q‖."""


@dataclass(frozen=True, eq=False, repr=False)
class WriterChange(Value):
    """How a tensor that writes into the stream differs."""

    name: str
    component: Component
    block: int | None
    """None for an embedding."""
    change: float
    """‖W′ − W‖ / ‖W‖ (Frobenius)."""
    is_rounding: bool
    """Whether rounding to another dtype is all there is."""
    is_removal: bool
    strength: float | None
    """Of what it writes along the removed directions; 1 is removed whole. None where none was removed anywhere."""
    left: float | None
    """‖W′ᵀQ‖ / ‖WᵀQ‖: what still is written there, as a share of what the base writes."""
    rank: int
    """Directions that were removed, by this tensor alone."""
    fit: float
    """The most of a direction's change that its removal explains (`removal.Along.fit`)."""
    explained: float
    """Share of ‖W′ − W‖² that is removal, by this tensor alone."""
    shares: tuple[float, ...]
    """Of ‖W′ − W‖² in its leading singular vectors."""
    agreement: float | None
    """|cos| of its first removed direction with the span that all have in common."""
    frame: str
    """Where the removal was found: plain, gain, coordinate norms, input norms (`removal.Frame`)."""
    given: GivenAlong | None

    @property
    def differs(self) -> bool:
        """By more than rounding to another dtype."""
        return self.change > 0 and not self.is_rounding


@dataclass(frozen=True)
class KindChange:
    """Tensors that do the same."""

    role: Role
    n: int
    n_differ: int
    """By more than rounding to another dtype."""
    n_rounded: int
    change: float
    """Median of ‖W′ − W‖ / ‖W‖ of those that differ; 0 where none does."""


@dataclass(frozen=True, eq=False, repr=False)
class ComponentChange(Value):
    """One component over all blocks."""

    component: Component
    n: int
    n_differ: int
    n_removed: int
    in_blocks: str
    """From which a direction was removed: "0-9"."""
    strength: tuple[float, float, float] | None
    """Median, least and most of those."""
    left: float | None
    """Median of those."""
    agreement: float | None
    explained: float | None


@dataclass(frozen=True, eq=False, repr=False)
class AuditResult(Value):
    """What became of a checkpoint.

    Examples:
        >>> found = audit(base, edited)
        >>> found.verdict
        'removed'
        >>> found.in_blocks("mlp") == tuple(range(model.cfg.n_layers))
        True
    """

    base: str
    suspect: str
    model_type: str
    n_layers: int
    d_model: int
    writers: tuple[WriterChange, ...]
    kinds: tuple[KindChange, ...]
    added: tuple[str, ...]
    """Tensors that the base has not."""
    directions: Float[Tensor, "removed d_model"]
    """Orthonormal, float64: the span that the removed directions of all writers have in common; no rows if none, or
    if no two of them agree."""
    agreement: float | None
    """Mean |cos| of the writers' first removed directions with it; low where every block lost another one."""
    given: tuple[str, ...]
    """Names of the directions that were given."""
    cosines: tuple[float, ...]
    """Of the principal angles between both spans, the largest first."""
    remarks: tuple[str, ...] = ()
    """What the verdict says nothing of: a config that differs, an adapter of another base."""

    @property
    def verdict(self) -> Verdict:
        """Decided by every writer's own change."""
        if self.removed:
            return "removed" if len(self.directions) else "own"
        differs = self.added or any(kind.n_differ for kind in self.kinds)
        return "other" if differs else "none"

    @property
    def removed(self) -> tuple[WriterChange, ...]:
        """The writers that lost a direction."""
        return tuple(each for each in self.writers if each.is_removal)

    @property
    def of_ones(self) -> float | None:
        """|cos| of the direction that adds to all coordinates alike with the span; 1 where the mean was removed."""
        return self.directions.sum(1).norm().item() / self.d_model**0.5 if len(self.directions) else None

    @property
    def is_cut_off(self) -> bool:
        """Whether a tensor lost as many directions as are looked for, and maybe more."""
        return any(each.rank >= N_LEADING for each in self.writers)

    @property
    def chance(self) -> float:
        """Largest |cos| that 95% of random spans stay below, of as many directions as were removed and given."""
        return cosine_by_chance(max(1, len(self.directions)), max(1, len(self.cosines), len(self.given)), self.d_model)

    def in_blocks(self, component: Component | None = None) -> tuple[int, ...]:
        """The blocks whose writers lost a direction, of one component or any; the embedding is of no block."""
        of = [each for each in self.removed if component in (None, each.component) and each.block is not None]
        return tuple(sorted({each.block for each in of if each.block is not None}))

    def of_component(self, component: Component) -> ComponentChange:
        """One component over all blocks."""
        every = [each for each in self.writers if each.component == component]
        lost = [each for each in every if each.is_removal]
        strengths = [each.strength for each in lost if each.strength is not None]
        return ComponentChange(
            component,
            len(every),
            sum(each.differs for each in every),
            len(lost),
            in_ranges(self.in_blocks(component)),
            (median(strengths), min(strengths), max(strengths)) if strengths else None,
            _median(each.left for each in lost),
            _median(each.agreement for each in lost),
            _median(each.explained for each in lost if each.rank),
        )

    def explain(self) -> list[str]:
        """The verdict and the numbers that it stands on, a line each."""
        return [*self._reasons(), *self.remarks]

    def _reasons(self) -> list[str]:
        if self.verdict == "none":
            n = sum(kind.n_rounded for kind in self.kinds)
            how = f"{n} tensors are the same rounded to another dtype" if n else "every weight is the same"
            return [f"verdict: none ({how})"]
        others = ", ".join(self._others())
        if self.verdict == "other":
            fit = max(each.fit for each in self.writers)
            return [
                f"verdict: other changes, and no direction was removed ({others})",
                f"the most that a removal explains of what any writer's change does along one direction: {fit:.2f}",
                *self._of_given(),
            ]
        if self.verdict == "own":
            agreement = f"|cos| with what is most common {self.agreement:.3f} on average"
            return [
                f"verdict: each tensor lost directions of its own ({agreement}): low-rank compression does that too; "
                f"other changes: {others or 'none'}",
                self._where(),
                *self._of_given(),
            ]
        n = len(self.directions)
        how_many = "a direction was" if n == 1 else f"{n} directions were"
        if self.is_cut_off:
            how_many = f"at least {max(n, N_LEADING)} directions (of a tensor no more than {N_LEADING} are told) were"
        agreement = (
            "" if self.agreement is None else f" (|cos| of the writers' own with it {self.agreement:.3f} on average)"
        )
        if self.agreement is not None and self.agreement < 0.9 and not self.is_cut_off:
            agreement += ", of other blocks others"
        return [
            f"verdict: {how_many} removed{agreement}; other changes: {others or 'none'}",
            self._where(),
            *([_CENTRED] if self.of_ones is not None and self.of_ones > 0.99 else []),
            *self._of_given(),
        ]

    def _where(self) -> str:
        where = "; ".join(f"{part} {blocks}".strip() for part, blocks in self._places())
        strength, left = (_median(getattr(each, key) for each in self.removed) for key in ("strength", "left"))
        return (
            f"where: {len(self.removed)} of {len(self.writers)} tensors that write ({where}); strength {strength:.2f}, "
            f"{left:.1%} of what BASE writes there is left"
        )

    def _others(self) -> Iterator[str]:
        """What differs and is no removal."""
        for kind in self.kinds:
            lost = sum(each.is_removal for each in self.writers if each.component == kind.role)
            if kind.n_differ > lost:
                yield f"{kind.n_differ - lost} of {kind.n} {NAMES[kind.role]} by {kind.change:.2%}"
        if self.added:
            yield f"{len(self.added)} tensors are new"

    def _places(self) -> list[tuple[str, str]]:
        of = [(part, self.of_component(part)) for part in COMPONENTS]
        return [
            (NAMES[part], f"of blocks {each.in_blocks}" if each.in_blocks else "")
            for part, each in of
            if each.n_removed
        ]

    def _of_given(self) -> list[str]:
        if not self.given:
            return []
        names = f"the given direction ({self.given[0]})" if len(self.given) == 1 else f"the {len(self.given)} given"
        left = [each.given.left for each in self.writers if each.given is not None and each.differs]
        lines = []
        if self.cosines:
            cosines = ", ".join(f"{each:.4f}" for each in self.cosines)
            lines.append(f"|cos| with {names}: {cosines} (95% of random ones: below {self.chance:.2f})")
        if left:
            lines.append(
                f"of what BASE writes along {names}, {min(left):.1%} to {max(left):.1%} is left in these tensors"
            )
        return lines

    def __repr__(self) -> str:
        return "\n".join([f"Audit of {self.suspect} against {self.base}", *(f"  {line}" for line in self.explain())])

    def _repr_html_(self) -> str:
        head, rows = self.table()
        return html_table(f"{self.suspect} against {self.base}", head, rows, " · ".join(self.explain()))

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and rows, one for each component and kind of tensor."""
        head = ("tensors", "differ", "change", "lost it", "blocks", "strength", "left", "|cos|", "explains")
        rows = []
        for kind in self.kinds:
            row = (NAMES[kind.role], f"{kind.n_differ} of {kind.n}", f"{kind.change:.2%}" if kind.n_differ else "")
            part = self.of_component(kind.role) if kind.role in COMPONENTS else None
            rows.append((*row, *(("",) * 6 if part is None else _cells(part))))
        said = [index for index, _ in enumerate(head) if any(row[index] for row in rows)]
        return tuple(head[index] for index in said), [tuple(row[index] for index in said) for row in rows]

    def to_frame(self) -> Any:
        """A pandas table with a row for each tensor that writes.

        Raises:
            UserError: pandas is not installed.
        """
        names = [each.name for each in fields(WriterChange) if each.name not in ("shares", "given")]
        return frame([{name: getattr(each, name) for name in names} for each in self.writers])

    def describe(self) -> Mapping[str, Any]:
        """JSON values, without the directions themselves."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "directions"}
        return {
            "verdict": self.verdict,
            "n_directions": len(self.directions),
            "of_ones": self.of_ones,
            "explanation": self.explain(),
            "components": {part: self.of_component(part) for part in COMPONENTS},
            **own,
        }


_CENTRED = (
    "the mean over the coordinates of the stream (all ones) was removed: centred writers, which changes nothing in a "
    "LayerNorm model"
)


@cache
def cosine_by_chance(one: int, other: int, d_model: int) -> float:
    """Of the largest principal |cos| of two random spans of these sizes, what 95% stay below, by seeded draws."""
    few, many = min(one, other, d_model), min(max(one, other), d_model)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(d_model, few, generator=generator, dtype=torch.float64) for _ in range(1000))
    largest = [torch.linalg.matrix_norm(torch.linalg.qr(each).Q[:many], 2) for each in drawn]
    return min(1.0, torch.stack(largest).quantile(0.95).item())


NAMES: Mapping[Role, str] = {
    "embed": "embedding",
    "attn": "attention outputs",
    "mlp": "MLP outputs",
    "head": "unembedding",
    "reader": "readers of the stream",
    "norm": "norms",
    "other": "others",
}


def in_ranges(blocks: Sequence[int]) -> str:
    """ "0-3, 5" of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block - 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _cells(part: ComponentChange) -> tuple[str, ...]:
    if not part.n_removed:
        return (f"0 of {part.n}", *("",) * 5)
    strength = ""
    if part.strength is not None:
        middle, low, high = part.strength
        strength = f"{middle:.2f}" if high - low < 0.005 else f"{middle:.2f} ({low:.2f} to {high:.2f})"
    shown = ["" if value is None else f"{value:.3f}" for value in (part.left, part.agreement, part.explained)]
    return (f"{part.n_removed} of {part.n}", part.in_blocks, strength, *shown)
