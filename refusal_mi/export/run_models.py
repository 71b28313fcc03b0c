"""Running the hooked original and the plain export on the same tokens, one model in memory at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..interventions import Intervention, all_hooks
from ..model.running import all_logits, running
from ..models import load_model
from ..tokens import TokenBatch
from .answers import Answers, DtypeText, compared, no_ids


def run_hooked(
    source: str,
    interventions: Sequence[Intervention],
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    n_new: int,
    stops: Sequence[int],
) -> tuple[Answers, Answers]:
    """The original under hooks, and without them (logits only)."""
    model = load_model(source, device="cpu", dtype=dtype)
    width = batch.tokens.shape[1]
    new_ids = no_ids(batch)
    with torch.no_grad():
        plain = compared(all_logits(model, batch), batch, n_last)
        with running(model, all_hooks(model, interventions, width)):
            hooked = compared(all_logits(model, batch), batch, n_last)
            if n_new:
                new_ids = model.generate(
                    batch.tokens,
                    attention_mask=batch.mask,
                    max_new_tokens=n_new,
                    do_sample=False,
                    return_type="tokens",
                    verbose=False,
                    stop_at_eos=bool(stops),
                    **({"eos_token_id": list(stops)} if stops else {}),
                )[:, width:]
    return Answers(hooked, new_ids), Answers(plain, no_ids(batch))


def run_exported(
    directory: Path,
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    n_new: int,
    stops: Sequence[int],
    adapter: Path | None = None,
) -> Answers:
    """An export in plain `transformers` (with PEFT for an adapter)."""
    from transformers import GenerationConfig

    model = load_exported(directory, dtype, adapter)
    width = batch.tokens.shape[1]
    with torch.no_grad():
        logits = model(batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids).logits
        # Not the checkpoint's own settings: a repetition penalty in them would not be the hooked model's.
        model.generation_config = GenerationConfig(
            max_new_tokens=n_new, eos_token_id=list(stops) or None, pad_token_id=stops[0] if stops else 0
        )
        ids = model.generate(input_ids=batch.tokens, attention_mask=batch.mask)
    return Answers(compared(logits, batch, n_last), ids[:, width:])


def load_exported(directory: Path, dtype: DtypeText, adapter: Path | None = None) -> Any:
    """A checkpoint, with an adapter on top if there is one, as any user would load it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="eager")
    if adapter is not None:
        from .adapter import load_adapter

        model = load_adapter(model, adapter)
    return model.eval()
