"""Principal components of residual streams, with the class and the outcome of every prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..files import read_json
from ..judges.substring import is_refusal
from ..model.points import HookedModel
from ..reading import template_residuals
from ..run.folder import RunInputs
from ..text.chat import ChatFormat
from ..text.given import Groups, as_groups
from .result import AnalysisResult, call_with_a_run, check_position, each_group, prompts_of, provenance_of

_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class PcaResult(AnalysisResult):
    """Coordinates of every prompt on the first components, layer by layer.

    Examples:
        >>> found.coordinates.shape == (len(found.layers), len(found.prompts), found.explained.shape[1])
        True
        >>> bool((found.explained.sum(-1) <= 1 + 1e-6).all())
        True
    """

    kind: ClassVar[str] = "pca"
    units: ClassVar[Mapping[str, str]] = {
        "coordinates": "residual stream units, from the mean of all prompts",
        "explained": "fraction of the variance",
        "direction_cosines": "cosine of a component with the direction, 0 to 1 by choice of sign",
        "separation": "silhouette of the groups on these components, -1 to 1",
        "separation_null_p95": "the same with shuffled groups, 95th percentile",
    }

    coordinates: Float[Tensor, "layer prompt component"]
    """float64, as all of these."""
    explained: Float[Tensor, "layer component"]
    direction_cosines: Float[Tensor, "layer component"]
    separation: Float[Tensor, " layer"]
    """NaN where all prompts are at one point."""
    separation_null_p95: Float[Tensor, " layer"]
    layers: tuple[int, ...]
    position: int
    groups: tuple[str, ...]
    """The group of every prompt."""
    outcomes: tuple[str | None, ...]
    """"refused", "answered", or None where nobody looked."""
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        n = self.coordinates.shape[1]
        if not n == len(self.groups) == len(self.outcomes) == len(self.prompts):
            raise ValueError(f"{n} points, {len(self.groups)} groups, {len(self.outcomes)} outcomes")


def residual_pca(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    groups: Groups,
    *,
    layers: Sequence[int] | None = None,
    position: int = -1,
    outcomes: Mapping[str, Sequence[str | None]] | None = None,
    n_components: int = 2,
    n_shuffles: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> PcaResult:
    """Center the stream of all prompts at one position and rotate it onto its axes of largest variance.

    The sign of each component is that of its cosine with the direction, so that a picture does not flip. The groups
    take no part in the fit; their silhouette (Rousseeuw 1987) is compared with that of shuffled groups.

    Examples:
        >>> groups = {"harmful": harmful, "harmless": harmless}
        >>> figure = plot_pca(residual_pca(model, chat, direction, groups, layers=[2, 3], n_shuffles=3))

    Args:
        groups: name -> instructions.
        layers: by default the direction's own.
        position: a post-instruction position.
        outcomes: group -> "refused" or "answered" for each of its prompts.

    Raises:
        UserError: there are fewer prompts than components, or an outcome is missing.
    """
    check_in_stream(direction)
    groups = as_groups(groups)
    prompts = [text for texts in groups.values() for text in texts]
    check_position(chat, position)
    if len(prompts) <= n_components:
        raise UserError(f"{n_components} components need more than {n_components} prompts, not {len(prompts)}")
    named = each_group(groups)
    wanted = (direction.layer,) if layers is None else tuple(layers)
    table = template_residuals(model, chat, prompts, layers=wanted, n_last=-position, batch_size=batch_size)[:, 0]
    by_layer = [_components(table[:, row].double(), direction.unit, n_components) for row in range(len(wanted))]
    coordinates, explained, cosines = map(torch.stack, zip(*by_layer, strict=True))
    separations = [_separation(points, named, n_shuffles, seed) for points in coordinates]
    return PcaResult(
        coordinates,
        explained,
        cosines,
        torch.tensor([true for true, _ in separations], dtype=torch.float64),
        torch.tensor([null for _, null in separations], dtype=torch.float64),
        wanted,
        position,
        named,
        _flat_outcomes(groups, outcomes),
        tuple(prompts),
        provenance=provenance_of(
            model, chat, groups, {"seed": seed, "n_shuffles": n_shuffles, "direction": direction.describe()}
        ),
    )


def from_run(run: RunInputs) -> PcaResult:
    """The held-out prompts of a run at layer 0, the direction's layer and the last, at the direction's position."""
    groups, middle = prompts_of(run), run.direction.layer
    return residual_pca(
        run.model,
        run.chat,
        run.direction,
        groups,
        layers=sorted({0, middle, run.model.cfg.n_layers}),
        position=run.direction.position or -1,
        outcomes={side: _outcomes_of_run(run, side, texts) for side, texts in groups.items()},
        seed=run.seed,
        batch_size=run.batch_size,
    )


def _components(
    points: Float[Tensor, "prompt d_model"], unit: Float[Tensor, " d_model"], n: int
) -> tuple[Float[Tensor, "prompt component"], Float[Tensor, " component"], Float[Tensor, " component"]]:
    """Coordinates, explained fractions and cosines with the direction; all zero where the points are one."""
    centered = points - points.mean(0)
    left, singular, rows = torch.linalg.svd(centered, full_matrices=False)
    total = singular.square().sum()
    if total <= (_ROUNDING * points.norm()) ** 2:
        return torch.zeros(len(points), n).double(), torch.zeros(n).double(), torch.zeros(n).double()
    cosines = rows[:n] @ unit
    signs = torch.where(cosines < 0, -1.0, 1.0).double()
    return left[:, :n] * singular[:n] * signs, singular[:n].square() / total, cosines * signs


def _separation(
    coordinates: Float[Tensor, "prompt component"], groups: Sequence[str], n_shuffles: int, seed: int
) -> tuple[float, float]:
    """Silhouette of the groups, and the 95th percentile of that of shuffled groups; NaN without two groups."""
    names = sorted(set(groups))
    if not 2 <= len(names) < len(groups) or not bool(coordinates.any()):
        return float("nan"), float("nan")
    labels = torch.tensor([names.index(group) for group in groups])
    distances = torch.cdist(coordinates, coordinates)
    generator = torch.Generator().manual_seed(seed)
    null = [_silhouette(distances, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(n_shuffles)]
    return _silhouette(distances, labels), torch.tensor(null, dtype=torch.float64).quantile(0.95).item()


def _silhouette(distances: Float[Tensor, "prompt prompt"], labels: Tensor) -> float:
    """Mean of (b − a) / max(a, b): a the mean distance within a point's group, b that to the nearest other group."""
    members = torch.nn.functional.one_hot(labels).double()
    sizes = members.sum(0)
    sums = distances @ members
    rows = torch.arange(len(labels))
    own = sizes[labels]
    within = sums[rows, labels] / (own - 1).clamp(min=1)
    other = sums / sizes
    other[rows, labels] = torch.inf
    nearest = other.amin(1)
    values = (nearest - within) / torch.maximum(nearest, within)
    return torch.where(own > 1, values, 0.0).mean().item()


