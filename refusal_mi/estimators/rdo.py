"""Refusal directions by gradient descent through the model: RDO (Wollschläger et al. 2025, "The Geometry of Refusal").

A direction is fitted to what it is to do, on texts that the model wrote itself (`recipes.rdo.own_texts`): where it
is ablated, harmful prompts are answered; where it is added, harmless ones are refused; where it is ablated, harmless
answers stay what they are. Each of the three losses is a differentiable function of a vector of any length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from ..directions import Direction
from ..errors import UserError
from ..files import at_home, sha256_json
from ..model.points import Hook, HookedModel, check_raw_basis, model_device, model_source, resid_hook, write_hooks
from ..model.running import check_fits, running, tail_logits
from ..precision import as_double
from ..text.batches import Span, TokenBatch, batches_by_length, left_pad
from ..text.chat import ChatFormat
from ..values import Value, check_named
from .descent import Descent, DescentOptions, descend, orthonormal

RetentionForm = Literal["paper", "code"]
"""The paper's mean over tokens of KL(plain ‖ ablated); its code's sum over tokens of KL(ablated ‖ plain)."""
Loss = Callable[[Tensor], Tensor]
"""A vector `[d_model]`, of any length -> a mean over texts, in nats, with its gradient."""
Spread = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Orthonormal rows and the step's number -> unit directions in their span, and what each counts."""


@dataclass(frozen=True, eq=False, repr=False)
class RDOTexts(Value):
    """What the losses read: prompts with answers, whose tokens `first` to `end - 1` are the answer's.

    Examples:
        >>> span = texts.complied[0]
        >>> len(span.token_ids[span.first : span.end])
        2
    """

    complied: tuple[Span, ...]
    """Harmful prompts with answers that comply."""
    refused: tuple[Span, ...]
    """Harmless prompts with refusals."""
    retained: tuple[Span, ...]
    """Harmless prompts with the plain model's answers."""

    def __post_init__(self) -> None:
        if any(span.first < 1 for group in (self.complied, self.refused, self.retained) for span in group):
            raise UserError("a text needs a prompt of at least one token before its answer")


