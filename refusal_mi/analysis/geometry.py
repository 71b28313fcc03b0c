"""How the candidate directions lie to each other, how long they are, and how sure: bootstrap and shuffled labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..directions import MIN_RELATIVE_NORM
from ..errors import UserError
from ..models import HookedModel
from ..reading import template_residuals
from .inputs import RunInputs
from .result import AnalysisResult, provenance_of


@dataclass(frozen=True)
class GeometryResult(AnalysisResult):
    """Geometry of the difference in means at every position and layer; NaN where the two means do not differ."""

    kind: ClassVar[str] = "geometry"
    units: ClassVar[Mapping[str, str]] = {
        "cosines": "cosine, -1 to 1",
        "cosines_null_p95": "|cosine|, 95th percentile over shuffled labels",
        "norms": "residual stream units",
        "norms_null_p95": "residual stream units, 95th percentile over shuffled labels",
        "stability": "mean cosine between a bootstrap direction and the full one",
        "stability_p05": "the same, 5th percentile",
        "shuffled_p95": "|cosine| between a shuffled-label direction and the full one, 95th percentile",
    }

    cosines: Float[Tensor, "candidate candidate"]
    """Candidates in the order of the grid: position by position, layer within."""
    cosines_null_p95: Float[Tensor, "candidate candidate"]
    norms: Float[Tensor, "pos layer"]
    norms_null_p95: Float[Tensor, "pos layer"]
    stability: Float[Tensor, "pos layer"]
    stability_p05: Float[Tensor, "pos layer"]
    shuffled_p95: Float[Tensor, "pos layer"]
    positions: tuple[int, ...]
    position_tokens: tuple[str, ...]
    n_harmful: int
    n_harmless: int
    n_resamples: int

    def __post_init__(self) -> None:
        if self.norms.numel() != len(self.cosines) or len(self.norms) != len(self.positions):
            raise ValueError(f"{len(self.cosines)} candidates do not fill a grid of {tuple(self.norms.shape)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the candidates."""
        layers = range(self.norms.shape[1])
        return tuple(f"position {position}, layer {layer}" for position in self.positions for layer in layers)


def direction_geometry(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    n_resamples: int = 50,
    seed: int = 0,
    batch_size: int = 32,
) -> GeometryResult:
    """Cosines between all candidates with a null band, their norms, and their self-consistency.

    Neighboring layers share most of their stream, so that even directions of shuffled labels have high cosines
    there: only what exceeds the null band says something about refusal. Bootstrap samples are drawn with replacement
    inside each class. A shuffle puts half of each class on either side, so that nothing of their difference is left
    (after a plain shuffle, which is never quite balanced, some of it is).

    Args:
        n_resamples: bootstrap samples, and as many shuffles.

    Raises:
        UserError: fewer than 2 prompts on a side.
    """
    if min(len(harmful), len(harmless)) < 2 or n_resamples < 2:
        raise UserError("direction geometry needs at least 2 prompts on each side and 2 resamples")
    residuals = template_residuals(
        model, chat, [*harmful, *harmless], layers=range(model.cfg.n_layers), batch_size=batch_size
    )
    drawn = _weights(len(harmful), len(harmless), n_resamples, seed)
    found = _combine(residuals, drawn)
    scale = residuals.norm(dim=-1).mean(0).double()
    true, bootstrap, shuffled = found[0], found[1 : 1 + n_resamples], found[1 + n_resamples :]
    norms = true.norm(dim=-1)
    missing = norms <= MIN_RELATIVE_NORM * scale
    units = torch.where(missing[..., None], torch.nan, true / norms[..., None])
    shuffled_norms = shuffled.norm(dim=-1)
    again = _cosine(bootstrap, units)
    mixed = _cosine(shuffled, units).abs()
    return GeometryResult(
        _gram(units),
        torch.stack([_gram(_unit(one)).abs() for one in shuffled]).quantile(0.95, dim=0),
        torch.where(missing, 0.0, norms),
        shuffled_norms.quantile(0.95, dim=0),
        again.mean(0),
        again.quantile(0.05, dim=0),
        mixed.quantile(0.95, dim=0),
        chat.positions,
        tuple(chat.tokenizer.convert_ids_to_tokens(list(chat.post_instruction_ids))),
        len(harmful),
        len(harmless),
        n_resamples,
        provenance=provenance_of(
            model, chat, {"harmful": harmful, "harmless": harmless}, {"seed": seed, "n_resamples": n_resamples}
        ),
    )


def from_run(run: RunInputs) -> GeometryResult:
    """The candidates of a run, from its training prompts."""
    return direction_geometry(
        run.model,
        run.chat,
        run.prompts("harmful", "train"),
        run.prompts("harmless", "train"),
        seed=run.seed,
        batch_size=run.batch_size,
    )


def _weights(n_harmful: int, n_harmless: int, n_resamples: int, seed: int) -> Float[Tensor, "draw prompt"]:
    """One row per direction, as weights of the prompts: the true one, bootstrap samples, shuffles."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.cat([torch.full((n_harmful,), 1.0 / n_harmful), torch.full((n_harmless,), -1.0 / n_harmless)])
    rows = [true]
    for _ in range(n_resamples):
        sides = []
        for n, sign in ((n_harmful, 1.0), (n_harmless, -1.0)):
            counts = torch.randint(n, (n,), generator=generator).bincount(minlength=n)
            sides.append(sign * counts / n)
        rows.append(torch.cat(sides))
    for _ in range(n_resamples):
        signs = torch.cat([_balanced_signs(n, generator) for n in (n_harmful, n_harmless)])
        rows.append(signs / (signs > 0).sum())
    return torch.stack([row.double() for row in rows])


def _balanced_signs(n: int, generator: torch.Generator) -> Float[Tensor, " prompt"]:
    """One class, half of it on either side; the odd one out counts on neither."""
    signs = torch.zeros(n)
    order = torch.randperm(n, generator=generator)
    signs[order[: n // 2]], signs[order[n // 2 : 2 * (n // 2)]] = 1.0, -1.0
    return signs


def _combine(
    residuals: Float[Tensor, "prompt pos layer d_model"], weights: Float[Tensor, "draw prompt"]
) -> Float[Tensor, "draw pos layer d_model"]:
    """Weighted sums over prompts, in float64, layer by layer."""
    layers = [
        torch.einsum("kn,npd->kpd", weights, residuals[:, :, layer].double()) for layer in range(residuals.shape[2])
    ]
    return torch.stack(layers, dim=2)


def _unit(vectors: Float[Tensor, "pos layer d_model"]) -> Float[Tensor, "pos layer d_model"]:
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, torch.nan)


def _gram(units: Float[Tensor, "pos layer d_model"]) -> Float[Tensor, "candidate candidate"]:
    rows = units.flatten(0, 1)
    return rows @ rows.T


def _cosine(
    drawn: Float[Tensor, "draw pos layer d_model"], units: Float[Tensor, "pos layer d_model"]
) -> Float[Tensor, "draw pos layer"]:
    return (drawn * units).sum(-1) / drawn.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
