"""`refusal-mi capability`: what an ablation or an export costs in tasks of lm-evaluation-harness."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import number_or_auto
from ..terminal import say
from .options import AsJson, BatchSize, Fresh, ModelOptions, NRandom, OutputDir, at_least, flat

if TYPE_CHECKING:
    from ..model.points import HookedModel
    from ..model.provenance import ModelRecord
    from ..recipes.capability import Variant
    from ..text.chat import ChatFormat

FOLDER, TASKS = "capability", "everyday,sums"


@flat
def capability(
    model: ModelOptions,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    exported: Annotated[
        str | None, typer.Option(help="A checkpoint of MODEL that is measured too, such as an export of it.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lm-evaluation-harness, or bundled: everyday, sums, plain_text.")
    ] = TASKS,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own, in YAML, which can run Python.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of every task.", metavar="N")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the chat template; published numbers do not.")
    ] = False,
    n_random: NRandom = None,
    batch_size: BatchSize = None,
    output_dir: OutputDir = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> int:
    """Measure what an ablation costs in other tasks.

    MODEL may also be a run folder, or a checkpoint that refusal-mi export wrote. The plain model, the model with the
    run's direction ablated, the same with random ones, and an exported checkpoint answer the same items; all are
    compared with the plain model, item by item. Needs refusal_mi[eval].
    """
    from ..files import at_home
    from ..harness.tasks import check_tasks
    from ..recipes.capability import measure_capability
    from ..run.stages import RunFolder
    from .tables import print_capability, print_json

    names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    size = number_or_auto(batch_size)
    most = None if limit is None else at_least("--limit", limit, 1, 1)
    random = at_least("--n-random", n_random, 0, 1)
    included = None if include_path is None else at_home(include_path)
    asked = _Asked.of(model, run, exported)
    folder = RunFolder(output_dir or asked.folder / FOLDER, fresh, say)
    folder.check_writable()
    check_tasks(names, included)
    found = measure_capability(
        asked.variants(random),
        folder,
        tasks=names,
        limit=most,
        include_path=included,
        apply_chat_template=apply_chat_template,
        batch_size=size,
    )
    print_json(found) if as_json else print_capability(found, folder.path)
    return 0


@dataclass(frozen=True)
class _Asked:
    """The plain model, its run where there is one, and the exported checkpoint."""

    model: ModelOptions
    run: Path | None
    exported: str | None
    folder: Path
    """Where the results lie, in a folder of their own."""

    @classmethod
    def of(cls, model: ModelOptions, run: Path | None, exported: str | None) -> "_Asked":
        """What RUN, CHECKPOINT or MODEL mean.

        Raises:
            UserError: two of them contradict each other, or there is neither a run nor an export.
        """
        from ..export.checkpoint import RECORD
        from ..files import at_home
        from ..model.loading import resolve_source
        from ..recipes.options import default_folder
        from ..run.folder import check_model_of_run
        from ..run.record import RUN

        place = None if model.named is None else at_home(model.named)
        if place is not None and (place / RUN).is_file():
            if run is not None:
                raise UserError(f"the run was given twice: {place} and --run {run}")
            return cls(_model_of(model, place), place, _resolved(exported), place)
        if place is not None and (place / RECORD).is_file():
            if exported is not None:
                raise UserError(f"the checkpoint was given twice: {place} and --exported {exported}")
            base, checkpoint = replace(model, model=_base_of(place), model_path=None), resolve_source(str(place))
            if run is not None:
                check_model_of_run(run, base.source)
            return cls(base, run, checkpoint, run or default_folder(checkpoint))
        path = run or default_folder(model.source)
        if exported is None or run is not None or (path / RUN).is_file():
            check_model_of_run(path, model.source)
            return cls(model, path, _resolved(exported), path)
        return cls(model, None, _resolved(exported), path)

    def variants(self, n_random: int) -> Iterator["Variant"]:
        """The plain model first; the exported one is loaded when the others are done."""
        from ..model.provenance import describe_model
        from ..recipes.capability import EXPORTED, PLAIN, Variant, variants_of_run
        from ..run.folder import RunInputs

        _check_origin(self.exported, self.model.source)
        loaded = self.model.load()
        if self.run is not None:
            yield from variants_of_run(RunInputs(loaded, self.run), self.model.source, n_random)
        else:
            yield Variant(PLAIN, loaded, self.model.source, _chat(loaded))
        if self.exported is not None:
            other = replace(self.model, model=self.exported, model_path=None, revision=None).load()
            _check_kind(describe_model(other, self.exported), describe_model(loaded, self.model.source))
            chat = _chat(other)
            if self.run is not None and chat is not None:
                chat = replace(RunInputs(other, self.run).chat, tokenizer=other.tokenizer)
            yield Variant(EXPORTED, other, self.exported, chat)


@dataclass(frozen=True)
class _Export:
    """What an export says of where it comes from."""

    source: str
    revision: str | None = None


def _model_of(model: ModelOptions, run: Path) -> ModelOptions:
    """The model that a run folder is about."""
    from ..files import read_record
    from ..run.record import RUN, RunInfo

    record = read_record(run / RUN, RunInfo).model
    return replace(model, model=_here(record.source), model_path=None, revision=model.revision or record.revision)


def _base_of(checkpoint: Path) -> str | None:
    """The model that a checkpoint was exported from; None is the embedded one."""
    from ..export.checkpoint import RECORD
    from ..files import read_record

    return _here(read_record(checkpoint / RECORD, _Export).source)


def _here(source: str) -> str | None:
    """A source as MODEL: the embedded model wherever the package was installed when the record was made."""
    from ..model.provenance import is_embedded

    return None if is_embedded(source) else source


def _resolved(exported: str | None) -> str | None:
    from ..model.loading import resolve_source

    return None if exported is None else resolve_source(exported)


def _check_origin(exported: str | None, source: str) -> None:
    """Warn where a checkpoint says that it was exported from another model."""
    from ..export.checkpoint import RECORD
    from ..model.loading import resolve_source

    if exported is None or not (Path(exported) / RECORD).is_file():
        return
    base = _base_of(Path(exported))
    if base != source and (base is not None or resolve_source(None) != source):
        warnings.warn(f"{exported} was exported from {base or 'the embedded model'}, not from {source}", stacklevel=2)


def _check_kind(other: "ModelRecord", plain: "ModelRecord") -> None:
    """Refuse a checkpoint that no export of the model can be."""
    kinds = [
        f"{each.model_type}, {each.n_layers} layers, width {each.d_model}, {each.d_vocab} tokens"
        for each in (other, plain)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"--exported {other.source} ({kinds[0]}) is no checkpoint of {plain.source} ({kinds[1]}): "
            "name an export of it"
        )


def _chat(model: "HookedModel") -> "ChatFormat | None":
    """The chat format of a model that has one."""
    from ..text.chat import ChatFormat

    return ChatFormat(model.tokenizer) if getattr(model.tokenizer, "chat_template", None) else None
