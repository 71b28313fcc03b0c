"""Dose and response: what growing amounts of a direction, and of random directions, do to a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack, get_args

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from ..directions import Direction, check_in_stream
from ..errors import UserError
from ..figures import style as draw
from ..files import read_json
from ..interventions import Ablate, Add, Intervention
from ..judges.substring import Judge, SubstringJudge
from ..measures import RefusalTokens, ScoredText, texts_to_score
from ..model.points import HookedModel
from ..run.folder import RunInputs
from ..stats import Rate, mean_interval
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..text.prompts import load_prompts
from ..values import check_named
from .dose_reader import DoseReader
from .result import AnalysisResult, call_with_a_run, finite_or_none, prompts_of, provenance_of

Kind = Literal["add", "ablate"]
Side = Literal["harmful", "harmless"]
Measure = Literal["score", "refused", "degenerate", "kl"]
COEFFICIENTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MAX_PROMPTS, MAX_TEXTS, RUN_TOKENS = 32, 32, 32


@dataclass(frozen=True, eq=False, repr=False)
class DoseResult(AnalysisResult):
    """Responses to every amount of the direction (first) and of random directions of equal norm (the others).

    Tables are `[direction amount prompt]`, float64, by curve: "add/harmful", "add/harmless", "ablate/harmful",
    "ablate/harmless". NaN where nothing was generated or scored.

    A long random vector is no control that does nothing: it drowns out part of the stream and takes both sides'
    scores toward the middle, whichever its sign. What it does not do is steer (`steering`), or reach what the
    direction reaches (`z`).

    Examples:
        >>> found.coefficients, found.n_random, found.n_prompts("harmful")
        ((0.0, 1.0), 3, 6)
        >>> found.to_frame().columns.tolist()
        ['of', 'direction', 'amount', 'share', 'prompt', 'scores']
    """

    kind: ClassVar[str] = "dose"
    units: ClassVar[Mapping[str, str]] = {
        "coefficients": "raw direction lengths",
        "strengths": "fraction of the component removed",
        "scores": "refusal score, log-odds (nats)",
        "refused": "1 refused, 0 not",
        "degenerate": "1 degenerate text, 0 not",
        "kl": "next-token KL(plain ‖ changed) (nats)",
        "ce_loss": "nats per token",
        "stream_norm": "residual stream units",
    }

    coefficients: tuple[float, ...]
    strengths: tuple[float, ...]
    scores: dict[str, Tensor]
    refused: dict[str, Tensor]
    degenerate: dict[str, Tensor]
    kl: dict[str, Tensor]
    ce_loss: dict[str, Tensor]
    """"add" and "ablate" -> `[direction amount]`."""
    norm: float
    """Length of the raw direction and of the random ones."""
    stream_norm: float | None = None
    """Mean norm of the stream at the layer, over the tokens of plain texts but the first; None without texts."""

    def __post_init__(self) -> None:
        for curve, table in self.scores.items():
            if table.shape[1] != len(self.amounts(curve)):
                raise ValueError(f"{curve} has {table.shape[1]} amounts, not {len(self.amounts(curve))}")

    @property
    def n_random(self) -> int:
        return next(iter(self.scores.values())).shape[0] - 1

    def n_prompts(self, side: Side) -> int:
        return self.scores[f"add/{side}"].shape[-1]

    def amounts(self, curve: str) -> tuple[float, ...]:
        """The x axis of a curve."""
        return self.coefficients if curve.startswith("add") else self.strengths

    def shares(self, curve: str) -> list[float | None]:
        """‖c·r‖ / mean ‖h‖ at every amount, a dose that compares across models and layers; None of ablations."""
        if self.stream_norm is None or not curve.startswith("add"):
            return [None] * len(self.amounts(curve))
        return [abs(amount) * self.norm / self.stream_norm for amount in self.amounts(curve)]

    def to_frame(self, field: str | None = None) -> Any:
        """A pandas table of one measure, scores by default, with a row for each direction, amount and prompt.

        "share" is the dose as a fraction of the stream's norm (`shares`), direction 0 the one in question.

        Raises:
            UserError: there is no such measure, or pandas is not installed.
        """
        table = super().to_frame(field)
        index, curves = table.pop("axis 1"), table["of"]
        places = list(zip(curves, index, strict=True))
        table.insert(1, "direction", table.pop("axis 0"))
        table.insert(2, "amount", [self.amounts(curve)[at] for curve, at in places])
        table.insert(3, "share", [self.shares(curve)[at] for curve, at in places])
        return table.rename(columns={"axis 2": "prompt"})

    def band(self, measure: Measure, curve: str, direction: int = 0) -> list[tuple[float, float, float] | None]:
        """(mean, low, high) at every amount: 95% intervals, Wilson's of rates and Student's of means; None if unread.

        Args:
            direction: 0 is the direction, 1.. are the random ones.
        """
        return [_interval(measure, values) for values in self._table(measure, curve)[direction].tolist()]

    def control_band(self, measure: Measure, curve: str) -> list[tuple[float, float, float] | None]:
        """(mean, lowest, highest) over random directions of their means over prompts; None at amounts nobody read."""
        means = self._table(measure, curve)[1:].mean(-1)
        means = means[~means.isnan().any(-1)]
        if not len(means):
            return [None] * len(self.amounts(curve))
        columns = (means.mean(0), means.amin(0), means.amax(0))
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def z(self, curve: str) -> list[float | None]:
        """(score − mean of random) / SD of random at every amount, of mean scores; None at 0 or below 3 directions."""
        means = self.scores[curve].mean(-1)
        if self.n_random < 3:
            return [None] * means.shape[1]
        z = (means[0] - means[1:].mean(0)) / means[1:].std(0)
        return [
            finite_or_none(value) if amount else None
            for amount, value in zip(self.amounts(curve), z.tolist(), strict=True)
        ]

    def steering(self, side: Side, direction: int = 0) -> float:
        """Half of score(c) − score(−c), nats, at the largest c in the sweep: what the sign of the direction decides.

        Raises:
            UserError: the sweep has no coefficient of both signs.
        """
        both = [amount for amount in self.coefficients if amount > 0 and -amount in self.coefficients]
        if not both:
            raise UserError("steering needs a coefficient and its negative among the coefficients")
        means = self.scores[f"add/{side}"][direction].mean(-1)
        ends = [means[self.coefficients.index(sign * max(both))] for sign in (1, -1)]
        return ((ends[0] - ends[1]) / 2).item()

    def monotonicity(self, curve: str, direction: int = 0) -> float:
        """Spearman correlation of the amount with the mean refusal score."""
        return _spearman(self.amounts(curve), self.scores[curve][direction].mean(-1).tolist())

    def _table(self, measure: Measure, curve: str) -> Float[Tensor, "direction amount prompt"]:
        check_named("measure", measure, get_args(Measure))
        check_named("curve", curve, self.scores)
        tables = {"score": self.scores, "refused": self.refused, "degenerate": self.degenerate, "kl": self.kl}
        return tables[measure][curve]


def _interval(measure: Measure, values: list[float]) -> tuple[float, float, float] | None:
    if finite_or_none(sum(values)) is None:
        return None
    if measure not in ("refused", "degenerate"):
        return mean_interval(values)
    rate = Rate.of([value > 0 for value in values])
    return rate.value, *rate.interval


def dose_response(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    harmful: Prompts,
    harmless: Prompts,
    refusal_tokens: RefusalTokens,
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    strengths: Sequence[float] = STRENGTHS,
    texts: Sequence[ScoredText] = (),
    n_random: int = 8,
    n_random_answered: int = 2,
    max_new_tokens: int | None = 32,
    judge: Judge | None = None,
    batch_size: int = 32,
) -> DoseResult:
    """Refusal score, refusal rate, degenerate rate, KL and CE loss at every coefficient and ablation strength.

    Examples:
        >>> amounts = {"coefficients": (0.0, 1.0), "strengths": (1.0,), "n_random": 1, "max_new_tokens": None}
        >>> found = dose_response(model, chat, direction, harmful, harmless, [5, 7], **amounts)
        >>> found.kl["add/harmless"][0, 0].max().item()
        0.0

    Args:
        texts: what CE loss is measured on; none leaves it out.
        n_random: random directions of equal norm, seeds 0, 1, ...
        n_random_answered: of how many of them answers and CE loss are read too, which takes most of the time.
        max_new_tokens: length of the answers that rates are read from; None generates none.
        judge: says which answers complied; the published phrases by default.

    Raises:
        UserError: a side has no prompts.
    """
    check_in_stream(direction)
    prompts = {"harmful": as_prompts(harmful), "harmless": as_prompts(harmless)}
    if not all(prompts.values()):
        raise UserError("dose_response needs prompts on both sides")
    judged = SubstringJudge() if judge is None else judge
    reader = DoseReader(model, chat, prompts, refusal_tokens, texts, max_new_tokens, judged, batch_size)
    directions = [direction, *(direction.random_like(seed) for seed in range(n_random))]
    amounts: dict[Kind, Sequence[float]] = {"add": coefficients, "ablate": strengths}
    tables: dict[str, dict[str, Tensor]] = {measure: {} for measure in get_args(Measure)}
    losses: dict[str, Tensor] = {}
    for kind, values in amounts.items():
        rows = [
            [reader.read(_intervention(kind, one, value), is_whole=index <= n_random_answered) for value in values]
            for index, one in enumerate(directions)
        ]
        losses[kind] = torch.tensor([[loss for _, loss in row] for row in rows], dtype=torch.float64)
        for side in prompts:
            for index, measure in enumerate(tables):
                columns = [torch.stack([by_side[side][index] for by_side, _ in row]) for row in rows]
                tables[measure][f"{kind}/{side}"] = torch.stack(columns)
    settings = {
        "direction": direction.describe(),
        "refusal_tokens": list(refusal_tokens),
        "random_seeds": list(range(n_random)),
        "max_new_tokens": max_new_tokens,
        "judge": judged.name,
        "n_texts": len(texts),
    }
    return DoseResult(
        tuple(coefficients),
        tuple(strengths),
        tables["score"],
        tables["refused"],
        tables["degenerate"],
        tables["kl"],
        losses,
        direction.norm,
        reader.stream_norm(direction.layer),
        provenance=provenance_of(model, chat, prompts, settings),
    )


def from_run(run: RunInputs) -> DoseResult:
    """The chosen direction and random ones, on held-out prompts and the run's plain text."""
    text_set = read_json(run.path / "run.json")["options"]["text_set"]
    texts = load_prompts(text_set, limit=MAX_TEXTS)
    harmful, harmless = prompts_of(run, n=MAX_PROMPTS).values()
    return dose_response(
        run.model,
        run.chat,
        run.direction,
        harmful,
        harmless,
        run.refusal_prefixes,
        texts=texts_to_score(run.chat, texts.instructions),
        max_new_tokens=RUN_TOKENS,
        batch_size=run.batch_size,
    )


