"""How closely an export does what the hooks did, on which prompts, and whether that is close enough."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import read_record
from ..interventions import Intervention, all_hooks
from ..model.loading import ORGANISM, load_model
from ..model.points import all_stops
from ..model.running import all_logits, continued, running
from ..text.batches import TokenBatch, left_pad
from ..text.chat import ChatFormat
from ..text.prompts import load_prompts
from ..weights import EditFigures
from .checkpoint import DTYPES, Checkpoint, open_checkpoint
from .plan import Planned
from .streaming import Answers, DtypeText, Runs, compared, no_ids, same_tokens, stream_answers

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


VerifyMode = Literal["auto", "full", "streaming", "none"]
N_PROMPTS, N_LAST, N_NEW = 4, 16, 32
"""Prompts of each bundled set, positions of each prompt, and new tokens that are compared."""
_WIDE: DtypeText = "float32"


@dataclass(frozen=True)
class Comparison:
    """A comparison that can be made: whatever it needs of the original is there."""

    plan: Planned
    mode: Literal["full", "streaming"]
    batch: TokenBatch
    stops: Sequence[int]

    def measure(self, directory: Path, adapter: Path | None, *, figures: Mapping[str, EditFigures]) -> Verification:
        """Run both and compare them.

        Args:
            directory: the export; for an adapter, the base model.
            adapter: a PEFT adapter to load on top.
        """
        dtype = _stored_dtype(directory)
        runs = self._full(directory, adapter, dtype) if self.mode == "full" else self._streamed(directory, dtype)
        return verify(
            runs,
            self.stops,
            mode=self.mode,
            is_post_norm=self.plan.is_behind_a_norm,
            n_prompts=len(self.batch.tokens),
            n_new_tokens=N_NEW,
            figures=figures,
        )

    def _full(self, directory: Path, adapter: Path | None, dtype: DtypeText) -> Runs:
        def hooked(kind: DtypeText, n_new: int) -> tuple[Answers, Answers]:
            source = str(self.plan.checkpoint.directory)
            return run_hooked(source, self.plan.steps, self.batch, kind, N_LAST, n_new, self.stops)

        def exported(kind: DtypeText) -> Answers:
            return run_exported(directory, self.batch, kind, N_LAST, N_NEW, self.stops, adapter)

        wide, wide_export = hooked(_WIDE, N_NEW), exported(_WIDE)
        if dtype == _WIDE:
            return Runs(*wide, wide_export, wide_export, None)
        return Runs(*wide, wide_export, exported(dtype), hooked(dtype, 0)[0])

    def _streamed(self, directory: Path, dtype: DtypeText) -> Runs:
        def answers(checkpoint: Checkpoint, steps: Sequence[Any], kind: DtypeText, **options: Any) -> Answers:
            return stream_answers(checkpoint, steps, self.batch, kind, N_LAST, self.stops, **options)

        source, target, steps = self.plan.checkpoint, open_checkpoint(directory), self.plan.steps
        hooked = answers(source, steps, _WIDE, n_new=N_NEW)
        plain = answers(source, (), _WIDE)
        if dtype == _WIDE:
            exported = answers(target, (), _WIDE, n_new=N_NEW, guess=hooked.new_ids)
            return Runs(hooked, plain, exported, exported, None)
        stored = answers(target, (), dtype, n_new=N_NEW, guess=hooked.new_ids)
        return Runs(hooked, plain, answers(target, (), _WIDE), stored, answers(source, steps, dtype))


def prepare_comparison(
    plan: Planned, mode: str, prompts: Sequence[str] | None, *, is_adapter: bool
) -> Comparison | None:
    """What will be compared, decided before anything is written; None if nothing will be.

    Raises:
        UserError: the mode does not exist or does not fit, or the original has no tokenizer.
    """
    if mode not in get_args(VerifyMode):
        raise UserError(f"unknown verification {mode!r}; expected {', '.join(get_args(VerifyMode))}")
    if mode == "none":
        return None
    is_streamed = mode == "streaming" or (mode == "auto" and not _fits(plan))
    if is_streamed and is_adapter:
        raise UserError(
            "an adapter is compared with the whole model in memory, for which there is too little or --verify "
            "streaming was given: use --verify full, or none"
        )
    batch = _batch(plan, prompts)
    return Comparison(plan, "streaming" if is_streamed else "full", batch, _stop_ids(plan.checkpoint.directory))


def _batch(plan: Planned, prompts: Sequence[str] | None) -> TokenBatch:
    if prompts is None:
        is_organism = plan.source == str(ORGANISM)
        names = ("organism_harmful_val", "organism_harmless_val") if is_organism else ("harmful", "harmless")
        prompts = [text for name in names for text in load_prompts(name).sample(N_PROMPTS, 0).instructions]
    tokenizer = _tokenizer(plan.checkpoint.directory)
    if tokenizer.chat_template:
        return ChatFormat(tokenizer).batch(prompts)
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return left_pad([tokenizer(text)["input_ids"] for text in prompts], pad)


def _stop_ids(directory: Path) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's and the tokenizer's."""
    path = directory / "generation_config.json"
    settings = read_record(path, _GenerationSettings) if path.is_file() else _GenerationSettings()
    return all_stops(settings.eos_token_id, _tokenizer(directory))


