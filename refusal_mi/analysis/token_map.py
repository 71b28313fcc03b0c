"""One prompt, every token, every layer: where along the text the direction appears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..directions import Direction
from ..models import HookedModel
from ..precision import as_double
from ..reading import stream_residuals
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of


@dataclass(frozen=True)
class TokenMapResult(AnalysisResult):
    """Projection and cosine of one prompt's stream, on the direction and on a random one."""

    kind: ClassVar[str] = "token_map"
    units: ClassVar[Mapping[str, str]] = {
        "projections": "residual stream units",
        "cosines": "cosine, -1 to 1",
        "control_cosines": "cosine with a random vector, -1 to 1",
    }

    projections: Float[Tensor, "pos layer"]
    """float64; layers 0..n_layers."""
    cosines: Float[Tensor, "pos layer"]
    control_cosines: Float[Tensor, "pos layer"]
    tokens: tuple[str, ...]
    """Vocabulary entries, in the order of the text."""
    prompt: str
    n_template: int
    """How many of the last tokens belong to the template."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.projections):
            raise ValueError(f"{len(self.tokens)} tokens for {len(self.projections)} positions")


def map_tokens(
    model: HookedModel, chat: ChatFormat, direction: Direction, prompt: str, *, seed: int = 0
) -> TokenMapResult:
    """⟨x, r̂⟩ and its cosine at every token of one templated prompt and every layer."""
    ids = chat.encode(prompt)
    ((_, streams),) = stream_residuals(model, chat, [prompt], n_last=len(ids))
    x = as_double(streams[0]).cpu()
    units = torch.stack([direction.unit, direction.random_like(seed).unit])
    along = torch.einsum("pld,kd->kpl", x, units)
    cosines = along / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    return TokenMapResult(
        along[0],
        cosines[0],
        cosines[1],
        tuple(chat.tokenizer.convert_ids_to_tokens(ids)),
        prompt,
        len(chat.positions),
        provenance=provenance_of(model, chat, {"prompt": [prompt]}, {"seed": seed, "direction": direction.describe()}),
    )


def from_run(run: RunInputs) -> TokenMapResult:
    """The first held-out harmful prompt of a run."""
    return map_tokens(run.model, run.chat, run.direction, run.prompts("harmful")[0], seed=run.seed)
