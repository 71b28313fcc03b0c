"""Was a direction removed from this checkpoint: which, where, how strongly? From weights alone, tensor by tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..export.held import files_of
from ..files import at_home
from ..interventions import Ablate, check_width
from ..model.families import Role, bare_name, text_config
from ..model.loading import resolve_source
from ..model.provenance import display_name
from ..model.writers import Writer
from ..progress import track
from ..values import Value
from .removal import Along, Removal, WriterPair, find_removal, sums_along
from .result import AuditResult, GivenAlong, KindChange, WriterChange
from .sources import Sides, open_sides

MIN_ROWS = 16
"""Inputs that a tensor must have to be evidence by itself: the change of a bias is always of rank one."""
IN_COMMON, CLOSE = 0.4, 0.9
"""Share of the writers that lost a common direction; |cos| of a writer's own with it, and share of a bias's change."""
_CHUNK, _N_COMPARED, _N_DRAWS = 2**22, 64, 10


def audit(
    base: Any,
    suspect: Any,
    directions: Direction | Tensor | Sequence[Direction | Tensor] | None = None,
    *,
    base_revision: str | None = None,
    suspect_revision: str | None = None,
) -> AuditResult:
    """Compare every tensor of a checkpoint with that of the checkpoint it was made from.

    Of every tensor that writes into the stream, with W before and W + D after: the directions along which D is
    −s times what W writes (`removal.find_removal`); over all of them the span that they have in common, and how much
    is left along it. Nothing is run, and no more than a tensor of each is held at a time.

    Examples:
        >>> found = audit(base, edited, direction)
        >>> found.verdict, round(found.cosines[0], 3)
        ('removed', 1.0)

    Args:
        base: a directory, hub id, None for the embedded model, or a model that is loaded already.
        suspect: the same, or the folder of a LoRA adapter of the base.
        directions: such as those that were found in the base, to compare with what was removed.

    Raises:
        UserError: one of them is no checkpoint whose tensors can be read and told apart, or they do not fit each other.
    """
    basis, given = _given(directions)
    with files_of(base, base_revision) as one, files_of(suspect, suspect_revision) as other:
        sides = open_sides(one[0], other[0], (one[1], other[1]))
        if basis is not None:
            check_width(basis.shape[1], sides.layout.d_model)
        changes = {name: _change(sides, name) for name in track(list(sides.roles), "comparing tensors")}
        span, agreements = _in_common(changes, sides.layout.d_model)
        writers = [
            _writer(sides, writer, changes[bare_name(writer.name)], span, basis, agreements)
            for writer in track(list(sides.layout.writers), "measuring what is left")
        ]
    config = text_config(sides.layout.config)
    return AuditResult(
        _name(one),
        _name(other),
        config.model_type,
        sides.layout.n_layers,
        sides.layout.d_model,
        tuple(writers),
        tuple(_kinds(sides, changes)),
        sides.added,
        span,
        mean(agreements.values()) if agreements else None,
        given,
        () if basis is None or not len(span) else tuple(torch.linalg.svdvals(span @ basis.T).clamp(max=1).tolist()),
        sides.remarks,
    )


def _name(files: tuple[str | Path | None, str | None, str | None]) -> str:
    """What a side is called, of what `files_of` gives."""
    source, _, name = files
    if name is not None:
        return name
    if source is not None and at_home(source).is_dir():  # an adapter too, which is no source of a model
        return display_name(str(at_home(source).resolve()))
    return display_name(resolve_source(source))


def _given(
    directions: Direction | Tensor | Sequence[Direction | Tensor] | None,
) -> tuple[Float[Tensor, "rank d_model"] | None, tuple[str, ...]]:
    """Orthonormal basis and names of the directions that were given."""
    if directions is None:
        return None, ()
    ablated = Ablate(directions)
    for each in ablated.each:
        if isinstance(each, Direction):
            check_in_stream(each)
    names = [
        f"vector {index}" if not isinstance(each, Direction) else f"layer {each.layer}"
        for index, each in enumerate(ablated.each)
    ]
    return ablated.basis, tuple(names)


@dataclass(frozen=True, eq=False, repr=False)
class _Change(Value):
    """How one tensor differs."""

    size: float
    """‖W′ − W‖ / ‖W‖."""
    is_rounding: bool
    removal: Removal

    @property
    def differs(self) -> bool:
        return self.size > 0 and not self.is_rounding


_NOTHING = Removal(torch.zeros(0, 0, dtype=torch.float64), (), 0.0, 0.0, (), "plain")


def _change(sides: Sides, name: str) -> _Change:
    base, suspect = sides.base.read(name), sides.suspect.read(name)
    if base.dtype == suspect.dtype and torch.equal(base, suspect):
        return _Change(0.0, False, _NOTHING)
    size = relative_change(base, suspect)
    if not math.isfinite(size):
        raise UserError(f"{name} holds numbers that are not finite in BASE or in SUSPECT: one of them is damaged")
    is_rounding = size > 0 and is_same_rounded(base, suspect, (sides.base.dtypes[name], sides.suspect.dtypes[name]))
    writer = {bare_name(each.name): each for each in sides.layout.writers}.get(name)
    if size == 0 or is_rounding or writer is None or base.numel() < MIN_ROWS * base.shape[writer.axis]:
        return _Change(size, is_rounding, _NOTHING)
    return _Change(size, False, find_removal(_pair(sides, writer, base, suspect)))


def _pair(sides: Sides, writer: Writer, base: Tensor, suspect: Tensor) -> WriterPair:
    if writer.post_norm is None:
        return WriterPair(base, suspect, writer.axis)
    norm, offset = bare_name(writer.post_norm), sides.layout.family.gain_offset
    gains = [side.read(norm).double() + offset for side in (sides.base, sides.suspect)]
    return WriterPair(base, suspect, writer.axis, *gains)


def relative_change(base: Shaped[Tensor, "..."], suspect: Shaped[Tensor, "..."]) -> float:
    """‖suspect − base‖ / ‖base‖ (Frobenius); 1 where the base is zero and the suspect is not."""
    change = size = 0.0
    for before, after in zip(base.reshape(-1).split(_CHUNK), suspect.reshape(-1).split(_CHUNK), strict=True):
        wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        before, after = before.to(wide), after.to(wide)
        change += (after - before).square().sum(dtype=torch.float64).item()
        size += before.square().sum(dtype=torch.float64).item()
    return math.sqrt(change / size) if size else (1.0 if change else 0.0)


def is_same_rounded(base: Shaped[Tensor, "..."], suspect: Shaped[Tensor, "..."], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether both are the same numbers in one of the dtypes that they are stored in."""
    flat = base.reshape(-1).split(_CHUNK), suspect.reshape(-1).split(_CHUNK)
    return any(
        all(torch.equal(one.to(dtype), other.to(dtype)) for one, other in zip(*flat, strict=True))
        for dtype in set(dtypes)
    )


