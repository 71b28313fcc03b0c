"""Runs of a model in which activations of another prompt are put in, from the patched block upward."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..measures import refusal_score
from ..model.points import (
    BlockPoint,
    Hook,
    HookedModel,
    block_hook,
    missing_points,
    model_device,
    resid_hook,
    write_hooks,
)
from ..model.running import batches, check_fits, last_logits, n_block_outputs, running_from
from ..reading import captured
from ..text.batches import TokenBatch, left_pad
from ..text.chat import ChatFormat
from ..values import check_named

Site = Literal["resid", "attn", "mlp", "heads", "resid_mid"]
"""The stream entering a block, what attention or the MLP writes, single heads, the stream between the two."""
_POINTS: dict[Site, BlockPoint] = {
    "resid": "hook_resid_pre",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "heads": "attn.hook_z",
    "resid_mid": "hook_resid_mid",
}


def check_sites(model: HookedModel, sites: Sequence[Site]) -> None:
    """Make sure that the model has these sites.

    Raises:
        UserError: a site is unknown, or the model's blocks run attention and MLP side by side.
    """
    for site in sites or ("",):
        check_named("site", site, _POINTS)
    if "resid_mid" in sites and missing_points(model, [block_hook(0, _POINTS["resid_mid"])]):
        raise UserError(
            "this model runs attention and MLP side by side, so there is no stream between them (hook_resid_mid): "
            "use the sites resid, attn or mlp"
        )


class PatchedRuns:
    """Patched runs of one model, from the block that is patched upward."""

    def __init__(
        self,
        model: HookedModel,
        chat: ChatFormat,
        sites: Sequence[Site],
        layers: Sequence[int],
        direction: Direction | None,
        refusal_tokens: Sequence[int],
        batch_size: int,
    ) -> None:
        write_hooks(model.cfg.n_layers, layers=layers)  # refuses layers that do not exist
        self.model, self.chat, self.sites, self.batch_size = model, chat, sites, batch_size
        self.layers = list(layers)
        self.refusal_tokens, self.n_last = list(refusal_tokens), len(chat.positions)
        self.unit = None if direction is None else direction.unit
        self.n_block_outputs = n_block_outputs(model)

    def patch(
        self, sources: Sequence[str], targets: Sequence[str], description: str, *, with_direction: bool = True
    ) -> tuple[Float[Tensor, " pair"], dict[tuple[Site, bool], Tensor]]:
        """The targets' own scores, and (site, along the direction only) -> scores `[pair layer cell]`."""
        source_rows = self.chat.encode_all(sources)
        target_rows = self.chat.encode_all(targets)
        check_fits(self.model, source_rows)
        n_layers = self.model.cfg.n_layers
        wanted = [(site, False) for site in self.sites]
        if self.unit is not None and with_direction:
            wanted += [(site, True) for site in self.sites if site != "heads"]
        baseline = torch.empty(len(targets), dtype=torch.float64)
        scores = {
            key: torch.empty(len(targets), len(self.layers), self._n_cells(key[0]), dtype=torch.float64)
            for key in wanted
        }
        pad_id = self.chat.pad_id
        for indices, target in batches(self.model, target_rows, pad_id, self.batch_size, description=description):
            source = left_pad([source_rows[index] for index in indices], pad_id).to(model_device(self.model))
            given = captured(self.model, source, {name: self._last for name in self._names()})
            resid = {resid_hook(layer, n_layers): lambda x: x for layer in self.layers}
            streams = captured(self.model, target, resid)
            baseline[indices] = self._score(target, [])
            for slot, layer in enumerate(self.layers):
                entering = resid_hook(layer, n_layers)
                restart = (entering, _replace_with(streams[entering]))
                for site, along in wanted:
                    name = block_hook(layer, _POINTS[site])
                    for cell in range(self._n_cells(site)):
                        hook = (name, self._patch_hook(site, given[name], cell, along))
                        scores[site, along][indices, slot, cell] = self._score(target, [restart, hook], layer)
        return baseline, scores

    def _n_cells(self, site: Site) -> int:
        return self.model.cfg.n_heads if site == "heads" else self.n_last

    def _names(self) -> list[str]:
        return [block_hook(layer, _POINTS[site]) for layer in self.layers for site in self.sites]

    def _last(self, activation: Tensor) -> Tensor:
        return activation[:, -self.n_last :]

    def _score(self, batch: TokenBatch, hooks: list[Hook], first_layer: int = 0) -> Float[Tensor, " batch"]:
        with torch.no_grad(), running_from(self.model, first_layer, hooks, self.n_block_outputs):
            return refusal_score(last_logits(self.model, batch), self.refusal_tokens).cpu()

    def _patch_hook(self, site: Site, given: Tensor, cell: int, along: bool) -> Callable[..., Tensor]:
        """Replace one position (of one head: all post-instruction positions), or only its component along r̂."""
        unit = self.unit

        def patch(activation: Tensor, hook: Any) -> Tensor:
            patched = activation.clone()
            if site == "heads":
                patched[:, -self.n_last :, cell] = given[:, :, cell]
                return patched
            column = cell - self.n_last
            here, there = activation[:, column], given[:, cell]
            if along:
                assert unit is not None
                r = unit.to(torch.promote_types(here.dtype, torch.float32)).to(here.device)
                there = (here + ((there - here).to(r.dtype) @ r)[:, None] * r).to(here.dtype)
            patched[:, column] = there
            return patched

        return patch


def _replace_with(stream: Tensor) -> Callable[..., Tensor]:
    return lambda activation, hook: stream
