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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from .conditional import Condition as Condition
    from .conditional import Conditional as Conditional
    from .conditional import learn_threshold as learn_threshold
    from .conditional import separation as separation
    from .directions import ActivationMeans as ActivationMeans
    from .directions import Direction as Direction
    from .directions import DirectionGrid as DirectionGrid
    from .directions import Estimator as Estimator
    from .directions import difference_in_means as difference_in_means
    from .errors import UserError as UserError
    from .estimators.named import estimator_named as estimator_named
    from .estimators.samples import ActivationSamples as ActivationSamples
    from .estimators.samples import SampleEstimator as SampleEstimator
    from .estimators.samples import sees_prompts as sees_prompts
    from .export.export import export_checkpoint as export_checkpoint
    from .export.export import orthogonalize_ as orthogonalize_
    from .figures.scores import plot_scores as plot_scores
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .interventions import Ablate as Ablate
    from .interventions import Add as Add
    from .interventions import Affine as Affine
    from .interventions import Leace as Leace
    from .interventions import all_hooks as all_hooks
    from .judges.named import judge_named as judge_named
    from .judges.substring import Judge as Judge
    from .judges.substring import SubstringJudge as SubstringJudge
    from .judges.substring import is_degenerate as is_degenerate
    from .judges.substring import is_refusal as is_refusal
    from .labels import discover_refusal_tokens as discover_refusal_tokens
    from .labels import find_refusal_tokens as find_refusal_tokens
    from .labels import label_prompts as label_prompts
    from .labels import zero_point as zero_point
    from .loaded import load_run as load_run
    from .measures import ce_loss as ce_loss
    from .measures import kl_nats as kl_nats
    from .measures import next_token_logits as next_token_logits
    from .measures import refusal_score as refusal_score
    from .measures import refusal_scores as refusal_scores
    from .model.loading import load_model as load_model
    from .reading import mean_activations as mean_activations
    from .reading import sample_activations as sample_activations
    from .search.grid import select as select
    from .search.sweep import sweep as sweep
    from .search.thresholds import Thresholds as Thresholds
    from .stats import Rate as Rate
    from .text.chat import ChatFormat as ChatFormat
    from .text.prompts import PromptSet as PromptSet
    from .text.prompts import load_prompts as load_prompts
    from .text.prompts import load_splits as load_splits

_HOME = {
    "Ablate": "interventions",
    "ActivationSamples": "estimators.samples",
    "ActivationMeans": "directions",
    "Add": "interventions",
    "Affine": "interventions",
    "ChatFormat": "text.chat",
    "Condition": "conditional",
    "Conditional": "conditional",
    "Direction": "directions",
    "DirectionGrid": "directions",
    "Estimator": "directions",
    "Judge": "judges.substring",
    "Leace": "interventions",
    "PromptSet": "text.prompts",
    "Rate": "stats",
    "SampleEstimator": "estimators.samples",
    "Sampling": "generation",
    "SubstringJudge": "judges.substring",
    "Thresholds": "search.thresholds",
    "UserError": "errors",
    "all_hooks": "interventions",
    "ce_loss": "measures",
    "difference_in_means": "directions",
    "discover_refusal_tokens": "labels",
    "estimator_named": "estimators.named",
    "export_checkpoint": "export.export",
    "find_refusal_tokens": "labels",
    "generate": "generation",
    "is_degenerate": "judges.substring",
    "is_refusal": "judges.substring",
    "judge_named": "judges.named",
    "kl_nats": "measures",
    "label_prompts": "labels",
    "learn_threshold": "conditional",
    "load_model": "model.loading",
    "load_prompts": "text.prompts",
    "load_run": "loaded",
    "load_splits": "text.prompts",
    "mean_activations": "reading",
    "next_token_logits": "measures",
    "orthogonalize_": "export.export",
    "plot_scores": "figures.scores",
    "refusal_score": "measures",
    "refusal_scores": "measures",
    "sample_activations": "reading",
    "sees_prompts": "estimators.samples",
    "select": "search.grid",
    "separation": "conditional",
    "sweep": "search.sweep",
    "zero_point": "labels",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("refusal_mi")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
