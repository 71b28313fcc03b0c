"""What a direction says: the tokens that it raises and lowers through the final norm and the unembedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..directions import Direction, DirectionGrid, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..model.points import HookedModel
from ..model.readers import ModelWeights, NormMap, final_norm
from ..run.folder import RunInputs
from .result import AnalysisResult, call_with_a_run, provenance_of

_CHUNK = 8192


@dataclass(frozen=True, eq=False, repr=False)
class LogitsResult(AnalysisResult):
    """Direct effect of a direction on the logits, in standard deviations over the vocabulary.

    Examples:
        >>> found.top_z[0] == found.top_z.max(), found.bottom_z[0] == found.bottom_z.min()
        (tensor(True), tensor(True))
        >>> len(found.layer_z) == model.cfg.n_layers, found.refusal_tokens
        (True, (5, 7))
    """

    kind: ClassVar[str] = "logits"
    units: ClassVar[Mapping[str, str]] = {
        "top_z": "logit change, standard deviations over the vocabulary",
        "bottom_z": "logit change, standard deviations over the vocabulary",
        "refusal_z": "logit change, standard deviations over the vocabulary",
        "refusal_ranks": "rank among all tokens, 1 is the most raised",
        "layer_z": "mean over refusal tokens, standard deviations over the vocabulary",
        "control_z": "mean over refusal tokens for random directions, standard deviations over the vocabulary",
    }

    top_z: Float[Tensor, " top"]
    top_ids: Int[Tensor, " top"]
    bottom_z: Float[Tensor, " top"]
    """Most lowered first."""
    bottom_ids: Int[Tensor, " top"]
    refusal_z: Float[Tensor, " token"]
    refusal_ranks: Int[Tensor, " token"]
    layer_z: Float[Tensor, " layer"]
    """For the candidate directions at one position; NaN where there is none."""
    control_z: Float[Tensor, " control"]
    top_texts: tuple[str, ...]
    bottom_texts: tuple[str, ...]
    refusal_texts: tuple[str, ...]
    refusal_tokens: tuple[int, ...]
    d_vocab: int
    direction_layer: int
    direction_position: int | None

    def __post_init__(self) -> None:
        if len(self.top_z) != len(self.top_texts) or len(self.refusal_z) != len(self.refusal_tokens):
            raise ValueError("every token needs a value and a text")


def direction_logits(
    model: HookedModel,
    direction: Direction,
    refusal_tokens: Sequence[int],
    *,
    grid: DirectionGrid | None = None,
    n_top: int = 15,
    n_controls: int = 100,
    seed: int = 0,
) -> LogitsResult:
    """W_U (g ⊙ r̂) with the gain g of the final norm, as z-scores over the vocabulary.

    The norm's division by the stream's length, the logits' common shift and a soft cap change no order and are left
    out. A direction read in late layers tends to be little but the unembedding of the refusal tokens, which is why
    the published selection leaves those layers out (Arditi et al. 2024, section 2.3).

    Examples:
        >>> figure = plot_logits(direction_logits(model, direction, [5, 7], n_controls=3))

    Args:
        grid: candidates, for the same at every layer; those at the direction's position.
        n_controls: random directions.

    Raises:
        UserError: there is no refusal token.
    """
    check_in_stream(direction)
    if grid is not None:
        grid.check_all_layers()
    if not refusal_tokens:
        raise UserError("name at least one refusal token to find its rank")
    weights = ModelWeights(model)
    controls = torch.stack([direction.random_like(seed + index).unit for index in range(n_controls)])
    layers = _layer_units(grid, direction)
    vectors = NormMap.of(final_norm(model), model).apply(torch.cat([direction.unit[None], layers, controls]))
    z, rows = _z_scores(weights.unembedding, vectors, list(refusal_tokens))
    order = z.sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    wanted = list(refusal_tokens)
    layer_z = rows[1 : 1 + len(layers)].mean(-1)
    return LogitsResult(
        z[order[:n_top]],
        order[:n_top],
        z[order.flip(0)[:n_top]],
        order.flip(0)[:n_top],
        z[wanted],
        ranks[wanted],
        layer_z,
        rows[1 + len(layers) :].mean(-1),
        _texts(model, order[:n_top]),
        _texts(model, order.flip(0)[:n_top]),
        _texts(model, torch.tensor(wanted)),
        tuple(wanted),
        len(z),
        direction.layer,
        direction.position,
        provenance=provenance_of(
            model, None, {}, {"seed": seed, "n_controls": n_controls, "direction": direction.describe()}
        ),
    )


def from_run(run: RunInputs) -> LogitsResult:
    """The direction of a run, and every layer's candidate at its position."""
    return direction_logits(run.model, run.direction, run.refusal_tokens, grid=run.grid, seed=run.seed)


