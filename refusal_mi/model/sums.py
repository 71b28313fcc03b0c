"""Does the stream add up? Whether what is written into it is written where the hook points are."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..text.batches import left_pad
from .families import nearest_type
from .points import BlockPoint, Hook, HookedModel, block_hook, embedding_rows, model_device, model_type
from .running import all_logits, running

N_TOKENS = 12
TOLERANCE = 2.0
"""In units of the dtype's rounding error."""
_POINTS: tuple[BlockPoint, ...] = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")


def check_sums(model: HookedModel, name: str) -> None:
    """Refuse a model in which something else than the embedding, attention and MLPs writes into the stream.

    One short pass: in every block, the stream after it must be a sum a·before + b·attention + c·MLP with scalars that
    are fitted (families scale the stream or its parts), up to rounding.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: it is not, as where a Mamba branch or per-layer embeddings write as well: what is ablated at the
            hook points would stay in the stream.
    """
    errors = unexplained(model)
    worst = max(range(len(errors)), key=errors.__getitem__)
    if not errors[worst] <= allowed(model.cfg.dtype):
        raise UserError(
            f"{name} ({model_type(model)}) is not supported: {errors[worst]:.2g} of the stream after block {worst} was "
            "written by neither the stream before it nor its attention and MLP, so that hooks there miss it"
            f"{nearest_type(model_type(model))}"
        )


def allowed(dtype: torch.dtype) -> float:
    """What rounding may leave unexplained, in the model's dtype and in the float64 of the fit."""
    return max(TOLERANCE * torch.finfo(dtype).eps, 1e-12)


def unexplained(model: HookedModel) -> list[float]:
    """What no sum of stream, attention and MLP explains of the stream after every block, relative to its largest part.

    Read in one pass of a few tokens.
    """
    ids = torch.linspace(0, embedding_rows(model) - 1, N_TOKENS).long().tolist()
    seen: dict[str, Tensor] = {}
    names = [block_hook(block, point) for block in range(model.cfg.n_layers) for point in _POINTS]
    hooks: list[Hook] = [(each, _keep(seen, each)) for each in names]
    with torch.no_grad(), running(model, hooks):
        all_logits(model, left_pad([ids], 0).to(model_device(model)))
    silent = [each for each in names if each not in seen]
    if silent:
        kind = model_type(model)
        raise UserError(
            f"{kind} models are not supported: TransformerLens never reaches {silent[0]}{nearest_type(kind)}"
        )
    return [_error([seen[block_hook(block, point)] for point in _POINTS]) for block in range(model.cfg.n_layers)]


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    def keep(activation: Tensor, hook: object) -> Tensor:
        seen[name] = activation.detach().flatten().cpu().to(torch.float64, copy=True)
        return activation

    return keep


def _error(streams: list[Tensor]) -> float:
    *parts, after = streams
    largest = max(each.norm().item() for each in streams)
    if largest == 0:
        return 0.0
    columns = torch.stack([part for part in parts if part.norm() > 0] or [after], dim=-1)
    scalars = torch.linalg.lstsq(columns, after[:, None]).solution
    return (after - (columns @ scalars)[:, 0]).norm().item() / largest
