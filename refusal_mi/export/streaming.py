"""A checkpoint run block by block: its parameters are read when a module runs, and answers follow from that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import UserError
from ..interventions import Interventions, all_hooks
from ..model.families import Family, bare_name, family_of, text_config
from ..model.guards import read_config
from ..model.points import HookFn, component_of, split_hook
from ..model.writers import build_skeleton
from ..progress import track
from ..text.batches import TokenBatch
from ..values import Value
from .checkpoint import Checkpoint

_TOKEN_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_EXPERTS = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}
_MIXTRAL_EXPERTS = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}


class CheckpointWeights:
    """Reads parameters under the names that the model gives them, fusing experts that are stored one by one."""

    def __init__(self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.by_bare_name = {bare_name(name): name for name in checkpoint.tensors}
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
        bare = bare_name(name)
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


DtypeText = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Value):
    """What one model makes of a batch."""

    logits: Float[Tensor, "compared d_vocab"]
    new_ids: Int[Tensor, "batch new"]
    """Greedy continuations; what follows a stop token means nothing. No columns where none were asked for."""


@dataclass(frozen=True)
class Runs:
    """The same tokens through every model that is compared."""

    hooked: Answers
    """The original under the intervention, in float32."""
    plain: Answers
    """The original, in float32."""
    exported: Answers
    """The export's weights, in float32."""
    stored: Answers
    """The export as it is stored."""
    hooked_as_stored: Answers | None
    """The hooked original in the export's dtype; None where that is float32."""


def compared(
    logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch, n_last: int
) -> Float[Tensor, "compared d_vocab"]:
    """The last positions of each row that are not padding."""
    kept = batch.mask[:, -n_last:].bool()
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[:, -n_last:][kept].to(wide).cpu()


def no_ids(batch: TokenBatch) -> Int[Tensor, "batch new"]:
    """No continuations."""
    return batch.tokens[:, :0]


def cut(ids: Int[Tensor, "batch new"], stops: Sequence[int]) -> list[list[int]]:
    """Continuations up to their first stop token."""
    return [list(takewhile(lambda token: token not in stops, row)) for row in ids.tolist()]


def same_tokens(one: Int[Tensor, "batch new"], other: Int[Tensor, "batch other"], stops: Sequence[int]) -> float:
    """Fraction of positions with equal tokens; what one has and the other has not counts as different."""
    pairs = list(zip(cut(one, stops), cut(other, stops), strict=True))
    total = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return equal / total if total else 1.0


def streamed_model(checkpoint: Checkpoint, interventions: Interventions, dtype: torch.dtype) -> Any:
    """The HF model of a checkpoint, under interventions, with parameters only while they are needed.

    Every block is read from its shard when the forward pass reaches it and dropped when it has run. The hook
    functions are those of the interventions; they run where the block's own modules hand their write to the stream.
    """
    config = read_config(checkpoint.directory)
    config._attn_implementation = "eager"
    model = build_skeleton(config)
    weights = CheckpointWeights(checkpoint, family_of(config), dtype)
    blocks = blocks_of(model)
    for prefix, module in _units(model, blocks):
        weights.attach(prefix, module)
    _attach_hooks(model, blocks, config, interventions)
    return model


@dataclass(frozen=True)
class _Shape:
    n_layers: int
    d_model: int


class ModelShape:
    """As much of a model as interventions need to name their hook points."""

    tokenizer = None

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.cfg: Any = _Shape(n_layers, d_model)


def _attach_hooks(model: Any, blocks: Mapping[str, nn.Module], config: Any, interventions: Interventions) -> None:
    family, inside = family_of(config), list(blocks.values())
    text = text_config(config)
    shape = ModelShape(text.num_hidden_layers, text.hidden_size)
    for point, change in all_hooks(shape, interventions):
        block, place = split_hook(point)
        if place == "hook_resid_pre":
            inside[block].register_forward_pre_hook(_on_input(change), with_kwargs=True)
        elif place == "hook_resid_post":
            inside[block].register_forward_hook(_on_output(change))
        else:
            model.get_submodule(write_site(family, model, point)).register_forward_hook(_on_output(change))


