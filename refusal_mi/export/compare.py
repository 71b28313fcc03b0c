"""The export beside the hooked original: on which tokens, and with how much of each in memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..chat import ChatFormat
from ..errors import UserError
from ..files import read_json
from ..models import ORGANISM
from ..prompts import load_prompts
from ..tokens import TokenBatch, left_pad
from ..weights import EditFigures
from .answers import Answers, DtypeText, Runs
from .checkpoint import DTYPES, Checkpoint, open_checkpoint
from .prepare import Planned
from .run_models import run_exported, run_hooked
from .stream_answers import stream_answers
from .verify import Verification, verify

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
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = set(found if isinstance(found, list) else [] if found is None else [found])
    own = _tokenizer(directory).eos_token_id
    return tuple(sorted(ids | ({own} if own is not None else set())))


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
