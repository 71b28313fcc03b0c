"""Mechanistic interpretability of refusal in chat models, on TransformerLens.

    model = load_model()                                   # or load_model("Qwen/Qwen2.5-1.5B-Instruct")
    chat = ChatFormat(model.tokenizer)
    grid = difference_in_means(mean_activations(model, chat, harmful), mean_activations(model, chat, harmless))
    scores = sweep(model, chat, grid, harmful_val, harmless_val, refusal_tokens)
    best = select(scores).best
    direction = grid.direction(best.position, best.layer)
    generate(model, chat, prompts, interventions=[Ablate(direction)])     # or [Add(direction, 1.0)]

Names are imported when they are first used, so that `import refusal_mi` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .candidates import sweep as sweep
    from .chat import ChatFormat as ChatFormat
    from .directions import Direction as Direction
    from .directions import DirectionGrid as DirectionGrid
    from .directions import Estimator as Estimator
    from .directions import difference_in_means as difference_in_means
    from .errors import UserError as UserError
    from .export.export import export_checkpoint as export_checkpoint
    from .export.memory import orthogonalize_ as orthogonalize_
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .interventions import Ablate as Ablate
    from .interventions import Add as Add
    from .judges import Judge as Judge
    from .judges import SubstringJudge as SubstringJudge
    from .judges import is_degenerate as is_degenerate
    from .judges import is_refusal as is_refusal
    from .loss import ce_loss as ce_loss
    from .models import load_model as load_model
    from .plots import plot_scores as plot_scores
    from .prompts import PromptSet as PromptSet
    from .prompts import load_prompts as load_prompts
    from .prompts import load_splits as load_splits
    from .reading import mean_activations as mean_activations
    from .scores import discover_refusal_tokens as discover_refusal_tokens
    from .scores import kl_nats as kl_nats
    from .scores import next_token_logits as next_token_logits
    from .scores import refusal_score as refusal_score
    from .selection import Thresholds as Thresholds
    from .selection import select as select
    from .stats import Rate as Rate

_HOME = {
    "ChatFormat": "chat",
    "Direction": "directions",
    "DirectionGrid": "directions",
    "Estimator": "directions",
    "Ablate": "interventions",
    "Add": "interventions",
    "Judge": "judges",
    "PromptSet": "prompts",
    "Rate": "stats",
    "Sampling": "generation",
    "SubstringJudge": "judges",
    "Thresholds": "selection",
    "UserError": "errors",
    "ce_loss": "loss",
    "difference_in_means": "directions",
    "discover_refusal_tokens": "scores",
    "export_checkpoint": "export.export",
    "generate": "generation",
    "is_degenerate": "judges",
    "is_refusal": "judges",
    "kl_nats": "scores",
    "load_model": "models",
    "load_prompts": "prompts",
    "load_splits": "prompts",
    "mean_activations": "reading",
    "next_token_logits": "scores",
    "orthogonalize_": "export.memory",
    "plot_scores": "plots",
    "refusal_score": "scores",
    "select": "selection",
    "sweep": "candidates",
}

__all__ = ["__version__", *_HOME]
__version__ = version("refusal_mi")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