@dataclass(frozen=True)
class RDOOptions(DescentOptions):
    """Weights of the losses, and how many texts are read at a step; the published values where there are some.

    Examples:
        >>> RDOOptions(n_steps=5, retention=0.5).addition
        0.2
    """

    ablation: float = 1.0
    addition: float = 0.2
    retention: float = 1.0
    retention_form: RetentionForm = "paper"
    texts_per_step: int = 16
    """Of each kind, in a new order every time that all have been read; all of them at every step if there are fewer."""
    batch_size: int = 16
    """Texts in a pass; the result does not depend on it, but for rounding."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_named("retention_form", self.retention_form, get_args(RetentionForm))
        if min(self.texts_per_step, self.batch_size) < 1:
            raise UserError("texts_per_step and batch_size must be at least 1")
        if min(self.ablation, self.addition, self.retention) < 0 or not self.ablation + self.addition:
            raise UserError("the weights of the losses must not be negative, and ablation or addition needs one")


@dataclass(frozen=True, eq=False, repr=False)
class Term(Value):
    """A loss, its weight, and the texts that it is a mean over."""

    name: str
    weight: float
    texts: tuple[Span, ...]
    prepare: Callable[[Sequence[Span]], Loss]
    """The loss of some of the texts; what does not depend on the vector is computed once."""


@dataclass(frozen=True, eq=False, repr=False)
class Fit(Value):
    """Directions that were found by descent, and how it went.

    Examples:
        >>> found = fit_rdo(model, chat, direction, texts, RDOOptions(n_steps=2))
        >>> found.terms, found.losses.shape[1] == len(found.terms)
        (('loss', 'ablation', 'addition', 'retention'), True)
    """

    directions: tuple[Direction, ...]
    """Orthogonal; of the place and length of the one that the descent started from."""
    terms: tuple[str, ...]
    """What the columns of `losses` are; the first is the whole, the others unweighted."""
    losses: Float[Tensor, "step term"]
    """Nats, before each step, of the texts that were read at it; of a cone the sum of both means."""
    best_step: int
    stopped_early: bool

    @property
    def direction(self) -> Direction:
        """The first, or only one."""
        return self.directions[0]


def fit_rdo(
    model: HookedModel,
    chat: ChatFormat,
    start: Direction,
    texts: RDOTexts,
    options: RDOOptions | None = None,
    *,
    orthogonal_to: Sequence[Direction] = (),
    checkpoint: str | Path | None = None,
) -> Fit:
    """One direction of lowest loss: L = λ_abl·L_abl + λ_add·L_add + λ_ret·L_ret on the unit sphere.

    Examples:
        >>> found = fit_rdo(model, chat, direction, texts, RDOOptions(n_steps=2), orthogonal_to=[other])
        >>> abs(found.direction.unit @ other.unit).item() < 1e-6, found.direction.layer == direction.layer
        (True, True)

    Args:
        start: where the descent starts, such as the chosen difference of means, or its `random_like(seed)` as
            published; its layer and length are those of the additions, and of what is found.
        orthogonal_to: directions that it must stay orthogonal to (RDO⊥).
        checkpoint: a `.pt` file to go on from, written after every step.

    Raises:
        UserError: a loss has no texts, one is too long for the model, or the checkpoint is of another fit.
        ValueError: the model's weights are not in HF coordinates.
    """
    options = RDOOptions() if options is None else options
    terms = rdo_terms(model, chat, start, texts, options)
    return fit_terms(
        model, terms, start, start.unit[None], options, "RDO", orthogonal_to=orthogonal_to, checkpoint=checkpoint
    )


def rdo_terms(
    model: HookedModel, chat: ChatFormat, start: Direction, texts: RDOTexts, options: RDOOptions
) -> list[Term]:
    """The three losses that the options give a weight.

    Raises:
        UserError: one has no texts.
    """
    pad_id, layer, norm = chat.pad_id, start.layer, start.norm
    every = [
        Term("ablation", options.ablation, texts.complied, lambda some: ablation_loss(model, some, pad_id)),
        Term("addition", options.addition, texts.refused, lambda some: addition_loss(model, some, pad_id, layer, norm)),
        Term(
            "retention",
            options.retention,
            texts.retained,
            lambda some: retention_loss(model, some, pad_id, options.retention_form),
        ),
    ]
    return [term for term in every if term.weight]


def ablation_loss(model: HookedModel, texts: Sequence[Span], pad_id: int) -> Loss:
    """Cross-entropy per token of the answers, where the direction is ablated; the mean over texts of their means."""
    batch, n_answer = padded(model, texts, pad_id)
    return lambda vector: _cross_entropy(_logits(model, batch, n_answer, ablation_hooks(model, vector)), batch)


def addition_loss(model: HookedModel, texts: Sequence[Span], pad_id: int, layer: int, norm: float) -> Loss:
    """The same where `norm` times the unit direction is added to the stream entering block `layer`."""
    batch, n_answer = padded(model, texts, pad_id)
    return lambda vector: _cross_entropy(
        _logits(model, batch, n_answer, addition_hooks(model, vector, layer, norm)), batch
    )


def retention_loss(model: HookedModel, texts: Sequence[Span], pad_id: int, form: RetentionForm = "paper") -> Loss:
    """KL between the plain model and the one with the direction ablated, at the answer's tokens and the next one.

    Args:
        form: "paper": mean over tokens of KL(plain ‖ ablated); "code": sum over tokens of KL(ablated ‖ plain). Both
            the mean over texts.
    """
    check_named("retention_form", form, get_args(RetentionForm))
    batch, n_answer = padded(model, texts, pad_id)
    with torch.no_grad():
        plain = [rows.clone() for rows in _logits(model, batch, n_answer, [])]

    def divergence(before: Tensor, after: Tensor) -> Tensor:
        log_p, log_q = (as_double(rows).log_softmax(-1) for rows in (before, after))
        if form == "paper":
            return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return (log_q.exp() * (log_q - log_p)).sum()

    def loss(vector: Tensor) -> Tensor:
        changed = _logits(model, batch, n_answer, ablation_hooks(model, vector))
        # Computed again for the gradient: in float64 over a large vocabulary it would be most of the memory.
        each = (recomputed(divergence, *rows, use_reentrant=False) for rows in zip(plain, changed, strict=True))
        return torch.stack(list(each)).mean()

    return loss


def ablation_hooks(model: HookedModel, vector: Float[Tensor, " d_model"]) -> list[Hook]:
    """`Ablate` of the vector's direction, differentiable in it: x − v̂ v̂ᵀx at every write."""
    check_raw_basis(model)
    unit = vector / vector.norm()

    def project_out(x: Tensor, hook: Any) -> Tensor:
        wide = _wide(x)
        row = unit.to(wide.dtype).to(x.device)
        return (wide - (wide @ row)[..., None] * row).to(x.dtype)

    return [(name, project_out) for name in write_hooks(model.cfg.n_layers)]