def _intervention(kind: Kind, direction: Direction, amount: float) -> Intervention | None:
    if amount == 0:
        return None
    return Add(direction, amount) if kind == "add" else Ablate(direction, amount)


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson correlation of mid-ranks; 0 where one side is constant."""
    ranks = torch.tensor([_ranks(x), _ranks(y)], dtype=torch.float64)
    centered = ranks - ranks.mean(1, keepdim=True)
    size = centered.norm(dim=1).prod()
    return 0.0 if size == 0 else ((centered[0] * centered[1]).sum() / size).item()


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


_ROWS: tuple[tuple[Measure, str], ...] = (
    ("score", "refusal score (nats)"),
    ("refused", "refused (fraction)"),
    ("degenerate", "degenerate (fraction)"),
    ("kl", "KL (nats)"),
)

_SIDES: tuple[Side, ...] = ("harmful", "harmless")
_CE = "plain text"


def plot_dose(result: DoseResult, **look: Unpack[draw.Look]) -> go.Figure:
    """Refusal score, refusal rate, degenerate rate, KL and CE loss: the direction's curves over random ones.

    Examples:
        >>> plot_dose(found, height=900).layout.height
        900
    """
    rows = [row for row in _ROWS if any(point for point in result.band(row[0], "add/harmful"))]
    has_loss = not bool(result.ce_loss["add"].isnan().all())
    titles = ["<b>addition</b>", "<b>ablation</b>"] + [""] * (2 * (len(rows) + has_loss) - 2)
    figure = make_subplots(
        len(rows) + has_loss,
        2,
        subplot_titles=titles,
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.03,
    )
    for index, (measure, label) in enumerate(rows, start=1):
        for column, kind in enumerate(("add", "ablate"), start=1):
            place = {"row": index, "col": column}
            for side in _SIDES:
                _draw(figure, result, measure, f"{kind}/{side}", side, place)
            draw.zero_line(figure, **place)
        figure.update_yaxes(title=label, row=index, col=1)
        figure.update_yaxes(range=_range(result, measure), row=index)
    if has_loss:
        _draw_loss(figure, result, len(rows) + 1)
    last = len(rows) + has_loss
    figure.update_xaxes(**_dose_axis(result), row=last, col=1)
    figure.update_xaxes(title="strength (fraction removed)", row=last, col=2)
    figure.update_annotations(font_size=13)
    about = draw.subtitle(
        result.model_name,
        f"‖r‖ = {result.norm:.3g}",
        f"mean ‖h‖ = {result.stream_norm:.3g}" if result.stream_norm else "",
        "95% intervals",
        f"{result.n_random} random directions of equal norm (mean and range)",
        _z_note(result),
    )
    title = "Dose and response"
    return draw.finish(figure, title=title, about=about, height=175 * last, look=look)


def _dose_axis(result: DoseResult) -> dict[str, Any]:
    """Coefficients, and below each its share of the stream's norm."""
    title = "coefficient (raw direction lengths)"
    if result.stream_norm is None:
        return {"title": title}
    amounts = [each for each in zip(result.coefficients, result.shares("add"), strict=True)]
    whole = [each for each in amounts if float(each[0]).is_integer()] or amounts
    labels = [f"{amount:g}<br>{share:.2f}".replace("-", "−") for amount, share in whole]
    return {
        "title": f"{title}; below: ‖c·r‖ / mean ‖h‖ of plain text",
        "tickvals": [amount for amount, _ in whole],
        "ticktext": labels,
    }


