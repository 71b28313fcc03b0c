"""How closely an export does what the hooks did, and whether that is close enough."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ..weights import EditFigures
from .answers import Runs, same_tokens

MAX_RELATIVE_DIFFERENCE = 1e-4
MAX_KL_RATIO = 2.0
MAX_EFFECT_SHARE = 0.1


@dataclass(frozen=True)
class Verification:
    """The export beside the hooked model, on prompts."""

    mode: Literal["full", "streaming"]
    rule: Literal["float32", "half", "post-norm"]
    n_prompts: int
    n_positions: int
    max_logit_difference: float
    """Export against hooked model, in float32 (for a half-precision export: its weights run in float32)."""
    largest_logit: float
    max_effect: float
    """Largest logit difference that the intervention itself makes."""
    mean_kl_nats: float
    """KL of the export, in its own dtype, to the float32 hooked model."""
    hooked_kl_nats: float | None
    """The same of the hooked model in the export's dtype: what rounding alone costs."""
    same_greedy: float
    """Fraction of new greedy tokens that are equal."""
    n_new_tokens: int
    max_leftover: float | None
    """The worst edited tensor: see `EditFigures.leftover`."""
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return not self.failures

    def describe(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {**asdict(self), "failures": list(self.failures), "passed": self.passed}


def verify(
    runs: Runs,
    stops: Sequence[int],
    *,
    mode: Literal["full", "streaming"],
    is_post_norm: bool,
    n_prompts: int,
    n_new_tokens: int,
    figures: Mapping[str, EditFigures],
) -> Verification:
    """Compare the runs and apply the limits."""
    hooked = runs.hooked.logits
    difference = (runs.exported.logits - hooked).abs().max().item()
    effect = (runs.plain.logits - hooked).abs().max().item()
    largest = hooked.abs().max().item()
    kl = _kl(hooked, runs.stored.logits)
    hooked_kl = None if runs.hooked_as_stored is None else _kl(hooked, runs.hooked_as_stored.logits)
    rule: Literal["float32", "half", "post-norm"] = (
        "post-norm" if is_post_norm else "float32" if hooked_kl is None else "half"
    )
    failures = []
    if rule == "float32" and not difference <= MAX_RELATIVE_DIFFERENCE * largest:
        failures.append(
            f"logits differ by {difference:.1e}, over {MAX_RELATIVE_DIFFERENCE} of the largest {largest:.1f}"
        )
    if rule == "post-norm" and not difference <= MAX_EFFECT_SHARE * effect:
        failures.append(f"logits differ by {difference:.1e}, over {MAX_EFFECT_SHARE} of the edit's effect {effect:.1e}")
    if rule == "half" and hooked_kl is not None and not kl <= MAX_KL_RATIO * hooked_kl:
        failures.append(f"KL {kl:.1e} nats is over {MAX_KL_RATIO} times the hooked model's own {hooked_kl:.1e}")
    leftovers = [figure.leftover for figure in figures.values() if figure.leftover is not None]
    return Verification(
        mode=mode,
        rule=rule,
        n_prompts=n_prompts,
        n_positions=len(hooked),
        max_logit_difference=difference,
        largest_logit=largest,
        max_effect=effect,
        mean_kl_nats=kl,
        hooked_kl_nats=hooked_kl,
        same_greedy=same_tokens(runs.hooked.new_ids, runs.stored.new_ids, stops),
        n_new_tokens=n_new_tokens,
        max_leftover=max(leftovers, default=None),
        failures=tuple(failures),
    )


def _kl(reference: Float[Tensor, "compared d_vocab"], other: Float[Tensor, "compared d_vocab"]) -> float:
    """Mean over positions of Σ p (log p − log q), in nats."""
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
