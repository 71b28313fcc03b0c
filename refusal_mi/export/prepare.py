"""Everything that is known before anything is written: the files, what each tensor does, what becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..interventions import Intervention
from ..models import resolve_source
from ..weights import TensorEdit
from .checkpoint import OTHER_WEIGHTS, Checkpoint, open_checkpoint
from .classify import Layout, classify
from .plan import Step, as_steps, plan_edits, without_embedding
from .rewrite import Head

NORM_NOTE = (
    "a norm follows every writer of this architecture: nothing is written along the direction, but the scale of the "
    "rest differs slightly from the hooked model's; no weights can be exact here"
)


@dataclass(frozen=True)
class Planned:
    """An export that can be made."""

    checkpoint: Checkpoint
    layout: Layout
    steps: tuple[Step, ...]
    edits: Mapping[str, TensorEdit]
    source: str
    revision: str | None
    keeps_tie: bool
    """The token embedding is tied and is left alone, in the hooks too."""

    @property
    def is_untied(self) -> bool:
        """Whether the unembedding must be kept apart from an edited token embedding."""
        return self.layout.is_tied and self.layout.token_embedding in self.edits

    @property
    def untied_head(self) -> Head | None:
        """The head that must be saved by itself; None where the checkpoint already has one."""
        present = self.layout.head in self.checkpoint.tensors
        return Head(self.layout.head, self.layout.token_embedding) if self.is_untied and not present else None

    @property
    def head_bytes(self) -> int:
        """What that head adds."""
        head = self.untied_head
        return 0 if head is None else self.checkpoint.tensors[head.source].n_bytes

    @property
    def is_behind_a_norm(self) -> bool:
        """Whether a norm follows a writer that is edited, so that no weights can do exactly what the hooks did."""
        return any(writer.post_norm is not None and writer.name in self.edits for writer in self.layout.writers)

    @property
    def notes(self) -> list[str]:
        """What a user of the checkpoint should know."""
        found = []
        if self.is_untied:
            size = f" ({self.head_bytes / 2**20:.1f} MiB more)" if self.untied_head is not None else ""
            found.append(f"the unembedding, tied to the token embedding before, is saved by itself{size}")
            ignored = self.layout.family.tied_only
            found.append(
                f"transformers honors the untied unembedding, but {ignored}: for these export with --keep-tied"
                if ignored
                else "transformers honors the untied unembedding; whether another program does was not tried"
            )
        if self.keeps_tie:
            found.append("the token embedding is tied and was left alone; the comparison leaves it alone too")
        if self.is_behind_a_norm:
            found.append(NORM_NOTE)
        return found


def plan_export(
    source: str | Path | None,
    interventions: Intervention | Sequence[Intervention],
    *,
    keep_tied: bool = False,
    with_new_biases: bool = False,
    revision: str | None = None,
) -> Planned:
    """Read headers and config, classify every tensor, and say what would be done to each.

    Raises:
        UserError: the checkpoint or the interventions cannot be exported.
    """
    from transformers import AutoConfig

    steps = as_steps(interventions)
    directory, commit = local_files(source, revision)
    checkpoint = open_checkpoint(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config in {directory}: {str(error).splitlines()[0]}") from None
    layout = classify(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    keeps_tie = keep_tied and layout.is_tied
    if keeps_tie:
        steps = without_embedding(steps)
    edits = plan_edits(layout, steps, checkpoint.read, with_new_biases=with_new_biases)
    return Planned(checkpoint, layout, steps, edits, resolve_source(source), commit, keeps_tie)


def local_files(source: str | Path | None, revision: str | None) -> tuple[Path, str | None]:
    """The directory of a model, downloaded if need be, and its hub commit.

    Raises:
        UserError: the hub has no such model or revision, or cannot be reached.
    """
    name = resolve_source(source)
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        patterns = [*unwanted, "original/*", "consolidated*"]
        path = Path(snapshot_download(name, revision=revision, ignore_patterns=patterns))
    except Exception as error:  # the client's transport raises classes of its own, which differ between versions
        where = name if revision is None else f"{name} at revision {revision}"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot get the files of {where} from the hub: {reason}") from None
    return path, path.name