def _draw(
    figure: go.Figure, result: DoseResult, measure: Measure, curve: str, side: Side, place: dict[str, int]
) -> None:
    x = list(result.amounts(curve))
    control = [point for point in result.control_band(measure, curve) if point is not None]
    if control:
        hover = f"random directions, {side} prompts, %{{x}}<br>mean %{{y:.3f}}<extra></extra>"
        _draw_control(figure, x, control, f"random directions, {side}", _SIDES.index(side), hover, place)
    index, name = _SIDES.index(side), _name(result, side)
    points = [point for point in result.band(measure, curve) if point is not None]
    if len(points) < len(x):
        return
    style = draw.group_style(index)
    figure.add_trace(draw.band(x, [low for _, low, _ in points], [high for _, _, high in points], name, style), **place)
    hover = f"<b>{side} prompts</b>, %{{x}}<br>%{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
    z = result.z(curve) if measure == "score" and result.n_random >= 3 else None
    hover += "<br>z against random directions %{customdata[2]}" if z is not None else ""
    zs = ["" if value is None else draw.number(value, 1) for value in z] if z is not None else [""] * len(points)
    custom = [[low, high, each] for (_, low, high), each in zip(points, zs, strict=True)]
    draw.add_line(figure, x, [mean for mean, _, _ in points], name, style, hover, custom, **place)


