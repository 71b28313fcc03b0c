"""`refusal-mi export` and `refusal-mi export vector`: what was studied with hooks, as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..options import check_choice, in_words, layer_numbers, rank_numbers
from ..terminal import say, tell
from .options import (
    SCIENCE_FAILED,
    AllowOtherModel,
    AsJson,
    DirectionSource,
    Hook,
    Layer,
    Layers,
    Model,
    ModelPath,
    Output,
    OutputDir,
    Ranks,
    Revision,
    one_model,
)

if TYPE_CHECKING:
    from ..interventions import Ablate, Add

Strength = Annotated[float, typer.Option(help="Fraction of the component that is removed.")]
Components = Annotated[str, typer.Option(help="Which writes: some of embed,attn,mlp.")]
Affine = Annotated[
    str | None, typer.Option(help="Set the component to a constant: harmless-mean, or a number per direction.")
]
AddOption = Annotated[
    float | None, typer.Option("--add", help="Add this multiple of the raw direction at its layer, and ablate nothing.")
]


def export(
    model: Model = None,
    model_path: ModelPath = None,
    revision: Revision = None,
    direction: DirectionSource = None,
    directions: Ranks = None,
    strength: Strength = 1.0,
    layer: Layer = None,
    hook: Hook = None,
    layers: Layers = None,
    components: Components = "embed,attn,mlp",
    affine: Affine = None,
    add: AddOption = None,
    keep_tied: Annotated[bool, typer.Option("--keep-tied", help="Leave a tied token embedding alone.")] = False,
    stored_dtype: Annotated[str, typer.Option(help="Of the new files: keep, float32 or bfloat16.")] = "keep",
    adapter: Annotated[bool, typer.Option("--adapter", help="Write a PEFT LoRA adapter instead.")] = False,
    verify: Annotated[str, typer.Option(help="auto, full, streaming (block by block) or none.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that lies there.")] = False,
    allow_other_model: AllowOtherModel = False,
    output_dir: OutputDir = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upload what passed its verification; a new repository is private."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository of --push-to-hub public.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a checkpoint or adapter that does what hooks did.

    How closely it does is measured.
    """
    from .. import hub
    from ..export.checkpoint import RECORD
    from ..export.export import export_adapter, export_checkpoint
    from ..export.published import published
    from ..files import at_home
    from ..model.provenance import check_origin
    from .tables import print_export, print_json

    source = one_model(model, model_path)
    quiet()
    if push_to_hub is not None:
        hub.check_repository(push_to_hub)
        if verify == "none":
            raise UserError("--push-to-hub uploads what passed its verification: leave out --verify none")
    elif public:
        raise UserError("--public is about a repository of the hub: name it with --push-to-hub")
    what = _intervention(
        source, revision, direction, directions, strength, layer, hook, layers, components, affine, add
    )
    check_origin(_provenances(what), source, revision, allowed=allow_other_model)
    place = _place(source, direction)
    output_dir = output_dir or _default_folder(source) / ("adapter" if adapter else "checkpoint")
    if at_home(output_dir).resolve() in (place.resolve(), *place.resolve().parents):
        raise UserError(
            f"{output_dir} is or holds {place}, which the direction comes from; choose another --output-dir"
        )
    check_choice("--verify", verify, ("auto", "full", "streaming", "none"))
    if adapter:
        if keep_tied or stored_dtype != "keep":
            raise UserError(
                "--keep-tied and --stored-dtype are about checkpoints: an adapter leaves the weights as they are"
            )
        report = export_adapter(source, what, output_dir, verify=verify, revision=revision, force=force)  # type: ignore[arg-type]
    else:
        check_choice("--stored-dtype", stored_dtype, ("keep", "float32", "bfloat16"))
        report = export_checkpoint(
            source,
            what,
            output_dir,
            keep_tied=keep_tied,
            dtype=stored_dtype,  # type: ignore[arg-type]
            verify=verify,  # type: ignore[arg-type]
            revision=revision,
            force=force,
        )
    address = None
    if push_to_hub and report.is_verified:
        files = published(report.path)
        address = hub.push(files, push_to_hub, private=not public, mark=RECORD, kept=report.path)
    if as_json:
        print_json({**report.describe(), "path": str(report.path)} | ({"hub": address} if address else {}))
    else:
        print_export(report)
        if push_to_hub:
            tell(f"uploaded: {address}" if address else "not uploaded: it is outside its limits")
    return SCIENCE_FAILED if report.is_verified is False else 0


