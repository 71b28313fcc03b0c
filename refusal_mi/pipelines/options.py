"""What a run of the published pipeline depends on, with the published defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from ..errors import UserError
from ..http_judge import judge_named
from ..selection import Thresholds
from ..staged import Search

Step = Literal["directions", "selection", "completions", "loss"]
STEPS: tuple[Step, ...] = get_args(Step)


@dataclass(frozen=True)
class RunOptions:
    """Options of `refusal_mi.pipelines.arditi.run`."""

    harmful: str = "harmful"
    """One prompt set to be split, or TRAIN,VAL,TEST."""
    harmless: str = "harmless"
    eval_set: str | None = None
    """Prompt set for the harmful completions, in place of the harmful test split."""
    column: str | None = None
    text_set: str = "plain_text"
    """Plain texts for CE loss."""
    instruction_set: str = "instructions"
    """Answered instructions for CE loss."""
    n_train: int = 128
    n_val: int = 32
    n_test: int = 100
    seed: int = 42
    filter_prompts: bool = True
    """Keep only harmful prompts that the plain model refuses and harmless ones that it answers."""
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str | None = None
    """None: found by generating."""
    refusal_tokens: tuple[int, ...] | None = None
    """None: discovered on the training split."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: Search = "exact"
    """exact: every candidate on every validation prompt; staged: only those that can win."""
    skip_pruned: bool = False
    """Do not run the candidates that the layer rule drops anyway."""
    max_new_tokens: int = 512
    n_ce: int = 4096
    """At most this many texts of each CE set (the published run: 2048 batches of 2)."""
    n_random: int = 1
    """Random directions of equal norm, as controls."""
    judge: str = "substring"
    """substring, llamaguard, or the address of an endpoint that judges harmful completions as well."""
    judge_model: str | None = None
    steps: tuple[Step, ...] = STEPS
    batch_size: int | None = None
    """None: 64 prompts, halved while the memory does not suffice."""
    quick: bool = False

    def __post_init__(self) -> None:
        if self.search not in get_args(Search):
            raise UserError(f"unknown search {self.search!r}; expected one of {', '.join(get_args(Search))}")
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown or not self.steps:
            raise UserError(f"unknown step {unknown[0] if unknown else ''!r}; the steps are {', '.join(STEPS)}")
        for name in ("n_train", "n_val", "n_test", "max_new_tokens", "n_ce"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        judge_named(self.judge, model=self.judge_model)
        if self.n_random < 0:
            raise UserError(f"n_random must not be negative, not {self.n_random}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RunOptions":
        """The options that a `run.json` recorded.

        Raises:
            UserError: it is of a version with other options.
        """
        unknown = set(record) - {each.name for each in fields(cls)}
        if unknown:
            raise UserError(f"run.json has an option {sorted(unknown)[0]!r} that this version does not know")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**values | {"thresholds": Thresholds(**record["thresholds"])})

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
