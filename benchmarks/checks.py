"""What checking costs: prompts that fit, templates that show the instruction, finite numbers; against none of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import arguments, compare, load_both, report
from refusal_mi import generation, measures, reading
from refusal_mi.generation import generate
from refusal_mi.measures import next_token_logits
from refusal_mi.model import running
from refusal_mi.reading import mean_activations
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

N_PROMPTS, N_NEW = 64, 16


def _same(values: Any, *_: Any) -> Any:
    return values


def _plain_ids(chat: ChatFormat, conversation: str) -> list[int]:
    """As transformers renders and tokenizes it."""
    messages = [{"role": "user", "content": conversation}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


@contextmanager
def unchecked() -> Iterator[None]:
    """Nothing is checked meanwhile."""
    places = [(measures, "finite"), (measures, "told"), (reading, "finite"), (generation, "finite")]
    places += [(generation, "told"), (generation, "check_fits"), (running, "check_fits")]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(patch.object(module, name, _same))
        stack.enter_context(patch.object(ChatFormat, "encode", _plain_ids))
        yield


def main() -> None:
    """A row for each way in which numbers leave the model."""
    args = arguments(__doc__)
    hooked, _, tokenizer = load_both(args.model, args.device)
    prompts = load_prompts("organism_harmful_train").instructions[:N_PROMPTS]
    works: dict[str, Callable[[], Any]] = {
        "mean activations": lambda: mean_activations(hooked, ChatFormat(tokenizer), prompts).means,
        "next tokens": lambda: next_token_logits(hooked, ChatFormat(tokenizer), prompts),
        f"answers of {N_NEW} tokens": lambda: [
            each.text for each in generate(hooked, ChatFormat(tokenizer), prompts, max_new_tokens=N_NEW)
        ],
    }
    for name, work in works.items():

        def without(work: Callable[[], Any] = work) -> Any:
            with unchecked():
                return work()

        report(
            compare(
                f"checks of {name}, {args.model}, {args.device}",
                without,
                work,
                _difference,
                must_reach=0.95,
                n_pairs=2 * args.pairs,
                largest_allowed=0.0,
                note=f"{N_PROMPTS} prompts; the first way checks nothing",
            )
        )


def _difference(a: Any, b: Any) -> float:
    return (a - b).abs().max().item() if isinstance(a, torch.Tensor) else float(a != b)


if __name__ == "__main__":
    main()