def export_vector(
    model: Model = None,
    model_path: ModelPath = None,
    revision: Revision = None,
    direction: DirectionSource = None,
    directions: Ranks = None,
    layer: Layer = None,
    hook: Hook = None,
    layers: Layers = None,
    components: Components = "embed,attn,mlp",
    add: AddOption = None,
    format: Annotated[str, typer.Option(help="gguf (llama.cpp control vector) or lm-eval (steering file).")] = "gguf",
    allow_other_model: AllowOtherModel = False,
    output: Output = None,
    as_json: AsJson = False,
) -> int:
    """Write a direction for llama.cpp or lm-evaluation-harness.

    llama.cpp adds it (--add 1 unless given); lm-evaluation-harness ablates it, or adds it.
    """
    import torch

    from ..export.formats import write_gguf, write_lm_eval
    from ..export.plan import describe_step
    from ..files import check_not_input
    from ..interventions import Add
    from ..model.guards import read_config
    from ..model.provenance import check_origin
    from .tables import print_json

    source = one_model(model, model_path)
    check_choice("--format", format, ("gguf", "lm-eval"))
    addition = 1.0 if format == "gguf" and add is None else add
    what = _intervention(source, revision, direction, directions, 1.0, layer, hook, layers, components, None, addition)
    check_origin(_provenances(what), source, revision, allowed=allow_other_model)
    place = _place(source, direction)
    folder = place if place.is_dir() else place.parent
    output = output or folder / ("control_vector.gguf" if format == "gguf" else "steering.pt")
    beside = [place.with_name(name) for name in (f"{place.stem}_metadata.json", "run.json")]
    check_not_input(output, [place, *beside, Path(source)])
    config = read_config(source, revision)
    if format == "gguf":
        assert isinstance(what, Add)
        write_gguf(output, what, config)
    else:
        write_lm_eval(output, what, config, config.dtype or torch.float32)
    if as_json:
        print_json({"path": str(output), "format": format, "interventions": [describe_step(what)]})
    else:
        tell(output)
    return 0


def _intervention(
    source: str,
    revision: str | None,
    direction: Path | None,
    ranks: str | None,
    strength: float,
    layer: int | None,
    hook: str | None,
    layers: str | None,
    components: str,
    affine: str | None,
    add: float | None,
) -> "Ablate | Add":
    from ..directions import Direction
    from ..interventions import Ablate, Add
    from ..model.guards import read_config
    from ..run.directions import harmless_components, read_directions

    place = _place(source, direction)
    if not place.exists():
        raise UserError(
            f"no such direction: {place}; make one with refusal-mi run, or give --direction FILE or RUN_DIR"
        )
    n_layers = read_config(source, revision).get_text_config().num_hidden_layers
    directions = read_directions(place, n_layers, ranks, layer, moves=add is not None, hook=hook)
    if ranks is not None:
        say(f"the directions of {in_words(rank_numbers(ranks))}")
    parts = tuple(part.strip() for part in components.split(","))
    for part in parts:
        check_choice("--components", part, ("embed", "attn", "mlp"))
    if add is not None:
        if len(directions) != 1 or affine is not None or strength != 1 or layers is not None or len(parts) != 3:
            raise UserError(
                "an addition (--add, a control vector) is one direction at its own layer: it takes no ablation option"
            )
        assert isinstance(directions[0], Direction)
        return Add(directions[0], add, layer)
    constants = None
    if affine == "harmless-mean":
        constants = harmless_components(place, directions)
    elif affine is not None:
        constants = _numbers(affine)
    return Ablate(directions, strength, layer_numbers(layers), parts, constants)  # type: ignore[arg-type]


def _place(source: str, direction: Path | None) -> Path:
    """The file or run folder that directions are read from."""
    from ..files import at_home

    return _default_folder(source) if direction is None else at_home(direction)


def _default_folder(source: str) -> Path:
    from ..recipes.options import default_folder

    return default_folder(source)


def _provenances(what: "Ablate | Add") -> list[Mapping[str, Any]]:
    from ..directions import Direction
    from ..interventions import Add

    directions = (what.direction,) if isinstance(what, Add) else what.each
    return [each.provenance for each in directions if isinstance(each, Direction)]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--affine takes harmless-mean or a number per direction, not {text!r}") from None


def quiet() -> None:
    """No bars where nobody looks, and no chatter of libraries."""
    import sys

    from huggingface_hub.utils.tqdm import disable_progress_bars

    from ..model.loading import silence_libraries

    if not sys.stderr.isatty():
        disable_progress_bars()
    silence_libraries()