def _in_common(
    changes: Mapping[str, _Change], d_model: int
) -> tuple[Float[Tensor, "removed d_model"], dict[str, float]]:
    """The span that most writers lost, and |cos| of each one's first direction with it.

    No rows where hardly any two agree: then each lost directions of its own.
    """
    found = [(name, each.removal) for name, each in changes.items() if each.removal.strengths]
    if not found:
        return torch.zeros(0, d_model, dtype=torch.float64), {}
    rows = torch.cat([removal.directions for _, removal in found])
    _, values, span = torch.linalg.svd(rows, full_matrices=False)
    n = max(1, int((values.square() >= IN_COMMON * len(found)).sum()))
    span = span[:n] * span[:n].gather(1, span[:n].abs().argmax(1, keepdim=True)).sign()
    agreements = {name: (span @ removal.directions[0]).norm().item() for name, removal in found}
    spans = [removal.directions for _, removal in found[:_N_COMPARED]]
    is_of_some = len(found) == 1 or mean(agreements.values()) >= CLOSE or nearest(spans) > nearest_by_chance(spans)
    return span if is_of_some else span[:0], agreements


def nearest(spans: Sequence[Float[Tensor, "_ d_model"]]) -> float:
    """Largest |cos| of each span (orthonormal rows) with any other: their mean."""
    rows = torch.zeros(len(spans), max(map(len, spans)), spans[0].shape[1], dtype=torch.float64)
    for index, span in enumerate(spans):
        rows[index, : len(span)] = span
    products = torch.einsum("aid, bjd -> abij", rows, rows)
    cosines = torch.linalg.matrix_norm(products, 2).fill_diagonal_(0)
    return cosines.amax(1).mean().item()


def nearest_by_chance(spans: Sequence[Float[Tensor, "_ d_model"]], *, seed: int = 0) -> float:
    """Halfway from what random spans of these ranks reach, of which some like each other are a part, to 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(span: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(span.T.shape, generator=generator, dtype=torch.float64)).Q.T

    return (1 + max(nearest([drawn(span) for span in spans]) for _ in range(_N_DRAWS))) / 2


def _writer(
    sides: Sides,
    writer: Writer,
    change: _Change,
    span: Float[Tensor, "removed d_model"],
    given: Float[Tensor, "rank d_model"] | None,
    agreements: dict[str, float],
) -> WriterChange:
    name, removal = bare_name(writer.name), change.removal
    lost = along = None
    is_like_all = bool(len(span)) and (not removal.strengths or agreements[name] >= CLOSE)
    where = span if is_like_all else removal.directions if removal.strengths else None
    if change.differs and (where is not None or given is not None):
        pair = _pair(sides, writer, sides.base.read(name), sides.suspect.read(name))
        lost = None if where is None else _along(pair, where)
        along = None if given is None else _along(pair, given)
    rank, is_alone = len(removal.strengths), writer.is_bias
    is_removal = lost is not None and (rank > 0 or (lost.is_removal and (not is_alone or lost.share >= CLOSE)))
    untouched = (0.0, 1.0) if len(span) else None
    strength, left = (lost.strength, lost.left) if lost is not None else untouched or (None, None)
    return WriterChange(
        writer.name,
        writer.component,
        writer.layer,
        change.size,
        change.is_rounding,
        is_removal,
        strength,
        left,
        rank,
        removal.fit,
        removal.explained,
        removal.shares,
        agreements.get(name),
        removal.frame,
        None if given is None else GivenAlong(0.0, 1.0) if along is None else GivenAlong(along.strength, along.left),
    )


def _along(pair: WriterPair, directions: Float[Tensor, "direction d_model"]) -> Along:
    """In units of the stream."""
    return sums_along(pair, directions, "plain" if pair.gain is None else "gain").along()


def _kinds(sides: Sides, changes: dict[str, _Change]) -> list[KindChange]:
    kinds = []
    for role in get_args(Role):
        of = [changes[name] for name, each in sides.roles.items() if each == role]
        sizes = [change.size for change in of if change.differs]
        if of:
            rounded = sum(change.is_rounding for change in of)
            kinds.append(KindChange(role, len(of), len(sizes), rounded, median(sizes) if sizes else 0.0))
    return kinds