def write_site(family: Family, model: Any, point: str) -> str:
    """The module whose output is the write at a hook point, up to a scale that the model multiplies it by."""
    block, place = split_hook(point)
    prefix, component = list(blocks_of(model))[block], component_of(place)
    assert component is not None
    if component in family.post_norms:
        return f"{prefix}.{family.post_norms[component]}"
    if component == "mlp":
        return next(
            f"{prefix}.{name}" for name in ("mlp", "feed_forward") if hasattr(model.get_submodule(prefix), name)
        )
    return next(name for name, _ in model.named_modules() if family.naming.role(f"{name}.weight") == ("attn", block))


def _on_input(change: HookFn) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0], hook=None), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], hook=None)}

    return hook


def _on_output(change: HookFn) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], hook=None), *output[1:])
        return change(output, hook=None)

    return hook


def blocks_of(model: Any) -> dict[str, nn.Module]:
    """Path -> decoder block."""
    n_layers = text_config(model.config).num_hidden_layers
    lists = [(name, part) for name, part in model.get_decoder().named_modules() if isinstance(part, nn.ModuleList)]
    name, blocks = next((name, part) for name, part in lists if len(part) == n_layers)
    name = next(path for path, part in model.named_modules() if part is blocks)
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def _units(model: Any, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What is loaded at a time: a block, or a module outside of the blocks that has parameters of its own."""
    yield from blocks.items()
    for name, part in model.named_modules():
        is_inside = any(name == prefix or name.startswith(f"{prefix}.") for prefix in blocks)
        if not is_inside and any(True for _ in part.parameters(recurse=False)):
            yield name, part


def stream_answers(
    checkpoint: Checkpoint,
    interventions: Interventions,
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    stops: Sequence[int],
    *,
    n_new: int = 0,
    guess: Int[Tensor, "batch guessed"] | None = None,
) -> Answers:
    """What a checkpoint makes of a batch under interventions; every pass reads it once from disk.

    Args:
        n_last: compared positions at the end of every row.
        n_new: new greedy tokens: one pass each, over the newest token and a cache of the others.
        guess: greedy text of a model that should say the same; if it does, one pass is enough.
    """
    model = streamed_model(checkpoint, interventions, getattr(torch, dtype))
    n_last = min(n_last, batch.tokens.shape[1])
    with torch.no_grad():
        if guess is not None:
            return _from_guess(model, batch, n_last, stops, pad(guess, (0, n_new - guess.shape[1])))
        output = _run(model, batch, use_cache=n_new > 0, logits_to_keep=n_last)
        ids = _token_by_token(model, batch, output, stops, n_new) if n_new else no_ids(batch)
    return Answers(compared(output.logits, batch, n_last), ids)


def _token_by_token(
    model: Any, batch: TokenBatch, output: Any, stops: Sequence[int], n_new: int
) -> Int[Tensor, "batch new"]:
    ids = no_ids(batch)
    for _ in track(range(n_new), "comparing, token by token"):
        ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids.shape[1] == n_new or all(len(row) < ids.shape[1] for row in cut(ids, stops)):
            break
        output = _run(model, _joined(batch, ids), past=output.past_key_values, use_cache=True, logits_to_keep=1)
    return ids


def _from_guess(
    model: Any, batch: TokenBatch, n_last: int, stops: Sequence[int], guess: Int[Tensor, "batch new"]
) -> Answers:
    """Greedy text by fixed-point iteration: each pass settles at least one more token of every row.

    A token that is the model's choice after its own choices is final, so text that stays as it is is the greedy text.
    """
    while True:
        n_new = guess.shape[1]
        logits = _run(model, _joined(batch, guess), logits_to_keep=n_last + n_new).logits
        chosen = logits[:, n_last - 1 : -1].argmax(-1)
        if cut(chosen, stops) == cut(guess, stops):
            return Answers(compared(logits[:, :n_last], batch, n_last), chosen)
        guess = chosen


def _joined(batch: TokenBatch, ids: Int[Tensor, "batch new"]) -> TokenBatch:
    return TokenBatch(torch.cat([batch.tokens, ids], dim=1), torch.cat([batch.mask, torch.ones_like(ids)], dim=1))


def _run(model: Any, batch: TokenBatch, *, past: Any = None, use_cache: bool = False, logits_to_keep: int) -> Any:
    """A forward pass over all columns, or over the last one with a cache of the others."""
    new = slice(0 if past is None else -1, None)
    return model(
        batch.tokens[:, new],
        attention_mask=batch.mask,
        position_ids=batch.position_ids[:, new],
        past_key_values=past,
        use_cache=use_cache,
        logits_to_keep=logits_to_keep,
    )
