"""The refusal-metric lens: the refusal score read at every layer, as if the stream ended there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..figures import style as draw
from ..measures import log_odds
from ..model.points import HookedModel
from ..model.running import read_out
from ..precision import as_double
from ..reading import stream_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .result import AnalysisResult, call_with_a_run, check_position, each_group, prompts_of, provenance_of


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(AnalysisResult):
    """Refusal scores of every prompt at every layer, for the refusal tokens and for random sets of as many tokens.

    Examples:
        >>> gap = found.of("harmful").mean(0) - found.of("harmless").mean(0)
        >>> gap.allclose(found.gap)
        True
    """

    kind: ClassVar[str] = "lens"
    units: ClassVar[Mapping[str, str]] = {
        "scores": "refusal score, log-odds (nats)",
        "control_gaps": "difference of mean refusal scores, harmful - harmless (nats)",
    }

    scores: Float[Tensor, "prompt layer"]
    """float64; layers 0..n_layers, the last is the model's own score."""
    groups: tuple[str, ...]
    """"harmful" or "harmless", for every prompt."""
    prompts: tuple[str, ...]
    control_gaps: Float[Tensor, "control layer"]
    """Mean over harmful minus mean over harmless prompts, for random token sets."""
    position: int
    refusal_tokens: tuple[int, ...]
    token_texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.groups) == len(self.prompts):
            raise ValueError(f"{len(self.scores)} scores, {len(self.groups)} groups, {len(self.prompts)} prompts")

    def of(self, group: str) -> Float[Tensor, "prompt layer"]:
        """The scores of one group."""
        return self.scores[[name == group for name in self.groups]]

    @property
    def gap(self) -> Float[Tensor, " layer"]:
        """Mean over harmful minus mean over harmless prompts (nats)."""
        return self.of("harmful").mean(0) - self.of("harmless").mean(0)


def refusal_lens(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: Sequence[int],
    *,
    position: int = -1,
    n_controls: int = 20,
    seed: int = 0,
    batch_size: int = 32,
) -> LensResult:
    """Apply the final norm and the unembedding to the stream entering each layer and score the refusal tokens.

    score(l) = refusal_score(softmax(W_U · norm_final(x_l))), l = 0..n_layers: a logit lens (nostalgebraist 2020)
    with the metric of Arditi et al. (2024, section 2.5). Before the last layer it says what the stream would answer,
    not what later blocks make of it.

    Examples:
        >>> found = refusal_lens(model, chat, harmful, harmless, [5, 7], n_controls=3)
        >>> found.scores.shape == (len(harmful) + len(harmless), model.cfg.n_layers + 1)
        True

    Args:
        position: a post-instruction position, counted from the end.
        n_controls: random sets of as many tokens, drawn from the vocabulary without the refusal tokens.

    Raises:
        UserError: there is no such position, no refusal token, or no prompt on a side.
    """
    check_position(chat, position)
    if not refusal_tokens:
        raise UserError("the lens needs at least one refusal token")
    token_sets = [list(refusal_tokens), *_random_sets(model.cfg.d_vocab, refusal_tokens, n_controls, seed)]
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    prompts = [*harmful, *harmless]
    scores = torch.empty(len(token_sets), len(prompts), model.cfg.n_layers + 1, dtype=torch.float64)
    sides = {"harmful": harmful, "harmless": harmless}
    offset = 0
    for side in sides.values():
        for indices, residuals in stream_residuals(model, chat, side, n_last=-position, batch_size=batch_size):
            rows = [offset + index for index in indices]
            for layer in range(residuals.shape[2]):
                with torch.no_grad():
                    logits = read_out(model, residuals[:, 0, layer])
                p = as_double(logits).softmax(-1).cpu()
                for row, tokens in enumerate(token_sets):
                    scores[row, rows, layer] = log_odds(p[:, tokens].sum(-1))
        offset += len(side)
    controls = scores[1:, : len(harmful)].mean(1) - scores[1:, len(harmful) :].mean(1)
    return LensResult(
        scores[0],
        each_group(sides),
        tuple(prompts),
        controls,
        position,
        tuple(refusal_tokens),
        tuple(chat.tokenizer.decode([token]) for token in refusal_tokens),
        provenance=provenance_of(model, chat, sides, {"n_controls": n_controls, "seed": seed}),
    )


def from_run(run: RunInputs) -> LensResult:
    """The lens on the held-out prompts of a run, at the last position."""
    harmful, harmless = prompts_of(run).values()
    return refusal_lens(
        run.model, run.chat, harmful, harmless, run.refusal_tokens, seed=run.seed, batch_size=run.batch_size
    )


def _random_sets(d_vocab: int, tokens: Sequence[int], n_sets: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    others = torch.tensor([token for token in range(d_vocab) if token not in set(tokens)])
    return [others[torch.randperm(len(others), generator=generator)[: len(tokens)]].tolist() for _ in range(n_sets)]


def plot_lens(result: LensResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean ± SD of the refusal score over harmful and over harmless prompts, against layer.

    Examples:
        >>> plot_lens(found).layout.yaxis.title.text
        'refusal score, log-odds (nats)'
    """
    figure = go.Figure()
    for index, group in enumerate(("harmful", "harmless")):
        scores = result.of(group)
        hover = f"<b>{group}</b>, layer %{{x}}<br>%{{y:.3f}} ± %{{customdata:.3f}} nats"
        draw.add_spread(figure, scores, f"{group} (n = {len(scores)})", draw.group_style(index), hover)
    draw.zero_line(figure)
    title = "layer (stream entering the block; the last is the model's own score)"
    draw.layer_axis(figure, title)
    figure.update_yaxes(title="refusal score, log-odds (nats)")
    about = draw.subtitle(result.model_name, f"position {draw.signed(result.position)}", "bands: ± 1 SD over prompts")
    return draw.finish(figure, title="Refusal score read at each layer", about=about, height=380, look=look)


def plot_lens_gap(result: LensResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Harmful minus harmless, for the refusal tokens and for random sets of as many tokens.

    Examples:
        >>> plot_lens_gap(found).layout.yaxis.title.text
        'score, harmful − harmless (nats)'
    """
    layers = list(range(result.scores.shape[1]))
    tokens = ", ".join(draw.quoted(text) for text in result.token_texts)
    n_tokens = len(result.refusal_tokens)
    names = [f"refusal tokens {tokens}", f"{len(result.control_gaps)} random sets of {n_tokens} (full range)"]
    figure = go.Figure()
    if len(result.control_gaps):
        low, high = result.control_gaps.amin(0).tolist(), result.control_gaps.amax(0).tolist()
        figure.add_trace(draw.band(layers, low, high, names[1], draw.CONTROL))
        middle = result.control_gaps.mean(0).tolist()
        hover = "random tokens, layer %{x}<br>mean %{y:.3f} nats"
        draw.add_line(figure, layers, middle, names[1], draw.CONTROL, hover)
    hover = "<b>refusal tokens</b>, layer %{x}<br>%{y:.3f} nats"
    draw.add_line(figure, layers, result.gap.tolist(), names[0], draw.group_style(0), hover)
    draw.zero_line(figure)
    draw.layer_axis(figure)
    figure.update_yaxes(title="score, harmful − harmless (nats)")
    counts = draw.counted({group: len(result.of(group)) for group in ("harmful", "harmless")})
    about = draw.subtitle(result.model_name, f"position {draw.signed(result.position)}", counts)
    title = "Where harmful and harmless prompts part"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


FIGURES = {"lens": plot_lens, "lens_gap": plot_lens_gap}

call_with_a_run(__name__)
