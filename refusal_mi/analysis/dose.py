"""Dose and response: what growing amounts of a direction, and of random directions, do to a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..chat import ChatFormat
from ..directions import Direction
from ..errors import UserError
from ..files import read_json
from ..interventions import Ablate, Add, Intervention
from ..judges import Judge, SubstringJudge
from ..loss import ScoredText, texts_to_score
from ..models import HookedModel
from ..prompts import load_prompts
from ..stats import Rate, mean_interval
from .dose_reader import DoseReader
from .inputs import RunInputs
from .result import AnalysisResult, finite_or_none, provenance_of

Kind = Literal["add", "ablate"]
Side = Literal["harmful", "harmless"]
Measure = Literal["score", "refused", "degenerate", "kl"]
COEFFICIENTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MAX_PROMPTS, MAX_TEXTS, RUN_TOKENS = 32, 32, 32


@dataclass(frozen=True)
class DoseResult(AnalysisResult):
    """Responses to every amount of the direction (first) and of random directions of equal norm (the others).

    Tables are `[direction amount prompt]`, float64, by curve: "add/harmful", "add/harmless", "ablate/harmful",
    "ablate/harmless". NaN where nothing was generated or scored.

    A long random vector is no control that does nothing: it drowns out part of the stream and takes both sides'
    scores toward the middle, whichever its sign. What it does not do is steer (`steering`), or reach what the
    direction reaches (`z`).
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

    def band(self, measure: Measure, curve: str, direction: int = 0) -> list[tuple[float, float, float] | None]:
        """(mean, low, high) at every amount: 95% Wilson intervals of rates, normal intervals of means; None if unread.

        Args:
            direction: 0 is the direction, 1.. are the random ones.
        """
        found: list[tuple[float, float, float] | None] = []
        for values in self._table(measure, curve)[direction].tolist():
            if finite_or_none(sum(values)) is None:
                found.append(None)
            elif measure in ("refused", "degenerate"):
                rate = Rate.of([value > 0 for value in values])
                found.append((rate.value, *rate.interval))
            else:
                found.append(mean_interval(values))
        return found

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
        found = (means[0] - means[1:].mean(0)) / means[1:].std(0)
        return [
            finite_or_none(value) if amount else None
            for amount, value in zip(self.amounts(curve), found.tolist(), strict=True)
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

    def swing(self, curve: str, direction: int = 0) -> float:
        """Largest minus smallest mean refusal score (nats) over the amounts."""
        means = self.scores[curve][direction].mean(-1)
        return (means.max() - means.min()).item()

    def _table(self, measure: Measure, curve: str) -> Float[Tensor, "direction amount prompt"]:
        tables = {"score": self.scores, "refused": self.refused, "degenerate": self.degenerate, "kl": self.kl}
        return tables[measure][curve]


def dose_response(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_tokens: Sequence[int],
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

    Args:
        texts: what CE loss is measured on; none leaves it out.
        n_random: random directions of equal norm, seeds 0, 1, ...
        n_random_answered: of how many of them answers and CE loss are read too, which takes most of the time.
        max_new_tokens: length of the answers that rates are read from; None generates none.
        judge: says which answers complied; the published phrases by default.

    Raises:
        UserError: a side has no prompts.
    """
    if not harmful or not harmless:
        raise UserError("dose_response needs prompts on both sides")
    prompts: dict[str, list[str]] = {"harmful": list(harmful), "harmless": list(harmless)}
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
                columns = [torch.stack([found[side][index] for found, _ in row]) for row in rows]
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
        provenance=provenance_of(model, chat, prompts, settings),
    )


def from_run(run: RunInputs) -> DoseResult:
    """The chosen direction and random ones, on held-out prompts and the run's plain text."""
    text_set = read_json(run.path / "run.json")["options"]["text_set"]
    texts = load_prompts(text_set, limit=MAX_TEXTS)
    return dose_response(
        run.model,
        run.chat,
        run.direction,
        run.prompts("harmful", "test")[:MAX_PROMPTS],
        run.prompts("harmless", "test")[:MAX_PROMPTS],
        run.refusal_tokens,
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
