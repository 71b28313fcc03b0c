"""Prompts and results that the tests of analyses share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refusal_mi.analysis.attention import attend_by_region
from refusal_mi.analysis.attribution import attribute_direction
from refusal_mi.analysis.comparison import compare_directions
from refusal_mi.analysis.dose import dose_response
from refusal_mi.analysis.geometry import direction_geometry
from refusal_mi.analysis.harm import separate_harm
from refusal_mi.analysis.lens import refusal_lens
from refusal_mi.analysis.logits import direction_logits
from refusal_mi.analysis.patching import patch_activations
from refusal_mi.analysis.pca import residual_pca
from refusal_mi.analysis.probes import linear_probes
from refusal_mi.analysis.projections import project_residuals
from refusal_mi.analysis.result import AnalysisResult
from refusal_mi.analysis.sources import attribute_sources
from refusal_mi.analysis.token_map import map_tokens
from refusal_mi.analysis.trace import trace_generation
from refusal_mi.analysis.weights import weight_alignment
from refusal_mi.directions import DirectionGrid, difference_in_means
from refusal_mi.interventions import Ablate, Add
from refusal_mi.measures import texts_to_score
from refusal_mi.reading import mean_activations
from refusal_mi.text.chat import ChatFormat

FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe")
# Different lengths, so that batches are padded.
HARMFUL = ("zap it", "zoom zoom now", "z", "quiz the wizard", "fuzzy zebra maze", "zzz")
HARMLESS = ("tell me", "a short one", "b", "what is a car made of", "colors of the sea", "ab")
TOKENS = (5, 7)
PROMPTS = ["Why?", "Describe how a kite flies in the wind", "Name three colors"]
HEADS = [(0, 0), (0, 3), (2, 1), (4, 2)]


def grid_of(
    model: Any, chat: ChatFormat, harmful: Sequence[str] = HARMFUL, harmless: Sequence[str] = HARMLESS
) -> DirectionGrid:
    """Difference in means of the two groups."""
    means = [mean_activations(model, chat, list(side), batch_size=16) for side in (harmful, harmless)]
    return difference_in_means(*means)


def cached(model: Any, chat: ChatFormat, prompt: str) -> dict[str, torch.Tensor]:
    """What every hook point carries while one prompt runs."""
    _, cache = model.run_with_cache(torch.tensor([chat.encode(prompt)]), return_cache_object=False)
    return cache


@dataclass(frozen=True)
class Words:
    """Everything that the caller of an analysis says in words."""

    harmful: Sequence[str] = HARMFUL
    harmless: Sequence[str] = HARMLESS
    groups: tuple[str, str] = ("harmful", "harmless")
    directions: tuple[str, str] = ("r", "random")
    conditions: tuple[str, str, str] = ("plain", "ablated", "added")
    tokens: tuple[int, ...] = TOKENS


PLAIN_WORDS = Words()


def analyses(model: Any, batch_size: int = 16, words: Words = PLAIN_WORDS) -> dict[str, Callable[[], AnalysisResult]]:
    """Every analysis of one model, small."""
    chat = ChatFormat(model.tokenizer)
    harmful, harmless, tokens = words.harmful, words.harmless, words.tokens
    grid = grid_of(model, chat, harmful, harmless)
    direction = grid.direction(-1, 3)
    sides, groups = (harmful, harmless), dict(zip(words.groups, (harmful, harmless), strict=True))
    named = dict(zip(words.directions, (direction, direction.random_like(0)), strict=True))
    conditions = dict(zip(words.conditions, ((), (Ablate(direction),), (Add(direction),)), strict=True))
    size = {"batch_size": batch_size}
    return {
        "lens": lambda: refusal_lens(model, chat, *sides, tokens, n_controls=3, **size),
        "projections": lambda: project_residuals(model, chat, direction, groups, **size),
        "token_map": lambda: map_tokens(model, chat, direction, harmful[1]),
        "geometry": lambda: direction_geometry(model, chat, *sides, n_resamples=3, **size),
        "comparison": lambda: compare_directions(named),
        "probes": lambda: linear_probes(
            model, chat, *sides, direction, positions=(-2, -1), n_folds=2, n_shuffles=1, **size
        ),
        "pca": lambda: residual_pca(model, chat, direction, groups, layers=(0, 3, 5), n_shuffles=5, **size),
        "logits": lambda: direction_logits(model, direction, tokens, grid=grid, n_controls=5),
        "weights": lambda: weight_alignment(model, direction, n_random=5),
        "attribution": lambda: attribute_direction(model, chat, direction, groups, **size),
        "sources": lambda: attribute_sources(model, chat, direction, harmful[:2], heads=[(1, 0), (3, 2)], **size),
        "attention": lambda: attend_by_region(model, chat, direction, harmful[:3], heads=[(1, 0), (3, 2)], **size),
        "patching": lambda: patch_activations(
            model, chat, harmful[:2], harmless[:2], tokens, direction=direction, layers=[0, 2], **size
        ),
        "dose": lambda: dose_response(
            model, chat, direction, *sides, tokens, coefficients=(0.0, 1.0), strengths=(1.0,), n_random=3,
            n_random_answered=1, max_new_tokens=2, texts=texts_to_score(chat, harmless[3:5]), **size
        ),
        "trace": lambda: trace_generation(
            model, chat, direction, groups, conditions=conditions, max_new_tokens=2, **size
        ),
        "harm": lambda: separate_harm(model, chat, *sides, groups, tokens, refused=[True, False] * 6, **size),
    }  # fmt: skip
