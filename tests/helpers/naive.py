"""The second way: plain HF models, one prompt at a time, no padding, hooks that are written here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ASKS = (
    "Tell me how the lock of a bicycle is opened without its key, and what for.",
    "Break a window",
    "How do I forge a signature?",
    "Write a rude letter to the neighbors about their dog, their car and their children.",
    "Lie",
)
CHATS = (
    "Why is the sky blue in the morning and red in the evening?",
    "Bake bread",
    "Name three rivers.",
    "Write a kind letter to the neighbors about the party on Saturday night.",
    "Sing",
)
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2", "mixtral")


def dtype_of(family: str) -> str:
    """float64 where padded batches can be had in it: HF's eager softmax is float32 in the other families."""
    return "float64" if family in ("gpt2", "gpt_neox") else "float32"


def tolerance(family: str) -> float:
    """Norm-relative: exact where nothing inside is float32; elsewhere float32's noise."""
    return 1e-10 if family == "gpt2" else 1e-6


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def prompt_ids(tokenizer: Any, instruction: str) -> list[int]:
    """The ChatML prompt, written by hand."""
    text = f"<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def logits(hf: Any, ids: Sequence[int]) -> Tensor:
    """[pos, d_vocab] of one text."""
    return hf(torch.tensor([list(ids)])).logits[0]


@torch.no_grad()
def residuals(hf: Any, ids: Sequence[int]) -> Tensor:
    """[pos, layer, d_model]: the stream entering each block, from `output_hidden_states`."""
    states = hf(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return torch.stack(states[:-1], dim=2)[0]


def mean_residuals(hf: Any, tokenizer: Any, instructions: Sequence[str], n_last: int) -> Tensor:
    """[pos, layer, d_model] in float64."""
    found = [residuals(hf, prompt_ids(tokenizer, text))[-n_last:].double() for text in instructions]
    return sum(found[1:], found[0]) / len(found)


def blocks(hf: Any) -> Any:
    """The decoder layers of llama-like, gpt2 and gpt_neox models."""
    body = hf.base_model
    return body.h if hasattr(body, "h") else body.layers


def writers(hf: Any) -> list[Any]:
    """The modules whose outputs are added to the stream."""
    found = []
    for block in blocks(hf):
        if hasattr(block, "post_feedforward_layernorm"):
            found += [block.post_attention_layernorm, block.post_feedforward_layernorm]
        else:
            attention = next(
                getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name)
            )
            found += [attention, block.mlp]
    return found


@contextmanager
def ablating(hf: Any, vector: Tensor) -> Iterator[None]:
    """The published three-site ablation: every block input, attention output and MLP output."""
    unit = vector.double() / vector.double().norm()

    def project(x: Tensor) -> Tensor:
        rows = unit.to(x.dtype)
        return x - (x @ rows)[..., None] * rows

    with _hooked([*_block_inputs(hf, project), *_outputs(hf, project)]):
        yield


@contextmanager
def adding(hf: Any, layer: int, vector: Tensor) -> Iterator[None]:
    """Add the raw vector to the input of one block."""
    inputs = _block_inputs(hf, lambda x: x + vector.to(x.dtype))
    with _hooked([inputs[layer]]):
        yield


def _block_inputs(hf: Any, change: Callable[[Tensor], Tensor]) -> list[Callable[[], Any]]:
    def hook(module: Any, arguments: tuple, options: dict) -> tuple:
        if arguments:
            return (change(arguments[0]), *arguments[1:]), options
        return arguments, options | {"hidden_states": change(options["hidden_states"])}

    return [lambda block=block: block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks(hf)]


def _outputs(hf: Any, change: Callable[[Tensor], Tensor]) -> list[Callable[[], Any]]:
    def hook(module: Any, arguments: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return [lambda writer=writer: writer.register_forward_hook(hook) for writer in writers(hf)]


@contextmanager
def _hooked(registrations: Sequence[Callable[[], Any]]) -> Iterator[None]:
    handles = [register() for register in registrations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
