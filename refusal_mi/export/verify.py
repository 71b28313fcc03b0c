"""How closely an export does what the hooks did, on which prompts, and whether that is close enough."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError, cause
from ..files import read_record
from ..interventions import all_hooks
from ..model.loading import ORGANISM, load_model
from ..model.points import all_stops
from ..model.running import all_logits, continued, running
from ..model.writers import auto_class
from ..progress import alone
from ..text.batches import TokenBatch, left_pad
from ..text.chat import ChatFormat
from ..text.given import Prompts, as_prompts
from ..text.prompts import load_prompts
from ..values import Value, check_named
from ..weights import EditFigures
from .adapter import load_adapter
from .checkpoint import DTYPES, Checkpoint, open_checkpoint
from .plan import Planned, Step
from .streaming import Answers, DtypeText, Runs, compared, no_ids, same_tokens, stream_answers

MAX_RELATIVE_DIFFERENCE = 1e-4
MAX_KL_RATIO = 2.0
MAX_EFFECT_SHARE = 0.1


Rule = Literal["float32", "half", "post-norm"]
"""What is limited: the logits' difference, the KL beside that of rounding, the difference beside the edit's effect."""


@dataclass(frozen=True)
class Verification:
    """The export beside the hooked model, on prompts."""

    mode: Literal["full", "streaming"]
    rule: Rule
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


def _kl(reference: Float[Tensor, "compared d_vocab"], other: Float[Tensor, "compared d_vocab"]) -> float:
    """Mean over positions of Σ p (log p − log q), in nats."""
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


VerifyMode = Literal["auto", "full", "streaming", "none"]
N_PROMPTS, N_LAST, N_NEW = 4, 16, 32
"""Prompts of each bundled set, last positions of each prompt (behind a post-norm all of them), and new tokens."""
_WIDE: DtypeText = "float32"


@dataclass(frozen=True)
class Comparison:
    """A comparison that can be made: whatever it needs of the original is there."""

    plan: Planned
    mode: Literal["full", "streaming"]
    batch: TokenBatch
    stops: Sequence[int]

    @property
    def n_last(self) -> int:
        """Compared positions at the end of each prompt; all of them behind a post-norm."""
        return self.batch.tokens.shape[1] if self.plan.is_behind_a_norm else N_LAST

    def measure(self, directory: Path, adapter: Path | None, *, figures: Mapping[str, EditFigures]) -> Verification:
        """Run both, compare them and apply the limits.

        Args:
            directory: the export; for an adapter, the base model.
            adapter: a PEFT adapter to load on top.
        """
        dtype = _stored_dtype(directory)
        runs = self._full(directory, adapter, dtype) if self.mode == "full" else self._streamed(directory, dtype)
        hooked = runs.hooked.logits
        difference = (runs.exported.logits - hooked).abs().max().item()
        effect = (runs.plain.logits - hooked).abs().max().item()
        largest = hooked.abs().max().item()
        kl = _kl(hooked, runs.stored.logits)
        hooked_kl = None if runs.hooked_as_stored is None else _kl(hooked, runs.hooked_as_stored.logits)
        rule: Rule = "post-norm" if self.plan.is_behind_a_norm else "float32" if hooked_kl is None else "half"
        failures = []
        if rule == "float32" and not difference <= MAX_RELATIVE_DIFFERENCE * largest:
            limit = f"{MAX_RELATIVE_DIFFERENCE} of the largest {largest:.1f}"
            failures.append(f"logits differ by {difference:.1e}, over {limit}")
        if rule == "post-norm" and not difference <= MAX_EFFECT_SHARE * effect:
            limit = f"{MAX_EFFECT_SHARE} of the edit's effect {effect:.1e}"
            failures.append(f"logits differ by {difference:.1e}, over {limit}")
        if rule == "half" and hooked_kl is not None and not kl <= MAX_KL_RATIO * hooked_kl:
            failures.append(f"KL {kl:.1e} nats is over {MAX_KL_RATIO} times the hooked model's own {hooked_kl:.1e}")
        return Verification(
            mode=self.mode,
            rule=rule,
            n_prompts=len(self.batch.tokens),
            n_positions=len(hooked),
            max_logit_difference=difference,
            largest_logit=largest,
            max_effect=effect,
            mean_kl_nats=kl,
            hooked_kl_nats=hooked_kl,
            same_greedy=same_tokens(runs.hooked.new_ids, runs.stored.new_ids, self.stops),
            n_new_tokens=N_NEW,
            max_leftover=max((each.leftover for each in figures.values() if each.leftover is not None), default=None),
            failures=tuple(failures),
        )

    def _full(self, directory: Path, adapter: Path | None, dtype: DtypeText) -> Runs:
        wide, wide_export = self._hooked(_WIDE, N_NEW), self._exported(directory, adapter, _WIDE)
        if dtype == _WIDE:
            return Runs(*wide, wide_export, wide_export, None)
        return Runs(*wide, wide_export, self._exported(directory, adapter, dtype), self._hooked(dtype, 0)[0])

    def _hooked(self, dtype: DtypeText, n_new: int) -> tuple[Answers, Answers]:
        """The original under hooks, and without them (logits only)."""
        batch, model = self.batch, load_model(self.plan.checkpoint.directory, device="cpu", dtype=dtype)
        with torch.no_grad():
            plain = compared(all_logits(model, batch), batch, self.n_last)
            with running(model, all_hooks(model, self.plan.steps, batch.tokens.shape[1])):
                hooked = compared(all_logits(model, batch), batch, self.n_last)
                new_ids = continued(model, batch, n_new, self.stops) if n_new else no_ids(batch)
        return Answers(hooked, new_ids), Answers(plain, no_ids(batch))

    def _exported(self, directory: Path, adapter: Path | None, dtype: DtypeText) -> Answers:
        """An export in plain `transformers` (with PEFT for an adapter), as any user would load it."""
        from transformers import GenerationConfig

        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
        with alone():
            kind = auto_class(self.plan.layout.config)
            model: Any = kind.from_pretrained(directory, **options, trust_remote_code=False).eval()
            if adapter is not None:
                model = load_adapter(model, adapter)
        batch, stops = self.batch, list(self.stops)
        with torch.no_grad():
            logits = model(batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids).logits
            # Not the checkpoint's own settings: a repetition penalty in them would not be the hooked model's.
            model.generation_config = GenerationConfig(
                max_new_tokens=N_NEW, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0
            )
            ids = model.generate(input_ids=batch.tokens, attention_mask=batch.mask)
        return Answers(compared(logits, batch, self.n_last), ids[:, batch.tokens.shape[1] :])

    def _streamed(self, directory: Path, dtype: DtypeText) -> Runs:
        def answers(checkpoint: Checkpoint, steps: Sequence[Step], kind: DtypeText, **options: Any) -> Answers:
            return stream_answers(checkpoint, steps, self.batch, kind, self.n_last, self.stops, **options)

        source, target, steps = self.plan.checkpoint, open_checkpoint(directory), self.plan.steps
        hooked = answers(source, steps, _WIDE, n_new=N_NEW)
        plain = answers(source, (), _WIDE)
        if dtype == _WIDE:
            exported = answers(target, (), _WIDE, n_new=N_NEW, guess=hooked.new_ids)
            return Runs(hooked, plain, exported, exported, None)
        stored = answers(target, (), dtype, n_new=N_NEW, guess=hooked.new_ids)
        return Runs(hooked, plain, answers(target, (), _WIDE), stored, answers(source, steps, dtype))


def prepare_comparison(plan: Planned, mode: str, prompts: Prompts | None, *, is_adapter: bool) -> Comparison | None:
    """What will be compared, decided before anything is written; None if nothing will be.

    Raises:
        UserError: the mode does not exist or does not fit, or the original has no tokenizer.
    """
    check_named("verification", mode, get_args(VerifyMode))
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


def _batch(plan: Planned, prompts: Prompts | None) -> TokenBatch:
    if prompts is None:
        is_organism = plan.source == str(ORGANISM)
        names = ("organism_harmful_val", "organism_harmless_val") if is_organism else ("harmful", "harmless")
        prompts = [text for name in names for text in load_prompts(name).sample(N_PROMPTS, 0).instructions]
    prompts, tokenizer = as_prompts(prompts), _tokenizer(plan.checkpoint.directory)
    if tokenizer.chat_template:
        return ChatFormat(tokenizer).batch(prompts)
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return left_pad([tokenizer(text)["input_ids"] for text in prompts], pad)


def _stop_ids(directory: Path) -> tuple[int, ...]:
    """Every token id that ends an answer: the generation config's and the tokenizer's."""
    path = directory / "generation_config.json"
    settings = read_record(path, _GenerationSettings) if path.is_file() else _GenerationSettings()
    return all_stops(settings.eos_token_id, _tokenizer(directory))


@dataclass(frozen=True, eq=False, repr=False)
class _GenerationSettings(Value):
    """What is needed of `generation_config.json`."""

    eos_token_id: int | list[int] | None = None


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # foreign code
        reason = cause(error)
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
