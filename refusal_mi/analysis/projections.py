"""How far prompts lie along a direction: projection and cosine of the stream at every layer and position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..directions import Direction
from ..errors import UserError
from ..interventions import Intervention
from ..models import HookedModel
from ..precision import as_double
from ..reading import stream_residuals
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of


@dataclass(frozen=True)
class ProjectionsResult(AnalysisResult):
    """Projections and cosines of every prompt, on the direction and on a random one, at the last positions."""

    kind: ClassVar[str] = "projections"
    units: ClassVar[Mapping[str, str]] = {
        "projections": "residual stream units",
        "cosines": "cosine, -1 to 1",
        "control_projections": "residual stream units, on a random unit vector",
        "control_cosines": "cosine with a random vector, -1 to 1",
        "direction_norm": "residual stream units",
    }

    projections: Float[Tensor, "prompt pos layer"]
    """float64; layers 0..n_layers."""
    cosines: Float[Tensor, "prompt pos layer"]
    control_projections: Float[Tensor, "prompt pos layer"]
    control_cosines: Float[Tensor, "prompt pos layer"]
    groups: tuple[str, ...]
    """The group of every prompt."""
    prompts: tuple[str, ...]
    positions: tuple[int, ...]
    """Counted from the end; the first is the last token of the instruction, the others the template's."""
    position_tokens: tuple[str, ...]
    """Text of the token at each position; that of the instruction differs between prompts."""
    direction_layer: int
    direction_position: int | None
    direction_norm: float

    def __post_init__(self) -> None:
        if not len(self.projections) == len(self.groups) == len(self.prompts):
            raise ValueError(f"{len(self.projections)} rows, {len(self.groups)} groups, {len(self.prompts)} prompts")
        if self.projections.shape != self.cosines.shape or self.projections.shape[1] != len(self.positions):
            raise ValueError(f"{tuple(self.projections.shape)} projections for {len(self.positions)} positions")

    @property
    def group_names(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(dict.fromkeys(self.groups))

    def rows(self, group: str) -> list[int]:
        """The rows of one group."""
        return [row for row, name in enumerate(self.groups) if name == group]


def project_residuals(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    groups: Mapping[str, Sequence[str]],
    *,
    interventions: Sequence[Intervention] = (),
    seed: int = 0,
    batch_size: int = 32,
) -> ProjectionsResult:
    """⟨x, r̂⟩ and ⟨x, r̂⟩ / ‖x‖ at every layer, the last instruction token and every post-instruction token.

    Arditi et al. (2024, figures 5 and 22). The control is a random direction of equal norm.

    Args:
        groups: name -> instructions; "harmful", "harmless", or any other.
        interventions: what is done to the model while it is read.
        seed: of the random direction.

    Raises:
        UserError: there is no group, or an empty one.
    """
    if not groups:
        raise UserError("projections need at least one group of prompts")
    prompts = [text for texts in groups.values() for text in texts]
    n_last = len(chat.positions) + 1
    units = torch.stack([direction.unit, direction.random_like(seed).unit])
    table = torch.empty(2, 2, len(prompts), n_last, model.cfg.n_layers + 1, dtype=torch.float64)
    offset = 0
    for texts in groups.values():
        stream = stream_residuals(model, chat, texts, n_last=n_last, interventions=interventions, batch_size=batch_size)
        for indices, residuals in stream:
            rows = [offset + index for index in indices]
            for layer in range(residuals.shape[2]):
                x = as_double(residuals[:, :, layer])
                along = torch.einsum("bpd,kd->kbp", x, units.to(x.device)).cpu()
                table[0, :, rows, :, layer] = along
                table[1, :, rows, :, layer] = along / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny).cpu()
        offset += len(texts)
    settings = {"seed": seed, "interventions": [repr(item) for item in interventions]}
    return ProjectionsResult(
        table[0, 0],
        table[1, 0],
        table[0, 1],
        table[1, 1],
        tuple(name for name, texts in groups.items() for _ in texts),
        tuple(prompts),
        tuple(range(-n_last, 0)),
        ("last instruction token", *chat.tokenizer.convert_ids_to_tokens(list(chat.post_instruction_ids))),
        direction.layer,
        direction.position,
        direction.norm,
        provenance=provenance_of(model, chat, groups, {**settings, "direction": direction.describe()}),
    )


def from_run(run: RunInputs) -> ProjectionsResult:
    """The held-out prompts of a run on its direction."""
    groups = {"harmful": run.prompts("harmful"), "harmless": run.prompts("harmless")}
    return project_residuals(run.model, run.chat, run.direction, groups, seed=run.seed, batch_size=run.batch_size)
