"""`variants.json`: the same requests in other wordings, and what that does to refusals and to the stream."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_record
from ..model.provenance import ModelRecord
from ..stats import Rate
from ..text.variants import Variant
from ..values import Value, frame

FILE = "variants.json"
Interval = tuple[float, float, float]
"""A mean over prompts and its 95% interval by Student's t."""
Grid = tuple[tuple[Interval, ...], ...]
"""By template position, the last one last, and layer 0..n_layers."""


@dataclass(frozen=True, eq=False, repr=False)
class Wording(Value):
    """Prompts of one side in one wording."""

    refused: Rate
    """Judged by text."""
    degenerate: Rate
    score_nats: Interval
    """Refusal score of the first token."""
    projections: Grid
    """⟨x, r̂⟩ at the template positions (residual stream units)."""
    random_projections: Grid
    """The same on a random unit vector."""
    attention: Mapping[str, Interval]
    """Part of the prompt (`text.variants.PARTS`) -> attention of the last token to it, mean over `heads`."""
    written: Mapping[str, Interval]
    """What these heads write along r̂, by the part that they read it from (residual stream units, summed)."""
    n_tokens: Mapping[str, float]
    """Mean number of tokens of each part."""
    n_shared: int
    """Prompts in which a token has letters of two parts."""
    first_words: Mapping[str, int]
    """The most frequent beginnings of the answers."""


@dataclass(frozen=True, eq=False, repr=False)
class Change(Value):
    """One wording minus another, the same prompts."""

    refused: Mapping[str, float | int]
    """Difference of the rates with its interval, and McNemar's exact p."""
    p_holm: float
    """p adjusted over the variants (Holm), this side and kind of change alone."""
    score_nats: Interval
    projections: Grid
    random_projections: Grid


@dataclass(frozen=True, eq=False, repr=False)
class SideRow(Value):
    """A variant and its control, on one side."""

    given: Wording
    control: Wording
    """As many tokens of everyday words drawn at random in place of the variant's own."""
    change: Change
    """The variant minus the plain requests."""
    control_change: Change
    """The control minus the plain requests."""
    beyond_control: Change
    """The variant minus its control."""


@dataclass(frozen=True, eq=False, repr=False)
class VariantRow(Value):
    """A variant on both sides."""

    variant: Variant
    sides: Mapping[str, SideRow]
    """"harmful" and "harmless"."""

    @property
    def name(self) -> str:
        return self.variant.name


@dataclass(frozen=True, eq=False, repr=False)
class VariantsResult(Value):
    """`variants.json`."""

    model: ModelRecord
    direction_layer: int
    direction_position: int | None
    positions: tuple[int, ...]
    """The template positions of the grids."""
    position_tokens: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    """(layer, head) that write most along r̂ at the last position of plain harmful validation prompts."""
    n_prompts: Mapping[str, int]
    max_new_tokens: int
    seed: int
    plain: Mapping[str, Wording]
    """Of each side."""
    rows: tuple[VariantRow, ...]
    judge: str
    """Who said what a refusal is."""
    cautions: tuple[str, ...] = ()
    """Where the judge that looks for English phrases may have missed refusals."""

    @classmethod
    def load(cls, path: str | Path) -> "VariantsResult":
        """Read `variants.json`, or the one in this folder."""
        path = Path(path)
        return read_record(path / FILE if path.is_dir() else path, cls)

    @property
    def slot(self) -> int:
        """The index of the direction's own position, else of the last one."""
        position = self.direction_position
        return self.positions.index(position) if position in self.positions else len(self.positions) - 1

    def row(self, name: str) -> VariantRow:
        """One variant's."""
        return next(each for each in self.rows if each.name == name)

    def acts_at(self, name: str, side: str = "harmful") -> tuple[int, ...]:
        """The layers at which, at the direction's position, the projection is changed beyond the control.

        The intervals (pointwise, 95%) of the change from plain and from the control exclude 0 on one side.
        """
        row = self.row(name).sides[side]
        layers = zip(row.change.projections[self.slot], row.beyond_control.projections[self.slot], strict=True)
        signs = [(_sign(change), _sign(beyond)) for change, beyond in layers]
        return tuple(layer for layer, (change, beyond) in enumerate(signs) if change == beyond != 0)

    def differs_at(self, name: str, side: str = "harmful") -> tuple[int, ...]:
        """The layers at which it differs from the control at all: also where it changes less, or the other way."""
        beyond = self.row(name).sides[side].beyond_control.projections[self.slot]
        return tuple(layer for layer, each in enumerate(beyond) if _sign(each) != 0)

    def in_words(self, layers: Sequence[int]) -> str:
        """Layers as "at no layer", "at layers 1–7, not up to the last" or "from layer 4 on"."""
        last = len(next(iter(self.plain.values())).projections[0]) - 1
        runs: list[list[int]] = []
        for layer in layers:
            if runs and layer == runs[-1][1] + 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        if not runs:
            return "at no layer"
        tail = f"from layer {runs.pop()[0]} on" if runs[-1][1] == last else ""
        between = ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)
        many = "layer" if between.isdigit() else "layers"
        if not tail:
            return f"at {many} {between}, not up to the last"
        return f"at {many} {between} and {tail}" if between else tail

    def wordings(self, side: str) -> Iterator[tuple[str, Wording, Change | None]]:
        """The plain requests, every variant, and its control: name, what was measured, change from plain."""
        yield "plain", self.plain[side], None
        for row in self.rows:
            each = row.sides[side]
            yield row.name, each.given, each.change
            yield f"{row.name} (control)", each.control, each.control_change

    def to_frame(self) -> Any:
        """A pandas table with a row for each side and wording."""
        return frame(
            [
                {"side": side, "wording": name, "refused": each.refused.value, "degenerate": each.degenerate.value}
                | {"score": each.score_nats[0], "p_holm": None if change is None else change.p_holm}
                | {f"attention_{part}": value[0] for part, value in each.attention.items()}
                | {f"written_{part}": value[0] for part, value in each.written.items()}
                for side in self.plain
                for name, each, change in self.wordings(side)
            ]
        )


def _sign(interval: Interval) -> int:
    _, low, high = interval
    return 1 if low > 0 else -1 if high < 0 else 0