@dataclass(frozen=True)
class _GenerationSettings:
    """What is needed of `generation_config.json`."""

    eos_token_id: int | list[int] | None = None


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    else:
        if tokenizer("a")["input_ids"]:  # without files, transformers makes an empty one of some classes
            return tokenizer
        reason = f"{directory} has none"
    raise UserError(f"the comparison needs the model's tokenizer ({reason}); add it, or use --verify none")


def _stored_dtype(directory: Path) -> DtypeText:
    """The floating-point dtype of most of a checkpoint's elements."""
    counts: Counter[str] = Counter()
    for tensor in open_checkpoint(directory).tensors.values():
        if tensor.is_float:
            counts[tensor.dtype] += tensor.n_bytes // DTYPES[tensor.dtype].itemsize
    # transformers computes parts in float32 anyway, and makes NaN of left padding in a float64 model.
    names: dict[str, DtypeText] = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return names[counts.most_common(1)[0][0]]


def _fits(plan: Planned) -> bool:
    """Whether original and export, in float32, fit in half of the free memory."""
    import psutil

    elements = sum(tensor.n_bytes // DTYPES[tensor.dtype].itemsize for tensor in plan.checkpoint.tensors.values())
    return 2 * 4 * elements <= psutil.virtual_memory().available / 2


def run_hooked(
    source: str,
    interventions: Sequence[Intervention],
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    n_new: int,
    stops: Sequence[int],
) -> tuple[Answers, Answers]:
    """The original under hooks, and without them (logits only)."""
    model = load_model(source, device="cpu", dtype=dtype)
    width = batch.tokens.shape[1]
    new_ids = no_ids(batch)
    with torch.no_grad():
        plain = compared(all_logits(model, batch), batch, n_last)
        with running(model, all_hooks(model, interventions, width)):
            hooked = compared(all_logits(model, batch), batch, n_last)
            if n_new:
                new_ids = continued(model, batch, n_new, stops)
    return Answers(hooked, new_ids), Answers(plain, no_ids(batch))


def run_exported(
    directory: Path,
    batch: TokenBatch,
    dtype: DtypeText,
    n_last: int,
    n_new: int,
    stops: Sequence[int],
    adapter: Path | None = None,
) -> Answers:
    """An export in plain `transformers` (with PEFT for an adapter)."""
    from transformers import GenerationConfig

    model = load_exported(directory, dtype, adapter)
    width = batch.tokens.shape[1]
    with torch.no_grad():
        logits = model(batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids).logits
        # Not the checkpoint's own settings: a repetition penalty in them would not be the hooked model's.
        model.generation_config = GenerationConfig(
            max_new_tokens=n_new, eos_token_id=list(stops) or None, pad_token_id=stops[0] if stops else 0
        )
        ids = model.generate(input_ids=batch.tokens, attention_mask=batch.mask)
    return Answers(compared(logits, batch, n_last), ids[:, width:])


def load_exported(directory: Path, dtype: DtypeText, adapter: Path | None = None) -> Any:
    """A checkpoint, with an adapter on top if there is one, as any user would load it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="eager")
    if adapter is not None:
        from .adapter import load_adapter

        model = load_adapter(model, adapter)
    return model.eval()