def addition_hooks(model: HookedModel, vector: Float[Tensor, " d_model"], layer: int, norm: float) -> list[Hook]:
    """`Add` of `norm` times the vector's direction, differentiable in it."""
    check_raw_basis(model)
    added = vector / vector.norm() * norm

    def add(x: Tensor, hook: Any) -> Tensor:
        wide = _wide(x)
        return (wide + added.to(wide.dtype).to(x.device)).to(x.dtype)

    return [(resid_hook(layer, model.cfg.n_layers), add)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def padded(model: HookedModel, texts: Sequence[Span], pad_id: int) -> tuple[TokenBatch, list[int]]:
    """The texts on the model's device, and how many tokens of each its span has."""
    rows = [span.token_ids[: span.end] for span in texts]
    check_fits(model, rows)
    return left_pad(rows, pad_id).to(model_device(model)), [span.end - span.first for span in texts]


def _logits(model: HookedModel, batch: TokenBatch, n_answer: Sequence[int], hooks: Sequence[Hook]) -> list[Tensor]:
    """Of every text, the logits at the last token of the prompt and at every token of the answer, `[pos d_vocab]`."""
    with running(model, hooks):
        logits = tail_logits(model, batch, max(n_answer) + 1)
    return [row[-n - 1 :] for row, n in zip(logits, n_answer, strict=True)]


def _cross_entropy(logits: Sequence[Tensor], batch: TokenBatch) -> Float[Tensor, ""]:
    losses = [
        torch.nn.functional.cross_entropy(_wide(rows[:-1]), ids[len(ids) - len(rows) + 1 :])
        for rows, ids in zip(logits, batch.tokens, strict=True)
    ]
    return torch.stack(losses).mean().cpu().double()


def as_they_are(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """A `Spread` of the rows themselves, each counting the same."""
    return rows, rows.new_full((len(rows),), 1 / len(rows))


def fit_terms(
    model: HookedModel,
    terms: Sequence[Term],
    start: Direction,
    rows: Float[Tensor, "n d_model"],
    options: RDOOptions,
    method: str,
    *,
    spread: Spread = as_they_are,
    orthogonal_to: Sequence[Direction] = (),
    checkpoint: str | Path | None = None,
    key: Any = None,
) -> Fit:
    """Orthonormal rows of lowest weighted sum of terms, each the mean over the directions that `spread` gives.

    Args:
        key: JSON values of what the terms depend on beside their texts and weights, for checkpoints.

    Raises:
        UserError: a term has no texts, or the checkpoint is of another fit.
        ValueError: the model's weights are not in HF coordinates.
    """
    check_raw_basis(model)
    for term in terms:
        if not term.texts:
            raise UserError(f"the {term.name} loss has no texts: give some, or the weight 0")
    fixed = torch.stack([each.unit for each in orthogonal_to]) if orthogonal_to else None

    def evaluate(rows: Tensor, step: int) -> tuple[Sequence[float], Tensor]:
        with torch.enable_grad():  # a notebook may have turned it off
            return loss_and_gradient(terms, options, spread, rows, step)

    found = descend(
        evaluate,
        orthonormal(rows, fixed),
        options,
        orthogonal_to=fixed,
        checkpoint=None if checkpoint is None else at_home(checkpoint),
        key=_key(model, terms, start, rows, fixed, options, [method, key]),
        description=f"fitting {method}",
    )
    return _fit(found, terms, start, options, method)


def loss_and_gradient(
    terms: Sequence[Term], options: RDOOptions, spread: Spread, rows: Tensor, step: int
) -> tuple[list[float], Tensor]:
    """The loss, its terms, and the gradient in the rows; one graph of one pass is held at a time."""
    rows = rows.detach().clone().requires_grad_()
    directions, weights = spread(rows, step)
    each = [direction.detach().clone().requires_grad_() for direction in directions]
    gradients = torch.zeros_like(directions)
    values = dict.fromkeys((term.name for term in terms), 0.0)
    for term in terms:
        for some, share in _passes(term.texts, options, step):
            loss = term.prepare(some)
            for index, direction in enumerate(each):
                value = loss(direction)
                (gradient,) = torch.autograd.grad(value, direction)
                factor = share * weights[index].item()
                values[term.name] += factor * value.item()
                gradients[index] += term.weight * factor * gradient
    (gradient,) = torch.autograd.grad(directions, rows, gradients)
    whole = sum(term.weight * values[term.name] for term in terms)
    return [whole, *values.values()], gradient


def _passes(texts: Sequence[Span], options: RDOOptions, step: int) -> Iterator[tuple[list[Span], float]]:
    """The texts of a step in batches of similar length, and each batch's share of them."""
    drawn = [texts[index] for index in drawn_at(step, len(texts), options.texts_per_step, options.seed)]
    for batch in batches_by_length([span.token_ids[: span.end] for span in drawn], options.batch_size):
        yield [drawn[index] for index in batch], len(batch) / len(drawn)


def drawn_at(step: int, n: int, n_per_step: int, seed: int) -> list[int]:
    """Which of n texts are read at a step: one order after the other, each seeded; all where there are not more."""
    if n_per_step >= n:
        return list(range(n))
    generator, first = torch.Generator().manual_seed(seed), step * n_per_step
    orders = [torch.randperm(n, generator=generator).tolist() for _ in range((first + n_per_step - 1) // n + 1)]
    return [orders[place // n][place % n] for place in range(first, first + n_per_step)]


def _key(
    model: HookedModel,
    terms: Iterable[Term],
    start: Direction,
    rows: Tensor,
    fixed: Tensor | None,
    options: RDOOptions,
    about: Any,
) -> str:
    """What a fit is of, but for its number of steps."""
    settings = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "n_steps"}
    texts = {
        term.name: [term.weight, [[*span.token_ids, span.first, span.end] for span in term.texts]] for term in terms
    }
    vectors = [
        tensor.double().flatten().tolist() for tensor in (start.vector, rows, *([] if fixed is None else [fixed]))
    ]
    return sha256_json([about, model_source(model), start.layer, settings, texts, vectors])


def _fit(found: Descent, terms: Sequence[Term], start: Direction, options: RDOOptions, method: str) -> Fit:
    provenance = {
        "method": method,
        "weights": {term.name: term.weight for term in terms},
        "retention_form": options.retention_form,
        "n_texts": {term.name: len(term.texts) for term in terms},
        "seed": options.seed,
        "n_steps": len(found.losses),
        "loss": found.losses[found.best_step, 0].item(),
        "start": dict(start.provenance),
    }
    dtype = torch.promote_types(start.vector.dtype, torch.float32)
    directions = tuple(
        replace(
            start, vector=(row * start.norm).to(dtype), provenance=provenance | {"row": index, "of": len(found.rows)}
        )
        for index, row in enumerate(found.rows)
    )
    names = ("loss", *(term.name for term in terms))
    return Fit(directions, names, found.losses, found.best_step, found.stopped_early)