def _flat_outcomes(
    groups: Mapping[str, Sequence[str]], outcomes: Mapping[str, Sequence[str | None]] | None
) -> tuple[str | None, ...]:
    flat: list[str | None] = []
    for name, texts in groups.items():
        known = (outcomes or {}).get(name, [None] * len(texts))
        if len(known) != len(texts):
            raise UserError(f"{len(known)} outcomes were given for the {len(texts)} prompts of {name!r}")
        flat.extend(known)
    return tuple(flat)


def _outcomes_of_run(run: RunInputs, side: str, prompts: Sequence[str]) -> list[str | None]:
    """What the plain model did with each prompt, where the run has its answers."""
    path = run.path / f"completions/{side}_baseline_completions.json"
    if not path.exists():
        return [None] * len(prompts)
    answers = {row["prompt"]: row["response"] for row in read_json(path)}
    return [
        None if prompt not in answers else "refused" if is_refusal(answers[prompt]) else "answered"
        for prompt in prompts
    ]


_FILLED = {"refused": True, "answered": False, None: True}
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross")


def plot_pca(result: PcaResult, **look: Unpack[draw.Look]) -> go.Figure:
    """One panel per layer: shape and color are the group, filled is refused, open is answered.

    Examples:
        >>> plot_pca(found).layout.title.text
        'Principal components of the stream'

    Raises:
        UserError: there is only one component.
    """
    if result.coordinates.shape[2] < 2:
        raise UserError("a picture needs 2 components; call residual_pca with n_components=2")
    spread = [row for row in range(len(result.layers)) if bool(result.coordinates[row].any())]
    shown, groups = spread or [0], list(dict.fromkeys(result.groups))
    figure = draw.panels([_panel(result, row) for row in shown], gap=0.09, shares_y=False)
    for column, row in enumerate(shown, start=1):
        for index, (group, style) in enumerate(zip(groups, draw.group_styles(groups), strict=True)):
            for outcome in dict.fromkeys(result.outcomes):
                kinds = zip(result.groups, result.outcomes, strict=True)
                rows = [prompt for prompt, each in enumerate(kinds) if each == (group, outcome)]
                if rows:
                    kind = f"{group}, {outcome}" if outcome else group
                    name = f"{draw.plain(kind)} (n = {len(rows)})"
                    shape = _SHAPES[index % len(_SHAPES)]
                    trace = _points(result, row, rows, name, style.color, shape, is_filled=_FILLED[outcome])
                    figure.add_trace(trace, row=1, col=column)
        first, second = (100 * float(value) for value in result.explained[row, :2])
        cosine = float(result.direction_cosines[row, 0])
        figure.update_xaxes(title=f"component 1 ({first:.0f}%, cosine with r {draw.number(cosine)})", col=column)
        figure.update_yaxes(title=f"component 2 ({second:.0f}%)", col=column)
    about = draw.subtitle(
        result.model_name,
        f"n = {len(result.prompts)} prompts",
        f"position {draw.signed(result.position)}",
        "residual stream units",
        "percent: share of variance",
        _left_out([result.layers[row] for row in range(len(result.layers)) if row not in shown]),
    )
    title = "Principal components of the stream"
    return draw.finish(figure, title=title, about=about, height=360, look=look)


