"""`refusal-mi caa vectors|test|ab`: CAA steering vectors, made and tested. `--layer` here is the output of a block."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .arguments import AsJson, one_model, parse_layers, parse_numbers, parse_positions
from .bundles import JudgeOptions, ModelOptions, TemplateOptions, flat

if TYPE_CHECKING:
    from ..directions import Direction
    from ..pipelines.caa_config import CAAConfig
    from ..stages import RunFolder

Config = Annotated[Path | None, typer.Option(help="The write-up's config.yaml; flags on the command line win over it.")]
CAALayers = Annotated[str | None, typer.Option(help="all, or such as 13 14 or 10-20: outputs of these blocks.")]
Vector = Annotated[
    Path | None, typer.Option(help="A vector, or a folder of vec_layer_{L}_{model}.pt; default runs/{alias}/caa.")
]
Hook = Annotated[str | None, typer.Option(help="Where a bare tensor was read, such as blocks.13.hook_resid_post.")]
PositionsOption = Annotated[
    str, typer.Option("--positions", help="response: from the last prompt token on; prompt; or all.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Texts per forward pass.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")]
OutputDirOption = Annotated[Path | None, typer.Option("--output-dir", help="Default runs/{alias}/caa.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of every answer.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(
        help="CAA steering vectors. A layer here is the output of a block.", no_args_is_help=True, rich_markup_mode=None
    )
    group.command("vectors")(vectors)
    group.command("test")(test)
    group.command("ab")(ab)
    app.add_typer(group, name="caa")


@flat
def vectors(
    *,
    model: ModelOptions,
    pairs: Annotated[str | None, typer.Option(help="A .json file of A/B pairs, or the name of a bundled set.")] = None,
    layers: CAALayers = None,
    config: Config = None,
    template: TemplateOptions,
    seed: Annotated[int, typer.Option(help="Of the control's shuffled labels.")] = 0,
    batch_size: BatchSizeOption = 8,
    output_dir: OutputDirOption = None,
    as_json: AsJson = False,
) -> int:
    """Make a steering vector for every layer from A/B pairs."""
    from ..pairs import load_pairs
    from ..pipelines.caa import explain_layer, our_layer, write_vectors
    from ..pipelines.defaults import default_pairs
    from .caa_tables import print_lines
    from .tables import print_json

    settings, model = _start(config, model)
    found = load_pairs(pairs or settings.generation or default_pairs(model.source)[0])
    folder = _folder(output_dir or settings.save_vector_path, model)
    wanted, target = parse_layers(layers), settings.target_layer
    loaded = model.load()
    if target is not None:
        our_layer(target, loaded.cfg.n_layers)
    needed = wanted if wanted is None or target is None else tuple(sorted({*wanted, target}))
    chat = template.chat(loaded)
    made = write_vectors(
        loaded, model.source, chat, found, folder.path, layers=needed, batch_size=batch_size, seed=seed
    )
    if target is not None and settings.steering_vector_path is not None:
        made[target].save(settings.steering_vector_path)
    rows = [{"layer": layer, "means": explain_layer(layer), "norm": entry.norm} for layer, entry in made.items()]
    if as_json:
        print_json({"pairs": found.name, "n_pairs": len(found), "folder": str(folder.path), "vectors": rows})
        return 0
    print_lines(*(f"{row['means']}, norm {row['norm']:.3f}" for row in rows))
    print_lines(f"{len(found)} pairs ({found.name}); vectors and controls: {folder.path}")
    return 0


@flat
def test(
    *,
    model: ModelOptions,
    vector: Vector = None,
    hook: Hook = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Output of this block; default: the config's, the one that `ab` chose, or the vector's."),
    ] = None,
    multipliers: Annotated[str, typer.Option(help="How often the vector is added and subtracted.")] = "1,2,3",
    questions: Annotated[str | None, typer.Option(help="Open questions: a file or a bundled set.")] = None,
    n_questions: Annotated[int | None, typer.Option(min=1, help="Only the first of them.")] = None,
    config: Config = None,
    template: TemplateOptions,
    positions: PositionsOption = "response",
    max_new_tokens: NewTokens = 50,
    judge: JudgeOptions,
    fresh: Fresh = False,
    batch_size: BatchSizeOption = 8,
    output_dir: OutputDirOption = None,
    as_json: AsJson = False,
) -> int:
    """Answer open questions with a vector added and subtracted."""
    from ..pairs import load_questions
    from ..pipelines.caa import check_weights, explain_layer, load_vectors
    from ..pipelines.caa_ab import vector_for
    from ..pipelines.caa_answers import open_ended
    from ..pipelines.defaults import default_pairs
    from ..provenance import describe_model
    from .caa_tables import print_answers, print_lines
    from .tables import print_json

    settings, model = _start(config, model)
    times, where = parse_numbers(multipliers, "--multipliers"), parse_positions(positions)
    asked = load_questions(questions or settings.test or default_pairs(model.source)[2])[:n_questions]
    found = load_vectors(_vector_path(vector, settings, model), model.source, hook=hook)
    folder = _folder(output_dir, model, fresh)
    named = layer if layer is not None else settings.target_layer
    chosen = _only_layer(found, folder.path) if named is None else named
    direction, verdict = vector_for(found, chosen), judge.found("refusal")
    loaded = model.load()
    check_weights(found, describe_model(loaded, model.source))
    summary = open_ended(
        loaded,
        template.chat(loaded),
        direction,
        chosen,
        asked,
        times,
        folder,
        positions=where,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        judge=verdict,
    )
    if as_json:
        print_json(summary)
        return 0
    print_lines(explain_layer(chosen))
    if direction.layer != chosen + 1:
        print_lines(f"the vector was read at {direction.hook_name}, our {direction.layer}")
    print_answers(summary)
    print_lines(f"answers: {folder.path}/test_results_x{{multiplier}}.json")
    return 0


@flat
def ab(
    *,
    model: ModelOptions,
    vector: Vector = None,
    hook: Hook = None,
    layers: CAALayers = None,
    multipliers: Annotated[str, typer.Option(help="How often the vector is added, such as -1 0 1.")] = "-1,0,1",
    pairs: Annotated[str | None, typer.Option(help="A/B pairs that are reported on; default: held-out ones.")] = None,
    choose_on: Annotated[
        str | None, typer.Option(help="Other pairs, on which layer and multiplier are chosen.")
    ] = None,
    questions: Annotated[str | None, typer.Option(help="Open questions for the check of the text.")] = None,
    n_questions: Annotated[int, typer.Option(min=0, help="Only the first of them; 0: choose nothing.")] = 40,
    config: Config = None,
    template: TemplateOptions,
    positions: PositionsOption = "response",
    max_new_tokens: NewTokens = 50,
    fresh: Fresh = False,
    batch_size: BatchSizeOption = 16,
    output_dir: OutputDirOption = None,
    as_json: AsJson = False,
) -> int:
    """Measure how a vector moves the choice of two answers.

    The choice is between the options A and B of a question, by layer and multiplier.
    """
    from ..pairs import load_pairs, load_questions
    from ..pipelines.caa import check_weights, load_controls, load_vectors
    from ..pipelines.caa_choice import ABTask, evaluate_choices
    from ..pipelines.defaults import default_pairs
    from ..plots.caa import plot_layer_sweep
    from ..plots.save import save_figure
    from ..provenance import describe_model, display_name
    from .caa_tables import print_sweep
    from .tables import print_json

    settings, model = _start(config, model)
    times, where = parse_numbers(multipliers, "--multipliers"), parse_positions(positions)
    path = _vector_path(vector, settings, model)
    found = load_vectors(path, model.source, hook=hook)
    default_train, default_test, default_questions = default_pairs(model.source)
    reported, other = load_pairs(pairs or default_test), load_pairs(choose_on or default_train)
    asked = load_questions(questions or settings.test or default_questions)[:n_questions] if n_questions else []
    folder, wanted = _folder(output_dir, model, fresh), parse_layers(layers)
    loaded = model.load()
    check_weights(found, describe_model(loaded, model.source))
    if layers == "all" and len(found) == 1:
        wanted = tuple(range(loaded.cfg.n_layers))
    task = ABTask(times, wanted, where, batch_size, max_new_tokens, str(path))
    controls = load_controls(path, model.source, found)
    record, sweep = evaluate_choices(
        loaded, template.chat(loaded), found, controls, reported, other, asked, folder, task
    )
    save_figure(plot_layer_sweep(sweep, model=display_name(model.source)), folder.path / "layer_sweep.html")
    if as_json:
        print_json(record)
    else:
        print_sweep(record)
    return 0


def _start(config: Path | None, model: ModelOptions) -> "tuple[CAAConfig, ModelOptions]":
    """The config, and the model that it names where the command line names none."""
    from dataclasses import replace

    from ..pipelines.caa_config import load_config

    settings = load_config(config)
    if model.named is None and settings.model_path is not None:
        model = replace(model, model=settings.model_path)
    one_model(model.model, model.model_path)
    return settings, model


def _vector_path(vector: Path | None, settings: "CAAConfig", model: ModelOptions) -> Path:
    return vector or settings.steering_vector_path or _default_dir(model)


def _default_dir(model: ModelOptions) -> Path:
    from ..pipelines.defaults import default_folder

    return default_folder(model.source) / "caa"


def _folder(path: Path | None, model: ModelOptions, fresh: bool = False) -> "RunFolder":
    from ..stages import RunFolder

    folder = RunFolder(path or _default_dir(model), fresh, lambda message: print(message, file=sys.stderr))
    folder.check_writable()
    return folder


def _only_layer(found: "dict[int, Direction]", directory: Path) -> int:
    from ..files import read_json

    if len(found) == 1:
        return next(iter(found))
    record = directory / "ab_results.json"
    if not record.exists():
        raise UserError(f"there are vectors of layers {sorted(found)}: choose one with --layer, or run caa ab first")
    chosen = read_json(record).get("chosen")
    if chosen is None:
        raise UserError(f"caa ab chose no layer among {sorted(found)} (see {record}): choose one with --layer")
    return int(chosen["layer"])
