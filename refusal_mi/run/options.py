"""What a run depends on, with the published defaults; and the command that repeats it."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from ..errors import UserError
from ..estimators.names import HELP
from ..options import (
    MEANINGS,
    RANK_LIST,
    AllowSpecialTokens,
    BatchSize,
    Column,
    JudgeLabels,
    JudgeModel,
    JudgeName,
    KLFormula,
    NRandom,
    NTexts,
    Option,
    Quantization,
    RefusalTokens,
    ResponsePrefix,
    Seed,
    System,
    TemplateKwargs,
    rank_numbers,
    words,
)
from ..search.thresholds import PUBLISHED, Rule, Search, most
from ..values import Value, check_named

if TYPE_CHECKING:
    from ..model.provenance import ModelRecord

Calibration = Literal["labels", "published"]
"""labels: what the model does with a prompt is read from its answer, and the refusal score's zero point lies where it
separates these labels best; published: a prompt is refused where its score is above 0 (Arditi et al. 2024)."""
Step = Literal["directions", "selection", "completions", "loss"]
STEPS: tuple[Step, ...] = get_args(Step)


def read_steps(text: str) -> tuple[str, ...]:
    """Steps separated by commas."""
    return tuple(step.strip() for step in text.split(","))


@dataclass(frozen=True, eq=False, repr=False)
class RunOptions(Value):
    """Options of `refusal_mi.recipes.arditi.run`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    harmful: Annotated[
        str, Option("A set to be split, or TRAIN,VAL,TEST: names or files.", takes=str | None, depends_on_model=True)
    ] = "harmful"
    harmless: Annotated[str, Option("The same for harmless prompts.", takes=str | None, depends_on_model=True)] = (
        "harmless"
    )
    eval_set: Annotated[str | None, Option("Harmful prompts to report on instead of TEST.")] = None
    harmless_eval_set: Annotated[
        str | None, Option("Harmless prompts to report on instead, such as xstest or or-bench: is too much refused?")
    ] = None
    """Their files keep the name harmless."""
    column: Column = None
    text_set: Annotated[str, Option("Plain texts for CE loss.", takes=str | None, depends_on_model=True)] = "plain_text"
    instruction_set: Annotated[
        str, Option("Answered instructions for CE loss.", takes=str | None, depends_on_model=True)
    ] = "instructions"
    n_train: Annotated[int, Option("Training prompts a side.")] = 128
    n_val: Annotated[int, Option("Validation prompts a side.")] = 32
    n_test: Annotated[int, Option("Held-out prompts a side.")] = 100
    seed: Seed = 42
    filter_prompts: Annotated[
        bool, Option("Keep harmful prompts that are refused, harmless answered.", flags="--filter/--no-filter")
    ] = True
    system: System = None
    template_kwargs: TemplateKwargs = field(default_factory=dict)
    allow_special_tokens: AllowSpecialTokens = False
    response_prefix: ResponsePrefix = None
    refusal_tokens: RefusalTokens = None
    estimator: Annotated[
        str | None,
        Option(
            f"Makes the candidates: {HELP}, or your own MODULE:FUNCTION of both sides' mean activations (or of "
            "every prompt's). Default: mean, their difference.",
            metavar="NAME",
        ),
    ] = None
    calibration: Annotated[
        Calibration,
        Option(
            "labels: short answers, judged by text, give filter, refusal tokens and zero point; published: the "
            "first token's score does, and KL is by the published formula.",
            takes=str,
        ),
    ] = "labels"
    label_tokens: Annotated[int, Option("Most tokens of those answers.")] = 16
    thresholds: Rule = PUBLISHED
    search: Annotated[
        Search,
        Option(
            "exact, or staged: screen the candidates on few prompts and measure only those that can win.", takes=str
        ),
    ] = "exact"
    n_best: Annotated[int, Option("Survivors that a staged search looks for; more can be ablated together.")] = 1
    skip_pruned: Annotated[
        bool, Option("Do not run candidates of the layers that --prune-layers leaves out.", flags="--skip-pruned")
    ] = False
    max_new_tokens: Annotated[
        int,
        Option(MEANINGS["max_new_tokens"], takes=int | None, depends_on_model=True),
    ] = 512
    n_ce: NTexts = 4096
    """The published run: 2048 batches of 2."""
    n_random: NRandom = 1
    """Directions of equal norm."""
    judge: JudgeName = "substring"
    """An endpoint judges harmful completions as well."""
    judge_model: JudgeModel = None
    judge_labels: JudgeLabels = None
    steps: Annotated[
        tuple[Step, ...],
        Option("Up to which of these to go, comma-separated.", takes=str, read=read_steps, write=",".join),
    ] = STEPS
    batch_size: BatchSize = None
    """None: 64 prompts, halved while the memory does not suffice."""
    quick: Annotated[bool, Option(MEANINGS["quick"], flags="--quick")] = False

    def __post_init__(self) -> None:
        check_named("calibration", self.calibration, get_args(Calibration))
        check_named("search", self.search, get_args(Search))
        for step in self.steps or ("",):
            check_named("step", step, STEPS)
        for name in ("n_train", "n_val", "n_test", "max_new_tokens", "n_ce", "label_tokens", "n_best"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        from ..judges.named import judge_named

        judge_named(self.judge, model=self.judge_model, labels=self.judge_labels)
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")

    @property
    def kl_formula(self) -> KLFormula:
        """The exact KL, or the published one with the published calibration."""
        return "published" if self.calibration == "published" else "exact"

    @property
    def kl_input(self) -> dict[str, str]:
        """What a stage that measures KL depends on more; nothing with the published formula, once the only one."""
        return {} if self.kl_formula == "published" else {"kl": self.kl_formula}

    def shortened(self) -> "RunOptions":
        """The same run on small samples, marked as quick in every file."""
        return replace(
            self,
            n_train=min(self.n_train, 32),
            n_val=min(self.n_val, 16),
            n_test=min(self.n_test, 16),
            n_ce=min(self.n_ce, 16),
            max_new_tokens=min(self.max_new_tokens, 32),
            quick=True,
        )


def read_ranks(text: str | None) -> tuple[int, ...] | None:
    """Ranks as `options.rank_numbers` reads them; None is the default ones."""
    return None if text is None else rank_numbers(text, "--ranks")


@dataclass(frozen=True)
class CombosOptions:
    """Which directions are combined, and how the combinations are judged."""

    ranks: Annotated[
        tuple[int, ...] | None,
        Option(
            f"Ranks of surviving candidates: {RANK_LIST}; default: the five best.",
            takes=str | None,
            read=read_ranks,
        ),
    ] = None
    max_size: Annotated[int, Option("Most directions in a combination.")] = 2
    kl_max: Annotated[
        float | None,
        Option(MEANINGS["kl_max"], takes=float, read=most, own_default=True),
    ] = 0.1
    """Mean KL on validation prompts; equality passes."""
    n_random: NRandom = 3
    """Spans of the winner's rank."""
    n_ce: NTexts = 256
    val_new_tokens: Annotated[int, Option("Length of the validation answers.")] = 32

    def __post_init__(self) -> None:
        for name in ("max_size", "n_ce", "val_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.kl_max is not None and not 0 <= self.kl_max < math.inf:
            raise UserError(f"kl_max must be a number from 0 on, not {self.kl_max}")
        if self.ranks is not None and len(set(self.ranks)) < len(self.ranks):
            raise UserError("a rank was given twice")


def command_line(model: "ModelRecord", options: RunOptions, ranks: Sequence[int] = (), multi: str = "span") -> str:
    """The `refusal-mi run` command of a run, one option a line; options at their default are left out.

    Args:
        ranks: of the directions that were ablated together, and how (`multi`).
    """
    from ..model.provenance import is_embedded

    said = [] if is_embedded(model.source) else [model.source]
    if model.revision:
        said += ["--revision", model.revision]
    said += words(options)
    if ranks:
        said += ["--directions", "-".join(map(str, ranks))]
        said += [] if multi == "span" else ["--multi", multi]
    said += ["--device-map", "auto"] if model.is_split else ["--device", model.device.partition(":")[0]]
    said += ["--dtype", model.dtype]
    if model.quantization is not None and model.quantization in get_args(Quantization):
        said += ["--quantization", model.quantization]
    said += ["--trust-remote-code"] if model.remote_code else []
    lines = ["refusal-mi run"]
    for word in said:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    held = "# the model was held in memory: this repeats the run where that is what the files hold\n"
    return (held if model.is_held else "") + " \\\n    ".join(lines)
