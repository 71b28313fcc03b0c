"""Linear probes: how well harmful and harmless prompts can be told apart at every layer and position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..estimators.linear import is_varied, logistic_weights
from ..figures import style as draw
from ..model.points import HookedModel
from ..progress import track
from ..reading import template_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from .result import AnalysisResult, call_with_a_run, prompts_of, provenance_of, template_tokens

METHODS = ("difference of means", "logistic regression")


@dataclass(frozen=True, eq=False, repr=False)
class ProbesResult(AnalysisResult):
    """Cross-validated AUC of two probes, its shuffled-label null, and their cosines to the direction.

    Examples:
        >>> found.auc.shape[:2] == (len(found.methods), len(found.positions))
        True
        >>> found.methods, found.n_folds
        (('difference of means', 'logistic regression'), 2)
    """

    kind: ClassVar[str] = "probes"
    units: ClassVar[Mapping[str, str]] = {
        "auc": "AUC on held-out folds, 0.5 is chance",
        "auc_sd": "AUC, standard deviation over folds",
        "null_low": "AUC, smallest with shuffled labels",
        "null_high": "AUC, largest with shuffled labels",
        "cosines": "cosine of the probe with the direction, -1 to 1",
    }

    auc: Float[Tensor, "method pos layer"]
    """Mean over folds; layers 0..n_layers."""
    auc_sd: Float[Tensor, "method pos layer"]
    null_low: Float[Tensor, "method pos layer"]
    null_high: Float[Tensor, "method pos layer"]
    cosines: Float[Tensor, "method pos layer"]
    """Of the probe fitted on all prompts, in the coordinates of the stream; NaN where it is zero."""
    methods: tuple[str, ...]
    positions: tuple[int, ...]
    position_tokens: tuple[str, ...]
    n_harmful: int
    n_harmless: int
    n_folds: int
    n_shuffles: int

    def __post_init__(self) -> None:
        if self.auc.shape[:2] != (len(self.methods), len(self.positions)):
            raise ValueError(
                f"{tuple(self.auc.shape)} for {len(self.methods)} methods, {len(self.positions)} positions"
            )
        if bool(self.auc.isnan().any()):
            raise ValueError("an AUC is a number everywhere, also where the classes are identical")


def linear_probes(
    model: HookedModel,
    chat: ChatFormat,
    harmful: Prompts,
    harmless: Prompts,
    direction: Direction,
    *,
    positions: Sequence[int] | None = None,
    n_folds: int = 5,
    n_shuffles: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> ProbesResult:
    """Fit a difference of means and an L2 logistic regression on standardized features, fold by fold.

    Two controls are part of the result: the range of AUC with shuffled labels, and layer 0 at template positions,
    where the stream holds only the template's own token and AUC is 0.5 exactly (with learned positions, as in GPT-2,
    it also holds the length of the prompt).

    Examples:
        >>> found = linear_probes(model, chat, harmful, harmless, direction, positions=[-1], n_folds=2, n_shuffles=1)
        >>> found.methods, bool(((found.auc >= 0) & (found.auc <= 1)).all())
        (('difference of means', 'logistic regression'), True)

    Args:
        positions: post-instruction positions; all by default.
        n_shuffles: relabelings of the null, each cross-validated like the true labels.

    Raises:
        UserError: there are fewer prompts on a side than folds.
    """
    check_in_stream(direction)
    harmful, harmless = as_prompts(harmful), as_prompts(harmless)
    if min(len(harmful), len(harmless)) < n_folds or n_folds < 2:
        raise UserError(
            f"{n_folds} folds need as many prompts on each side, not {len(harmful)} harmful, {len(harmless)} harmless"
        )
    wanted = chat.positions if positions is None else tuple(positions)
    if not set(wanted) <= set(chat.positions):
        raise UserError(f"no positions {wanted}: the post-instruction positions are {chat.positions}")
    table = template_residuals(model, chat, [*harmful, *harmless], batch_size=batch_size)
    labels = torch.tensor([True] * len(harmful) + [False] * len(harmless))
    generator = torch.Generator().manual_seed(seed)
    relabeled = [labels, *(labels[torch.randperm(len(labels), generator=generator)] for _ in range(n_shuffles))]
    shape = len(wanted), table.shape[2]
    aucs = torch.empty(1 + n_shuffles, len(METHODS), *shape, n_folds, dtype=torch.float64)
    cosines = torch.empty(len(METHODS), *shape, dtype=torch.float64)
    for row in track(range(len(wanted)), "fitting probes"):
        for layer in range(shape[1]):
            features = table[:, chat.positions.index(wanted[row]), layer].double()
            for labeling, flags in enumerate(relabeled):
                aucs[labeling, :, row, layer] = _cross_validated(features, flags, n_folds, seed)
            cosines[:, row, layer] = torch.stack([_cosine(w, direction.unit) for w in _fit(features, labels)])
    means = aucs.mean(-1)
    null = means[1:] if n_shuffles else torch.full_like(means, torch.nan)
    tokens = template_tokens(chat)
    return ProbesResult(
        means[0],
        aucs[0].std(-1),
        null.amin(0),
        null.amax(0),
        cosines,
        METHODS,
        wanted,
        tuple(tokens[position] for position in wanted),
        len(harmful),
        len(harmless),
        n_folds,
        n_shuffles,
        provenance=provenance_of(
            model,
            chat,
            {"harmful": harmful, "harmless": harmless},
            {"seed": seed, "n_folds": n_folds, "n_shuffles": n_shuffles, "direction": direction.describe()},
        ),
    )


def area_under_curve(above: Float[Tensor, " a"], below: Float[Tensor, " b"]) -> float:
    """The chance that a score of the first class exceeds one of the second; ties count half.

    Examples:
        >>> area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
        0.875
    """
    gaps = above[:, None] - below
    return ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean().item()


def from_run(run: RunInputs) -> ProbesResult:
    """Probes on the held-out prompts of a run."""
    harmful, harmless = prompts_of(run).values()
    return linear_probes(
        run.model, run.chat, harmful, harmless, run.direction, seed=run.seed, batch_size=run.batch_size
    )


def _cross_validated(
    features: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"], n_folds: int, seed: int
) -> Float[Tensor, "method fold"]:
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(features.numpy(), labels.numpy())
    aucs = torch.empty(len(METHODS), n_folds, dtype=torch.float64)
    for fold, (train, test) in enumerate(folds):
        center = features[train].mean(0)
        for method, weight in enumerate(_fit(features[train], labels[train])):
            scores = (features[test] - center) @ weight
            aucs[method, fold] = area_under_curve(scores[labels[test]], scores[~labels[test]])
    return aucs


def _fit(
    features: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Weights of both probes, in the coordinates of the stream; zero where the features are all the same."""
    means = (features[labels].mean(0) - features[~labels].mean(0)) * is_varied(features)
    return means, logistic_weights(features, labels)