def _points(
    result: PcaResult, row: int, rows: list[int], name: str, color: str, shape: str, *, is_filled: bool
) -> go.Scatter:
    return go.Scatter(
        x=result.coordinates[row, rows, 0].tolist(),
        y=result.coordinates[row, rows, 1].tolist(),
        mode="markers",
        name=name,
        legendgroup=name,
        marker={
            "symbol": shape if is_filled else f"{shape}-open",
            "color": color,
            "size": 8,
            "opacity": 0.8,
            "line": {"color": color if not is_filled else "white", "width": 1.4 if not is_filled else 0.6},
        },
        customdata=[draw.shortened(result.prompts[i]) for i in rows],
        hovertemplate=f"<b>{name}</b><br>%{{customdata}}<br>(%{{x:.3g}}, %{{y:.3g}})<extra></extra>",
    )


def _left_out(layers: Sequence[int]) -> str:
    return f"no variance at layer {', '.join(map(str, layers))}, which is left out" if layers else ""


def _panel(result: PcaResult, row: int) -> str:
    value, null = float(result.separation[row]), float(result.separation_null_p95[row])
    if value != value:
        note = "no variance: all prompts at one point"
    else:
        note = f"silhouette {draw.number(value)}, shuffled {draw.number(null)}"
    return f"<b>layer {result.layers[row]}</b><br>{note}"


FIGURES = {"pca": plot_pca}

call_with_a_run(__name__)