def _draw_loss(figure: go.Figure, result: DoseResult, row: int) -> None:
    style = draw.other_style(0)
    for column, kind in enumerate(("add", "ablate"), start=1):
        x, losses = list(result.amounts(kind)), result.ce_loss[kind]
        control = losses[1:][~losses[1:].isnan().any(-1)]
        hover = "%{x}<br>CE loss %{y:.3f} nats per token<extra></extra>"
        if len(control):
            columns = (control.mean(0), control.amin(0), control.amax(0))
            points = list(zip(*(values.tolist() for values in columns), strict=True))
            _draw_control(figure, x, points, f"random directions, {_CE}", 2, hover, {"row": row, "col": column})
        trace = draw.line(x, losses[0].tolist(), _CE, style, hovertemplate=hover)
        figure.add_trace(trace, row=row, col=column)
    values = torch.cat([losses.flatten() for losses in result.ce_loss.values()])
    values = values[~values.isnan()]
    figure.update_yaxes(range=_padded(float(values.min()), float(values.max())), row=row)
    figure.update_yaxes(title="CE loss (nats/token)", row=row, col=1)


def _range(result: DoseResult, measure: Measure) -> list[float]:
    """What holds every curve, its interval and 0; set by hand, because matched axes do not find it together."""
    if measure in ("refused", "degenerate"):
        return [-0.04, 1.04]
    curves = [
        band for curve in result.scores for band in (result.band(measure, curve), result.control_band(measure, curve))
    ]
    values = [value for points in curves for point in points if point is not None for value in point]
    return _padded(min(0.0, *values), max(0.0, *values))


def _padded(low: float, high: float) -> list[float]:
    room = 0.06 * max(high - low, 1e-9)
    return [low - room, high + room]


def _draw_control(
    figure: go.Figure,
    x: list[float],
    points: list[tuple[float, float, float]],
    name: str,
    index: int,
    hover: str,
    place: dict[str, int],
) -> None:
    """Mean and range over random directions."""
    style = draw.control_style(index)
    low, high = [low for _, low, _ in points], [high for _, _, high in points]
    figure.add_trace(draw.band(x, low, high, name, style), **place)
    trace = draw.line(x, [mean for mean, _, _ in points], name, style, hovertemplate=hover)
    figure.add_trace(trace.update(line_width=1.2, marker_size=5), **place)


def _z_note(result: DoseResult) -> str:
    """How far the largest doses within 1 lie beyond the random directions."""
    notes = []
    for curve, what in (("add/harmless", "added, harmless"), ("ablate/harmful", "ablated, harmful")):
        within = [(amount, z) for amount, z in zip(result.amounts(curve), result.z(curve), strict=True) if amount <= 1]
        amount, z = max(within, default=(0.0, None))
        if z is not None:
            notes.append(f"z = {draw.number(z, 0)} ({amount:g} {what})")
    return ", ".join(notes)


def _name(result: DoseResult, side: Side) -> str:
    return f"{side} prompts (n = {result.n_prompts(side)})"


FIGURES = {"dose": plot_dose}

call_with_a_run(__name__)
