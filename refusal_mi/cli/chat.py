"""`refusal-mi chat`: talk to a model with a direction ablated or added, beside the plain model if wanted."""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .arguments import OutputDir, parse_positions
from .bundles import ModelOptions, TemplateOptions, flat
from .session import Change, Session
from .talk import answer_all, interact

if TYPE_CHECKING:
    from ..directions import Direction
    from ..interventions import Positions
    from ..models import HookedModel


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(command)


@flat
def command(
    *,
    model: ModelOptions,
    ablate: Annotated[
        str | None,
        typer.Option("--ablate", "--vectors-ablated", help="0-2: ablate ranks 0 and 2 of this model's run folder."),
    ] = None,
    direction: Annotated[Path | None, typer.Option(help="Ablate the direction in this .pt file.")] = None,
    steer: Annotated[Path | None, typer.Option(help="Add the vector in this .pt file.")] = None,
    coefficient: Annotated[
        float | None, typer.Option(help="How much of --steer to add, default 1; negative subtracts.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Where to add --steer: the stream entering this block; default: where it was read."),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Where --steer acts: all (default), prompt, or response (from the last prompt token on)."),
    ] = None,
    multi: Annotated[str, typer.Option(help="span, or sequential: how several --ablate are removed.")] = "span",
    compare: Annotated[bool, typer.Option("--compare", help="Show the plain model's answer beside it.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Say this instead of reading the terminal, and exit; repeatable.")
    ] = None,
    template: TemplateOptions,
    max_new_tokens: Annotated[int, typer.Option(help="Of every answer.")] = 512,
    output_dir: OutputDir = None,
) -> int:
    """Chat with a model, plain or with directions at work.

    Directions are ablated (--ablate, --direction) or added (--steer).

    Prompts also come from --prompt or from a pipe, one a line: each is the next turn of one conversation and gets
    one answer; a line /reset starts a new one.
    """
    from ..conversation import Conversation
    from ..pipelines.defaults import default_folder
    from ..pipelines.several import check_multi
    from ..provenance import display_name

    if sum(option is not None for option in (ablate, direction, steer)) > 1:
        raise UserError("give one of --ablate, --direction and --steer")
    where = parse_positions(positions or "all")
    about_steering = {"--coefficient": coefficient, "--layer": layer, "--positions": positions}
    lost = [name for name, value in about_steering.items() if value is not None]
    if steer is None and lost:
        raise UserError(f"{lost[0]} says how to add --steer FILE, which is missing")
    if prompt and not all(text.strip() for text in prompt):
        raise UserError("--prompt takes a text that is not empty")
    check_multi(multi)
    run_folder = output_dir or default_folder(model.source)
    if ablate is not None:
        _check_run(run_folder, model.named, output_dir)
    loaded = model.load()
    chat = template.chat(loaded)
    chat.render("?")

    def by_ranks(text: str) -> Change:
        _check_run(run_folder, model.named, output_dir)
        return _ablation_by_ranks(loaded, model.source, run_folder, text, multi)

    steering = None if steer is None else _Steering(_steering_vector(loaded, steer, layer), steer.name, layer, where)
    change = None
    if ablate is not None:
        change = by_ranks(ablate)
    elif direction is not None:
        change = _ablation_of_file(loaded, direction)
    elif steering is not None:
        change = steering(1.0 if coefficient is None else coefficient)
    interventions = change.interventions if change else ()
    session = Session(
        changed=Conversation(loaded, chat, interventions, max_new_tokens),
        plain=Conversation(loaded, chat, (), max_new_tokens) if compare else None,
        name=display_name(model.source),
        change=change,
        by_ranks=by_ranks,
        steered_by=steering,
    )
    if prompt:
        answer_all(session, prompt, has_commands=False)
    elif sys.stdin.isatty():
        interact(session)
    else:
        answer_all(session, (line.rstrip("\r\n") for line in sys.stdin), has_commands=True)
    return 0


@dataclass(frozen=True)
class _Steering:
    """Coefficient -> the addition of a vector."""

    direction: "Direction"
    file: str
    layer: int | None
    positions: "Positions"

    def __call__(self, coefficient: float) -> Change:
        from ..interventions import Add

        if not math.isfinite(coefficient):
            raise UserError(f"the coefficient must be a finite number, not {coefficient}")
        added = Add(self.direction, coefficient, self.layer, self.positions)
        layer = self.direction.layer if self.layer is None else self.layer
        return Change(f"{coefficient:+g} × {self.file} at layer {layer}", (added,))


def _check_run(folder: Path, model: str | None, output_dir: Path | None) -> None:
    from ..pipelines.search import SURVIVORS

    if not (folder / SURVIVORS).exists() or not (folder / "run.json").exists():
        parts = ["refusal-mi", "run", *([model] if model else []), "--steps", "directions,selection"]
        parts += ["--output-dir", str(output_dir)] if output_dir else []
        raise UserError(f"{folder} holds no ranked directions of this model; first run: {shlex.join(parts)}")


def _ablation_by_ranks(model: "HookedModel", source: str, folder: Path, text: str, multi: str) -> Change:
    from ..pipelines.several import combine, load_ranked, parse_directions
    from ..provenance import describe_model
    from ..stages import RunFolder

    RunFolder(folder).check_weights(describe_model(model, source))
    ranks = parse_directions(text)
    found = combine(ranks, load_ranked(folder, ranks), multi)  # type: ignore[arg-type]
    places = ", ".join(f"({place['pos']}, {place['layer']})" for place in found.places)
    noun = "direction" if len(ranks) == 1 else "directions"
    how = "" if multi == "span" else f", {multi}"
    return Change(f"ablated {noun} {text} at (position, layer) {places}{how}", found.interventions, found.warning)


def _ablation_of_file(model: "HookedModel", path: Path) -> Change:
    from ..directions import Direction
    from ..interventions import Ablate

    ablation = Ablate(Direction.load(path))
    ablation.hooks(model)
    return Change(f"ablated {path.name}", (ablation,))


def _steering_vector(model: "HookedModel", path: Path, layer: int | None) -> "Direction":
    """One vector and where it was read: from its metadata, from --layer, or row --layer of one vector per layer."""
    from torch import Tensor

    from ..directions import Direction
    from ..files import read_tensors
    from ..interventions import Add
    from ..models import resid_hook
    from ..pipelines.alpaca import load_vectors, row_direction

    found = read_tensors(path)
    if layer is not None:
        resid_hook(layer, model.cfg.n_layers)
    if isinstance(found, Tensor) and found.ndim == 2 and len(found) > 1:
        if layer is None:
            raise UserError(f"{path} holds {len(found)} vectors, one per layer: choose one with --layer")
        vector = row_direction(load_vectors(path, model.cfg.n_layers), layer)
    elif path.with_name(f"{path.stem}_metadata.json").exists():
        vector = Direction.load(path)
    elif not isinstance(found, Tensor) or found.squeeze().ndim != 1:
        raise UserError(f"{path} holds neither one vector of shape [d_model] nor one per layer")
    elif layer is None:
        raise UserError(f"nothing beside {path} says where the vector was read: say with --layer where to add it")
    else:
        vector = Direction(found.squeeze().clone(), layer, resid_hook(layer, model.cfg.n_layers))
    Add(vector).hooks(model)
    return vector