def _cosine(weight: Float[Tensor, " d_model"], unit: Float[Tensor, " d_model"]) -> Float[Tensor, ""]:
    norm = weight.norm()
    return weight @ unit / norm if norm > 0 else torch.tensor(torch.nan, dtype=torch.float64)


def plot_probes(result: ProbesResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cross-validated AUC of both probes at every position, over the range that shuffled labels reach.

    Examples:
        >>> plot_probes(found).layout.yaxis.title.text
        'AUC, 2-fold cross-validation'
    """
    layers = range(result.auc.shape[2])
    figure = draw.panels([draw.plain(method) for method in result.methods])
    for column, method in enumerate(result.methods, start=1):
        place, row = {"row": 1, "col": column}, column - 1
        null = "shuffled labels (range over positions)"
        low, high = result.null_low[row].amin(0).tolist(), result.null_high[row].amax(0).tolist()
        figure.add_trace(draw.band(layers, low, high, null, draw.CONTROL), **place)
        chance = "chance<extra></extra>"
        trace = draw.line(layers, [0.5] * len(layers), null, draw.CONTROL, mode="lines", hovertemplate=chance)
        figure.add_trace(trace, **place)
        for index, (name, style) in enumerate(draw.position_styles(result.positions, result.position_tokens)):
            hover = (
                f"<b>{draw.plain(method)}</b><br>position {name}, layer %{{x}}"
                "<br>AUC %{y:.3f} ± %{customdata[0]:.3f}"
                "<br>shuffled %{customdata[1]:.3f} to %{customdata[2]:.3f}"
            )
            columns = (result.auc_sd, result.null_low, result.null_high)
            custom = list(zip(*(table[row, index].tolist() for table in columns), strict=True))
            draw.add_line(figure, layers, result.auc[row, index].tolist(), name, style, hover, custom, **place)
    draw.layer_axis(figure)
    figure.update_yaxes(range=[-0.03, 1.05], dtick=0.25)
    figure.update_yaxes(title=f"AUC, {result.n_folds}-fold cross-validation", col=1)
    title = "Linear probes: harmful against harmless"
    about = draw.subtitle(result.model_name, _counts(result), f"{result.n_shuffles} shuffles")
    return draw.finish(figure, title=title, about=about, height=380, look=look)


def plot_probe_cosines(result: ProbesResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Cosine of each probe, fitted on all prompts, with the direction.

    Examples:
        >>> plot_probe_cosines(found).layout.yaxis.title.text
        'cosine with the direction'
    """
    layers = range(result.auc.shape[2])
    figure = draw.panels([draw.plain(method) for method in result.methods])
    for column, method in enumerate(result.methods, start=1):
        for index, (name, style) in enumerate(draw.position_styles(result.positions, result.position_tokens)):
            hover = f"<b>{draw.plain(method)}</b><br>position {name}, layer %{{x}}<br>cosine %{{y:.3f}}"
            values = draw.gaps(result.cosines[column - 1, index])
            draw.add_line(figure, layers, values, name, style, hover, row=1, col=column)
        draw.zero_line(figure, row=1, col=column)
    draw.layer_axis(figure)
    figure.update_yaxes(title="cosine with the direction", col=1)
    about = draw.subtitle(result.model_name, _counts(result))
    title = "Cosine of the probes with the direction"
    return draw.finish(figure, title=title, about=about, height=340, look=look)


def _counts(result: ProbesResult) -> str:
    return draw.counted({"harmful": result.n_harmful, "harmless": result.n_harmless})


FIGURES = {"probes": plot_probes, "probes_cosines": plot_probe_cosines}

call_with_a_run(__name__)
