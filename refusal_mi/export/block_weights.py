"""Parameters of a checkpoint under the names that the loaded model gives them, read when a module runs."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ..errors import UserError
from .checkpoint import Checkpoint
from .families import Family

_TOKEN_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_EXPERTS = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}
_MIXTRAL_EXPERTS = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}


class CheckpointWeights:
    """Reads parameters under the names that the model gives them, fusing experts that are stored one by one."""

    def __init__(self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.by_bare_name = {_bare(name): name for name in checkpoint.tensors}
        self.family = family
        outside = {family.naming.role(name): bare for bare, name in self.by_bare_name.items()}
        self.head = outside.get(("head", None))
        self.token_embedding = next(bare for bare in self.by_bare_name if bare.endswith(_TOKEN_EMBEDDINGS))

    def attach(self, prefix: str, module: nn.Module) -> None:
        """Make a module load its parameters before it runs and drop them afterwards."""
        names = [name for name, _ in module.named_parameters()]
        empty = dict(module.named_parameters())

        def load(part: nn.Module, *_: Any) -> None:
            for name in names:
                _assign(part, name, nn.Parameter(self.read(f"{prefix}.{name}"), requires_grad=False))

        def drop(part: nn.Module, *_: Any) -> None:
            for name in names:
                _assign(part, name, empty[name])

        module.register_forward_pre_hook(load, prepend=True)
        module.register_forward_hook(drop)

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """The parameter that the loaded model calls `name`."""
        bare = _bare(name)
        if bare in self.by_bare_name:
            return self._stored(bare)
        if self.family.naming.role(name) == ("head", None):
            return self._stored(self.head or self.token_embedding)
        return self._fused(bare)

    def _stored(self, bare: str) -> Shaped[Tensor, "..."]:
        return self.checkpoint.read(self.by_bare_name[bare]).to(self.dtype)

    def _fused(self, bare: str) -> Shaped[Tensor, "..."]:
        """A parameter of a mixture of experts whose experts are stored one by one."""
        block, _, leaf = bare.partition(".mlp.")
        for stem, parts in ((f"{block}.mlp.", _EXPERTS), (f"{block}.block_sparse_moe.", _MIXTRAL_EXPERTS)):
            if f"{stem}{leaf}" in self.by_bare_name:
                return self._stored(f"{stem}{leaf}")
            leaves = parts.get(leaf, ())
            experts: list[Tensor] = []
            while leaves and f"{stem}experts.{len(experts)}.{leaves[0]}.weight" in self.by_bare_name:
                number = len(experts)
                experts.append(torch.cat([self._stored(f"{stem}experts.{number}.{part}.weight") for part in leaves]))
            if experts:
                return torch.stack(experts)
        raise UserError(f"no tensor of the checkpoint becomes {bare}; use --verify full")


def _assign(module: nn.Module, path: str, value: nn.Parameter) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    module._parameters[leaf] = value


def _bare(name: str) -> str:
    head, _, rest = name.partition(".")
    return rest if head in ("model", "transformer", "gpt_neox") else name