def _layer_units(grid: DirectionGrid | None, direction: Direction) -> Float[Tensor, "layer d_model"]:
    if grid is None or direction.position not in grid.positions:
        return torch.empty(0, len(direction.vector), dtype=torch.float64)
    row = grid.positions.index(direction.position)
    lengths = grid.vectors[row].norm(dim=-1, keepdim=True)
    missing = torch.tensor(grid.is_degenerate[row])[:, None]
    return torch.where(missing, torch.nan, grid.vectors[row].double() / lengths)


def _z_scores(
    unembedding: Float[Tensor, "d_vocab d_model"], vectors: Float[Tensor, "vector d_model"], wanted: list[int]
) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, "vector token"]]:
    """z-scores of every token for the first vector, and of the wanted tokens for all."""
    logits = torch.cat([piece.cpu().double() @ vectors.T for piece in unembedding.split(_CHUNK)])
    z = (logits - logits.mean(0)) / logits.std(0, correction=0)
    return z[:, 0], z[wanted].T


def _texts(model: HookedModel, ids: Int[Tensor, " token"]) -> tuple[str, ...]:
    entries = model.tokenizer.convert_ids_to_tokens(ids.tolist())
    return tuple(f"<{token}>" if entry is None else entry for entry, token in zip(entries, ids.tolist(), strict=True))


def plot_logits(result: LogitsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """The most lowered and the most raised tokens, and the ranks of the refusal tokens.

    Examples:
        >>> plot_logits(found).layout.xaxis.title.text
        'logit change (standard deviations over the vocabulary)'
    """
    figure = draw.panels(["most lowered", "most raised"], gap=0.14, shares_y=False)
    sides = (
        (result.bottom_z, result.bottom_texts, result.bottom_ids),
        (result.top_z, result.top_texts, result.top_ids),
    )
    for column, (z, texts, ids) in enumerate(sides, start=1):
        refusal = [token in result.refusal_tokens for token in ids.tolist()]
        figure.add_trace(_bars(z.tolist(), texts, ids.tolist(), refusal), row=1, col=column)
        figure.update_yaxes(autorange="reversed", type="category", automargin=True, row=1, col=column)
    figure.update_xaxes(title="logit change (standard deviations over the vocabulary)")
    figure.update_yaxes(title="token", col=1)
    ranks = ", ".join(
        f"'{draw.token_text(text)}' rank {rank}"
        for text, rank in zip(result.refusal_texts, result.refusal_ranks.tolist(), strict=True)
    )
    about = draw.subtitle(
        result.model_name,
        draw.read_at(result.direction_position, result.direction_layer),
        f"n = {result.d_vocab:,} tokens",
        f"refusal tokens (hatched): {ranks}",
    )
    height = max(220, 24 * len(result.top_z))
    title = "Logits of the direction through final norm and unembedding"
    return draw.finish(figure, title=title, about=about, height=height, look=look)


def plot_logits_by_layer(result: LogitsResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Mean z-score of the refusal tokens for the candidate of every layer, over the 95% range of random directions.

    Examples:
        >>> plot_logits_by_layer(found).layout.yaxis.title.text
        'mean over refusal tokens (SD)'
    """
    layers = range(len(result.layer_z))
    low, middle, high = (result.control_z.quantile(q).item() for q in (0.025, 0.5, 0.975))
    figure = go.Figure()
    name = f"{len(result.control_z)} random directions (95% range)"
    figure.add_trace(draw.band(layers, [low] * len(layers), [high] * len(layers), name, draw.CONTROL))
    draw.add_line(figure, layers, [middle] * len(layers), name, draw.CONTROL)
    name, hover = "candidate of the layer", "layer %{x}<br>%{y:.2f} standard deviations"
    draw.add_line(figure, layers, draw.gaps(result.layer_z), name, draw.group_style(0), hover)
    draw.zero_line(figure)
    draw.layer_axis(figure, "layer of the candidate (stream entering the block)")
    figure.update_yaxes(title="mean over refusal tokens (SD)")
    tokens = ", ".join(f"'{draw.token_text(text)}'" for text in result.refusal_texts)
    where = f"position {draw.signed(result.direction_position)}"
    about = draw.subtitle(result.model_name, where, f"n = {len(result.refusal_tokens)} refusal tokens: {tokens}")
    title = "Direct effect of each layer's candidate on the refusal tokens"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _bars(z: list[float], texts: tuple[str, ...], ids: list[int], refusal: list[bool]) -> go.Bar:
    labels = [f"{draw.quoted(text)} {token}" for text, token in zip(texts, ids, strict=True)]
    return go.Bar(
        x=z,
        y=labels,
        orientation="h",
        showlegend=False,
        marker={
            "color": ["#e2b3ae" if flag else "#d9d9d9" for flag in refusal],
            "pattern": {"shape": ["/" if flag else "" for flag in refusal], "fgcolor": draw.WARM},
            "line": {"color": draw.INK, "width": 1},
        },
        hovertemplate="%{y}<br>%{x:.2f} standard deviations<extra></extra>",
    )


FIGURES = {"logits": plot_logits, "logits_layers": plot_logits_by_layer}

call_with_a_run(__name__)
