"""Steering under a condition: interventions that act on the prompts whose stream passes a threshold, on no others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .directions import Direction, check_in_stream
from .errors import UserError
from .interventions import Constant, Interventions, PromptWidth, all_hooks, as_interventions, check_width
from .model.points import Hook, HookedModel, HookFn, check_raw_basis, resid_hook, split_hook
from .model.wrappers import module_of
from .reading import template_residuals
from .stats import AUC, Rate
from .text.chat import ChatFormat
from .text.given import Prompts, as_prompts
from .values import Value, check_named

Side = Literal[">", "<"]


@dataclass(frozen=True, eq=False, repr=False)
class Condition(Value):
    """Whether the stream at the last token of a prompt lies beyond a threshold along a direction.

    ⟨x, ĉ⟩ > threshold, with x the stream entering `layer` at position −1, the last template token, and ĉ the unit
    vector. That token has seen the whole prompt, and every prompt has one, so padding and the other prompts of a batch
    have no part in it; a mean over the prompt would have to know the padding. The cosine of CAST (Lee et al. 2024) is
    not used: the unit is that of every projection here.

    Examples:
        >>> Condition(direction, 0.5).holds(torch.tensor([0.2, 0.8]))
        tensor([False,  True])
        >>> Condition(direction, 0.5, "<").holds(torch.tensor([0.2, 0.8]))
        tensor([ True, False])
    """

    direction: Direction
    threshold: float
    """In units of the stream; −∞ and ∞ are allowed."""
    side: Side = ">"
    """Of the threshold, on which it holds; on the threshold itself it does not."""
    layer: int | None = None
    """Whose stream; None is the layer that the direction was read at."""

    def __post_init__(self) -> None:
        check_in_stream(self.direction)
        check_named("side", self.side, get_args(Side))
        if math.isnan(self.threshold):
            raise UserError("the threshold of a condition must be a number, not nan")

    @property
    def source(self) -> int:
        """The layer that it is read at."""
        return self.direction.layer if self.layer is None else self.layer

    def holds(self, projections: Float[Tensor, " prompt"]) -> Bool[Tensor, " prompt"]:
        """Of projections on the unit vector."""
        return projections > self.threshold if self.side == ">" else projections < self.threshold


@dataclass(frozen=True, eq=False, repr=False)
class Conditional(Value):
    """Interventions that act on those rows of a batch whose prompt meets a condition, and leave the others bit for bit.

    The condition is read once, where the prompt ends, in the pass over the prompt itself; it holds for the prompt's own
    tokens and for all generated ones, with and without a KV cache. In a conversation it is read anew at every turn. So
    `then` may act from the layer of the condition on, where it is known, and nowhere below: one pass is enough, and a
    pass that a condition did not change is the plain one. An ablation of all writes acts below; from layer l on, of n
    blocks, `[Ablate(d, hook=f"blocks.{l}.hook_resid_pre"), Ablate(d, layers=range(l, n))]` leaves as little.

    What acts at a lower layer, wherever it stands in a list of interventions, acts before the condition is read, and so
    does what stands before it at the same layer. At thresholds −∞ and ∞ it is,
    bit for bit, `then` and the plain model.

    Examples:
        >>> answers = generate(
        ...     model, chat, ["Hi", "Bye"], interventions=Conditional(Add(direction), Condition(direction, 0.5)),
        ...     max_new_tokens=3,
        ... )
        >>> always = Conditional(Add(direction), Condition(direction, float("-inf")))
        >>> logits = next_token_logits(model, chat, "Hi", interventions=always)
        >>> logits.equal(next_token_logits(model, chat, "Hi", interventions=Add(direction)))
        True
    """

    then: Interventions
    when: Condition

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", as_interventions(self.then))
        if not isinstance(self.when, Condition):
            raise UserError(f"expected Condition(direction, threshold), not {type(self.when).__name__}")

    def hooks(self, model: HookedModel, prompt_width: PromptWidth = None) -> list[Hook]:
        """One hook that reads the condition, and those of `then` for the rows that meet it.

        With `prompt_width` None every call is a prompt; cached generation needs the width.

        Raises:
            UserError: the model has no such layer, or another width, or `then` acts before the condition is known.
        """
        check_raw_basis(model)
        check_width(len(self.when.direction.vector), model.cfg.d_model)
        point = resid_hook(self.when.source, model.cfg.n_layers)
        inside = all_hooks(model, self.then, prompt_width)
        early = next((name for name, _ in inside if not _is_after(name, point)), None)
        if early is not None:
            layer = self.when.source
            raise UserError(
                f"this condition is known at {point}, and what depends on it acts before, at {early}: let it act from "
                f"layer {layer} on, as [Ablate(d, hook='{point}'), Ablate(d, layers=range({layer}, "
                f"{model.cfg.n_layers}))], or read the condition at a lower layer"
            )
        verdicts = Verdicts(self.when, prompt_width)
        return [(point, verdicts), *((name, _within(function, verdicts)) for name, function in inside)]


def _is_after(name: str, point: str) -> bool:
    """Whether a hook point comes after that of a condition in a pass, or is the same."""
    if name == point or not name.startswith("blocks."):
        return name == point
    (block, _), (first, what) = split_hook(name), split_hook(point)
    return block >= first and what == "hook_resid_pre"


class Verdicts:
    """A hook that reads a condition of every row where the prompt ends, and keeps it for the rows' later tokens."""

    def __init__(self, condition: Condition, prompt_width: PromptWidth) -> None:
        self.condition, self.prompt_width = condition, prompt_width
        self.unit = Constant(condition.direction.unit)
        self.of_rows: Bool[Tensor, " batch"] | None = None

    def __call__(self, activation: Float[Tensor, "batch pos d_model"], hook: Any) -> Any:
        n_rows, n_columns = activation.shape[:2]
        width = torch.as_tensor(n_columns if self.prompt_width is None else self.prompt_width, device=activation.device)
        is_step = self.prompt_width is not None and self.of_rows is not None and n_columns == 1
        if is_step or n_columns < int(width.max()):  # of cached generation
            return
        last = activation[torch.arange(n_rows, device=activation.device), (width - 1).expand(n_rows)]
        wide = last.detach().to(torch.promote_types(last.dtype, torch.float32))
        self.of_rows = self.condition.holds(wide @ self.unit.beside(wide))

    def keep_rows_(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget all other rows of the batch, which have ended."""
        if self.of_rows is not None:
            self.of_rows = self.of_rows[rows.to(self.of_rows.device)]


class _Within:
    """A hook that acts on the rows whose condition holds."""

    def __init__(self, function: HookFn, verdicts: Verdicts) -> None:
        self.function, self.verdicts = function, verdicts
        self.__module__ = module_of(function)  # somebody else's hook stays somebody else's

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        of_rows = self.verdicts.of_rows
        if of_rows is None or len(of_rows) != len(activation):
            raise ValueError(
                "the rows of this batch are not those of a prompt whose condition was read: begin with the prompt, and "
                "tell keep_rows_ when rows end"
            )
        changed = self.function(activation, hook=hook)
        if changed is None:
            return activation
        of_rows = of_rows.to(activation.device).reshape(-1, *[1] * (activation.ndim - 1))
        return torch.where(of_rows, changed, activation)


def _within(function: HookFn, verdicts: Verdicts) -> HookFn:
    return function if isinstance(function, Verdicts) else _Within(function, verdicts)


@dataclass(frozen=True)
class Separation:
    """How well a condition tells prompts that should meet it from others."""

    auc: AUC
    """Of the projections on its side; whatever the threshold."""
    sensitivity: Rate
    """Of the prompts that should meet it, those that do."""
    specificity: Rate
    """Of the others, those that do not."""

    def __str__(self) -> str:
        return f"AUC {self.auc}, sensitivity {self.sensitivity}, specificity {self.specificity}"


@dataclass(frozen=True, eq=False, repr=False)
class Learned(Value):
    """A condition whose threshold was learned, and how well it does on the prompts that it was learned on.

    The threshold was chosen on them: its sensitivity and specificity flatter it; `separation` of others does not.
    """

    condition: Condition
    on_validation: Separation


def learn_threshold(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    meet: Prompts,
    others: Prompts,
    *,
    side: Side = ">",
    layer: int | None = None,
    batch_size: int = 32,
) -> Learned:
    """The threshold that tells the prompts that should meet a condition from the others best, on validation prompts.

    Best is Youden's J = sensitivity + specificity − 1 (Youden 1950), which does not depend on how many there are of
    each. Thresholds lie halfway between neighboring projections; of several as good, the one in the widest gap.

    Examples:
        >>> found = learn_threshold(model, chat, direction, ["Hi"], ["Bye"])
        >>> found.on_validation.sensitivity.n
        1

    Args:
        meet: prompts that should meet the condition: the harmful ones, for a refusal that is to be added to them.
        others: prompts that should not; none of the prompts that it is tested on should be here.
        layer: whose stream is read; None is the layer of the direction.

    Raises:
        UserError: a side has no prompts; no threshold does better than chance, as when the sides are swapped.
    """
    at = Condition(direction, math.inf, side, layer)
    positive, negative = _projections(model, chat, at, meet, others, batch_size)
    condition = Condition(direction, best_threshold(positive, negative, side), side, layer)
    return Learned(condition, _separation(condition, positive, negative))


def separation(
    model: HookedModel, chat: ChatFormat, condition: Condition, meet: Prompts, others: Prompts, *, batch_size: int = 32
) -> Separation:
    """How well a condition tells these prompts apart, in the plain model.

    Examples:
        >>> separation(model, chat, Condition(direction, float("-inf")), ["Hi"], ["Bye"]).specificity.value
        0.0

    Args:
        meet: prompts that should meet it.
        others: prompts that should not.

    Raises:
        UserError: a side has no prompts.
    """
    return _separation(condition, *_projections(model, chat, condition, meet, others, batch_size))


def best_threshold(positive: Sequence[float], negative: Sequence[float], side: Side = ">") -> float:
    """The threshold of the largest J, halfway between neighboring values and in the widest gap of those as good.

    Raises:
        UserError: no threshold has J > 0.
    """
    sign = 1 if side == ">" else -1
    ups, downs = ([sign * value for value in values] for values in (positive, negative))
    values = sorted({*ups, *downs})
    best = (0.0, 0.0, math.inf)
    for low, high in pairwise(values):
        middle = (low + high) / 2
        j = sum(value > middle for value in ups) / len(ups) - sum(value > middle for value in downs) / len(downs)
        best = max(best, (j, high - low, middle), key=lambda each: each[:2])
    if best[0] <= 0:
        raise UserError(
            f"no threshold separates these prompts on side {side!r}: those that should meet the condition do not lie "
            "on that side of the others; swap the prompts or the side, or take another direction or layer"
        )
    return sign * best[2]


def _projections(
    model: HookedModel, chat: ChatFormat, condition: Condition, meet: Prompts, others: Prompts, batch_size: int
) -> list[list[float]]:
    """⟨x, ĉ⟩ of the prompts of both sides, where the condition is read."""
    sides = [as_prompts(meet), as_prompts(others)]
    if not all(sides):
        raise UserError("a condition needs prompts that should meet it and prompts that should not")
    check_width(len(condition.direction.vector), model.cfg.d_model)
    read = {"layers": [condition.source], "n_last": 1, "batch_size": batch_size}
    streams = [template_residuals(model, chat, side, **read)[:, 0, 0] for side in sides]  # type: ignore[arg-type]
    return [(stream.double() @ condition.direction.unit).tolist() for stream in streams]


def _separation(condition: Condition, positive: Sequence[float], negative: Sequence[float]) -> Separation:
    sign = 1 if condition.side == ">" else -1
    meets, rest = (
        condition.holds(torch.tensor(values, dtype=torch.float64)).tolist() for values in (positive, negative)
    )
    auc = AUC.of([sign * value for value in positive], [sign * value for value in negative])
    return Separation(auc, Rate.of(meets), Rate.of([not each for each in rest]))
