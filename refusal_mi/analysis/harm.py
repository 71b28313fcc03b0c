"""Two judgements apart: whether the model finds an instruction harmful, and whether it is about to refuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..figures import style as draw
from ..interventions import Ablate, Interventions, as_interventions
from ..measures import RefusalTokens, refusal_scores
from ..model.points import HookedModel
from ..reading import template_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Groups, Prompts, as_groups, as_prompts
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of


@dataclass(frozen=True, eq=False, repr=False)
class HarmResult(AnalysisResult):
    """Belief scores of every prompt for harm (last instruction token) and refusal (last template token).

    Examples:
        >>> found.groups, sum(found.quadrants("harmful").values()) == len(found.deltas["harmful"])
        (('harmful', 'harmless'), True)
    """

    kind: ClassVar[str] = "harm"
    units: ClassVar[Mapping[str, str]] = {
        "deltas": "mean difference of cosines over layers (−2..2)",
        "scores": "refusal score, log-odds (nats)",
        "cosines": "cosine",
        "harm_vectors": "residual stream units",
        "refusal_vectors": "residual stream units",
    }

    groups: tuple[str, ...]
    deltas: dict[str, Tensor]
    """Group -> `[prompt 2]`: Δharm, Δrefuse, float64; positive is harmful, refusing."""
    scores: dict[str, Tensor]
    """Group -> `[prompt]`: first-token refusal score, float64."""
    layers: tuple[int, ...]
    """The layers that are averaged over: 1..n_layers (at layer 0 all prompts have the same last token)."""
    cosines: Float[Tensor, " layer"]
    """Cosine of the harmfulness direction with the refusal direction, float64."""
    harm_vectors: Float[Tensor, "layer d_model"]
    """Mean over harmful minus mean over harmless prompts at the last instruction token, float64."""
    refusal_vectors: Float[Tensor, "layer d_model"]
    """Mean over refused minus mean over answered prompts at the last template token, float64."""
    n_refused: int
    """Prompts of the training sets that were refused, by the sign of their refusal score (or as given)."""
    n_answered: int

    def __post_init__(self) -> None:
        if self.cosines.shape != (len(self.layers),) or set(self.deltas) != set(self.groups):
            raise ValueError("harm and refusal need one cosine a layer and scores for every group")

    def quadrants(self, group: str) -> dict[str, int]:
        """How many prompts of a group are judged harmful or not, and refused or answered."""
        harmful, refused = (self.deltas[group] > 0).T
        return {
            f"{harm_word}, {refuse_word}": int(((harmful == is_harmful) & (refused == is_refused)).sum())
            for is_harmful, harm_word in ((True, "harmful"), (False, "harmless"))
            for is_refused, refuse_word in ((True, "refused"), (False, "answered"))
        }


def separate_harm(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Prompts,
    harmless: Prompts,
    groups: Groups,
    refusal_tokens: RefusalTokens,
    *,
    refused: Sequence[bool] | None = None,
    interventions: Mapping[str, Interventions] | None = None,
    batch_size: int = 32,
) -> HarmResult:
    """Δ = mean over layers of cos(h, mean of A) − cos(h, mean of B), for harm and for refusal.

    For Δharm, h is the stream at the last instruction token and A, B are `harmful` and `harmless`; for Δrefuse, h is
    the stream at the last template token and A, B are those of the same prompts that the model refuses and answers
    (Zhao et al. 2025, "LLMs encode harmfulness and refusal separately").

    Examples:
        >>> groups = {"harmful": harmful, "harmless": harmless}
        >>> found = separate_harm(model, chat, harmful, harmless, groups, [5, 7], refused=[True, False] * 5)
        >>> found.n_refused, found.n_answered
        (5, 5)

    Args:
        harmful: training prompts; share none with `groups`.
        groups: name -> instructions to place on the map.
        refused: of every prompt of `harmful`, then `harmless`; by default the sign of its refusal score.
        interventions: name of a group -> what is done to the model while it is read.

    Raises:
        UserError: a set is empty, or the model refuses all training prompts, or none.
    """
    harmful, harmless, groups = as_prompts(harmful), as_prompts(harmless), as_groups(groups)
    training = [*harmful, *harmless]
    if refused is None:
        refused = (_scores(model, chat, training, refusal_tokens, (), batch_size) > 0).tolist()
    flags = torch.tensor(list(refused))
    if len(flags) != len(training) or bool(flags.all()) or not bool(flags.any()):
        raise UserError(
            f"of {len(training)} training prompts {int(flags.sum())} count as refused, and both kinds are needed; "
            "add prompts of the other kind, or say with refused=[...] which ones were refused"
        )
    inside, last = _streams(model, chat, training, (), batch_size)
    harm_means = _two_means(inside, torch.arange(len(training)) < len(harmful))
    refuse_means = _two_means(last, flags)
    deltas, scores = {}, {}
    for name, instructions in groups.items():
        hooks = as_interventions((interventions or {}).get(name, ()))
        streams = _streams(model, chat, instructions, hooks, batch_size)
        both = [_delta(x, means) for x, means in zip(streams, (harm_means, refuse_means), strict=True)]
        deltas[name] = torch.stack(both, dim=1)
        scores[name] = _scores(model, chat, instructions, refusal_tokens, hooks, batch_size)
    harm_vectors, refusal_vectors = harm_means[0] - harm_means[1], refuse_means[0] - refuse_means[1]
    return HarmResult(
        tuple(groups),
        deltas,
        scores,
        tuple(range(1, model.cfg.n_layers + 1)),
        torch.cosine_similarity(harm_vectors, refusal_vectors, dim=-1),
        harm_vectors,
        refusal_vectors,
        int(flags.sum()),
        int((~flags).sum()),
        provenance=provenance_of(
            model, chat, {"harmful (training)": harmful, "harmless (training)": harmless, **groups}
        ),
    )


def from_run(run: RunInputs) -> HarmResult:
    """Held-out prompts on the map, the harmful ones also with the chosen direction ablated."""
    harmful, harmless = prompts_of(run, "train").values()
    refused = None
    if all(labelled := [run.labelled(side, "train") for side in SIDES]):
        harmful, harmless = (list(flags) for flags in labelled)
        refused = [flag for flags in labelled for flag in flags.values()]
    groups = prompts_of(run)
    groups["harmful, ablated"] = groups["harmful"]
    return separate_harm(
        run.model,
        run.chat,
        harmful,
        harmless,
        groups,
        run.refusal_prefixes,
        refused=refused,
        interventions={"harmful, ablated": (Ablate(run.direction),)},
        batch_size=run.batch_size,
    )


def _scores(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    refusal_tokens: RefusalTokens,
    interventions: Interventions,
    batch_size: int,
) -> Float[Tensor, " prompt"]:
    return refusal_scores(model, chat, instructions, refusal_tokens, interventions=interventions, batch_size=batch_size)


def _streams(
    model: HookedModel,
    chat: ChatFormat,
    instructions: Sequence[str],
    interventions: Interventions,
    batch_size: int,
) -> tuple[Float[Tensor, "prompt layer d_model"], Float[Tensor, "prompt layer d_model"]]:
    """The stream at the last instruction token and at the last template token, float64."""
    table = template_residuals(
        model,
        chat,
        instructions,
        layers=range(1, model.cfg.n_layers + 1),
        n_last=len(chat.positions) + 1,
        interventions=interventions,
        batch_size=batch_size,
    )
    return table[:, 0].double(), table[:, -1].double()


def _two_means(
    x: Float[Tensor, "prompt layer d_model"], is_first: Tensor
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    return x[is_first].mean(0), x[~is_first].mean(0)


def _delta(
    x: Float[Tensor, "prompt layer d_model"],
    means: tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]],
) -> Float[Tensor, " prompt"]:
    a, b = (torch.cosine_similarity(x, mean, dim=-1) for mean in means)
    return (a - b).mean(-1)


_SYMBOLS = ("circle", "square-open", "x", "diamond-open", "triangle-up", "cross-open")


def plot_harm(result: HarmResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Δharm × Δrefuse of every prompt; beside it the cosine of the two directions by layer.

    Examples:
        >>> plot_harm(found).layout.title.text
        'Harm and refusal apart'
    """
    titles = ["every prompt", "cosine of the two directions"]
    figure = draw.panels(titles, gap=0.1, shares_y=False, widths=[0.62, 0.38])
    for index, (group, style) in enumerate(zip(result.groups, draw.group_styles(result.groups), strict=True)):
        delta, scores = result.deltas[group], result.scores[group]
        label = draw.plain(group)
        name = f"{label} (n = {len(scores)})"
        hover = (
            f"<b>{label}</b>, prompt %{{customdata[0]}}<br>Δharm %{{x:.3f}}, Δrefuse %{{y:.3f}}"
            "<br>refusal score %{customdata[1]:.2f} nats<extra></extra>"
        )
        figure.add_trace(
            go.Scatter(
                x=delta[:, 0].tolist(),
                y=delta[:, 1].tolist(),
                mode="markers",
                name=name,
                legendgroup=name,
                marker={
                    "color": style.color,
                    "symbol": _SYMBOLS[index % len(_SYMBOLS)],
                    "size": 8,
                    "opacity": 0.85,
                },
                customdata=[[number + 1, score] for number, score in enumerate(scores.tolist())],
                hovertemplate=hover,
            ),
            row=1,
            col=1,
        )
    draw.zero_line(figure, row=1, col=1)
    figure.add_vline(0, line={"color": draw.MUTED, "width": 1}, row=1, col=1)
    _name_quadrants(figure)
    extra: dict[str, Any] = {"hovertemplate": "layer %{x}<br>cosine %{y:.3f}<extra></extra>", "showlegend": False}
    trace = draw.line(result.layers, result.cosines.tolist(), "cosine", draw.other_style(0), **extra)
    figure.add_trace(trace, row=1, col=2)
    draw.zero_line(figure, row=1, col=2)
    figure.update_xaxes(title="Δharm, last instruction token (difference of cosines)", row=1, col=1)
    figure.update_yaxes(title="Δrefuse, last template token", row=1, col=1)
    draw.layer_axis(figure, "layer", row=1, col=2)
    figure.update_yaxes(title="cos(harm, refusal)", range=[-1.05, 1.05], row=1, col=2)
    clusters = f"clusters from {result.n_refused} refused and {result.n_answered} answered training prompts"
    about = draw.subtitle(result.model_name, f"mean over layers {result.layers[0]}–{result.layers[-1]}", clusters)
    title = "Harm and refusal apart"
    return draw.finish(figure, title=title, about=about, height=400, look=look)


def _name_quadrants(figure: go.Figure) -> None:
    corners = (
        (0, 1, "harmless,<br>refused"),
        (1, 1, "harmful,<br>refused"),
        (0, 0, "harmless,<br>answered"),
        (1, 0, "harmful,<br>answered"),
    )
    for x, y, text in corners:
        figure.add_annotation(
            x=x,
            y=y,
            xref="x domain",
            yref="y domain",
            xanchor="left" if x == 0 else "right",
            yanchor="top" if y else "bottom",
            text=f"<i>{text}</i>",
            font={"color": draw.MUTED, "size": 13},
            showarrow=False,
        )


FIGURES = {"harm": plot_harm}

call_with_a_run(__name__)
