"""`refusal-mi caa` and `responses`: steering vectors, made and tested. A layer of CAA's is the output of a block."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import MEANINGS, layer_numbers, number_or_auto, numbers, position_scope
from ..recipes.options import EvalOptions, VectorOptions
from ..terminal import say
from .options import (
    SCIENCE_FAILED,
    AllowOtherModel,
    AsJson,
    BatchSize,
    Fresh,
    Given,
    Hook,
    JudgeOptions,
    Layer,
    Layers,
    ModelOptions,
    NewTokens,
    OutputDir,
    PositionsOption,
    Seed,
    TemplateOptions,
    at_least,
    flat,
    one_model,
)

if TYPE_CHECKING:
    from ..directions import Direction
    from ..model.points import HookedModel
    from ..model.provenance import ModelRecord
    from ..recipes.options import CAAConfig
    from ..run.stages import RunFolder

CAA, RESPONSES = "caa", "harmless_refusal_vectors"
"""Folders of the vectors, inside the model's."""
Config = Annotated[
    Path | None,
    typer.Option(help="Options from a .toml or .yaml file, or the write-up's config.yaml; other options win."),
]
Pairs = Annotated[str | None, typer.Option(help=MEANINGS["pairs"])]
Questions = Annotated[str | None, typer.Option(help=MEANINGS["questions"])]
NQuestions = Annotated[int | None, typer.Option(help=MEANINGS["n_questions"])]
Multipliers = Annotated[str | None, typer.Option(help=MEANINGS["multipliers"])]
Vector = Annotated[
    Path | None, typer.Option(help="A vector, or a folder of vec_layer_{L}_{model}.pt; default runs/{alias}/caa.")
]


@flat
def vectors(
    *,
    model: ModelOptions,
    pairs: Pairs = None,
    layers: Layers = None,
    config: Config = None,
    template: TemplateOptions,
    seed: Seed = None,
    batch_size: BatchSize = None,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Make a steering vector for every layer from A/B pairs."""
    from ..model.points import explain_layer, our_layer
    from ..recipes.caa import write_vectors
    from ..recipes.options import default_pairs
    from ..text.batches import with_smaller_batches
    from ..text.pairs import load_pairs
    from .tables import print_json, print_lines

    settings, model = _start(config, model)
    pair_set = load_pairs(pairs or settings.generation or default_pairs(model.source)[0])
    named = output_dir or settings.save_vector_path  # may hold vectors of several models: their names say which
    folder = _folder(named or _default(model, CAA))
    wanted, target = layer_numbers(layers), settings.target_layer
    loaded, record = _loaded(model, folder, claim=named is None)
    if target is not None:
        our_layer(target, loaded.cfg.n_layers)
    needed = wanted if wanted is None or target is None else tuple(sorted({*wanted, target}))
    chat = template.chat(loaded)
    given = loaded, model.source, chat, pair_set, folder.path
    made = with_smaller_batches(
        lambda size: write_vectors(*given, layers=needed, batch_size=size, seed=seed or 0), size_or(batch_size, 8)
    )
    if target is not None and settings.steering_vector_path is not None:
        made[target].save(settings.steering_vector_path)
    if named is None:
        folder.sign(record)
    if as_json:
        rows = [{"layer": layer, "means": explain_layer(layer), "norm": each.norm} for layer, each in made.items()]
        print_json({"pairs": pair_set.name, "n_pairs": len(pair_set), "folder": str(folder.path), "vectors": rows})
        return 0
    print_lines(*(f"{explain_layer(layer)}, norm {each.norm:.3f}" for layer, each in made.items()))
    print_lines(f"{len(pair_set)} pairs ({pair_set.name}); vectors and controls: {folder.path}")
    return 0


@flat
def test(
    *,
    model: ModelOptions,
    vector: Vector = None,
    hook: Hook = None,
    layer: Layer = None,
    multipliers: Multipliers = None,
    questions: Questions = None,
    n_questions: NQuestions = None,
    config: Config = None,
    template: TemplateOptions,
    positions: PositionsOption = None,
    max_new_tokens: NewTokens = None,
    judge: JudgeOptions,
    fresh: Fresh = False,
    batch_size: BatchSize = None,
    allow_other_model: AllowOtherModel = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Answer open questions with a vector added and subtracted."""
    from ..model.points import explain_layer, our_layer
    from ..model.provenance import check_origin
    from ..recipes.caa import check_vectors, vector_for
    from ..recipes.caa_open import open_ended
    from ..recipes.options import default_pairs
    from ..text.batches import with_smaller_batches
    from ..text.pairs import load_questions
    from .tables import print_answers, print_json, print_lines

    settings, model = _start(config, model)
    times, where = numbers("--multipliers")(multipliers or "1,2,3"), position_scope(positions or "response")
    tokens, n_asked = at_least("--max-new-tokens", max_new_tokens, 1, 50), n_questions
    if n_questions is not None:
        n_asked = at_least("--n-questions", n_questions, 1, 1)
    asked = load_questions(questions or settings.test or default_pairs(model.source)[2])[:n_asked]
    path = _vector_path(vector, settings, model)
    check_vectors(path)
    folder, verdict = _folder(output_dir or _default(model, CAA), fresh), judge.build("refusal")
    named = layer if layer is not None else settings.target_layer
    loaded, record = _loaded(model, folder)
    by_layer = _vectors(path, model, loaded.cfg.n_layers, named, hook)
    chosen = _only_layer(by_layer, folder.path) if named is None else named
    direction = vector_for(by_layer, chosen)
    made = [vector.provenance for vector in by_layer.values()]
    check_origin(made, model.source, model.revision, allowed=allow_other_model)
    given = loaded, template.chat(loaded), direction, chosen, asked, times, folder
    answers = with_smaller_batches(
        lambda size: open_ended(*given, positions=where, max_new_tokens=tokens, batch_size=size, judge=verdict),
        size_or(batch_size, 8),
    )
    folder.sign(record)
    if as_json:
        print_json(answers)
        return 0
    print_lines(explain_layer(chosen))
    if direction.layer != our_layer(chosen, loaded.cfg.n_layers):
        print_lines(f"the vector was read at {direction.hook_name}, our {direction.layer}")
    print_answers(answers)
    print_lines(f"answers: {folder.path}/test_results_x{{multiplier}}.json")
    return 0


@flat
def ab(
    *,
    model: ModelOptions,
    vector: Vector = None,
    hook: Hook = None,
    layers: Layers = None,
    multipliers: Multipliers = None,
    pairs: Pairs = None,
    choose_on: Annotated[
        str | None,
        typer.Option(
            help="Pairs that neither made the vectors nor are reported on: layer and multiplier are chosen on them; "
            "default: half of --pairs, and the other half is reported on."
        ),
    ] = None,
    questions: Questions = None,
    n_questions: NQuestions = None,
    config: Config = None,
    template: TemplateOptions,
    positions: PositionsOption = None,
    max_new_tokens: NewTokens = None,
    fresh: Fresh = False,
    batch_size: BatchSize = None,
    allow_other_model: AllowOtherModel = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Measure how a vector moves the choice of two answers.

    The choice is between the options A and B of a question, by layer and multiplier.
    """
    from ..figures.effects import plot_layer_sweep
    from ..figures.save import save_figure
    from ..model.provenance import check_origin, display_name
    from ..recipes.caa import check_vectors, load_controls, pairs_behind
    from ..recipes.caa_eval import ABTask, evaluate_choices
    from ..recipes.options import default_pairs
    from ..text.batches import with_smaller_batches
    from ..text.pairs import halves, load_pairs, load_questions
    from .tables import print_json, print_sweep

    settings, model = _start(config, model)
    times, where = numbers("--multipliers")(multipliers or "-1,0,1"), position_scope(positions or "response")
    tokens, n_asked = at_least("--max-new-tokens", max_new_tokens, 1, 50), at_least("--n-questions", n_questions, 0, 40)
    path = _vector_path(vector, settings, model)
    check_vectors(path)
    _, default_test, default_questions = default_pairs(model.source)
    reported = other = load_pairs(pairs or default_test)
    known = [reported]
    if choose_on is not None:
        other = load_pairs(choose_on)
        known.append(other)
    elif n_asked:
        other, reported = halves(reported)
        if not other.pairs or not reported.pairs:
            raise UserError(
                f"{known[0].name} has too few pairs to choose on one half and report on the other: it takes two with "
                "one matching letter; name more with --pairs, others with --choose-on, or choose nothing with "
                "--n-questions 0"
            )
    if settings.generation is not None and settings.generation.is_file():
        known.append(load_pairs(settings.generation))
    asked = load_questions(questions or settings.test or default_questions)[:n_asked] if n_asked else []
    folder, wanted = _folder(output_dir or _default(model, CAA), fresh), layer_numbers(layers)
    loaded, record = _loaded(model, folder)
    by_layer = _vectors(path, model, loaded.cfg.n_layers, wanted[0] if wanted and len(wanted) == 1 else None, hook)
    made = [vector.provenance for vector in by_layer.values()]
    check_origin(made, model.source, model.revision, allowed=allow_other_model)
    if layers == "all" and len(by_layer) == 1:
        wanted = tuple(range(loaded.cfg.n_layers))
    controls = load_controls(path, model.source, loaded.cfg.n_layers, by_layer)
    chat = template.chat(loaded)
    behind = pairs_behind(path, by_layer, known)
    if n_fitted := len(behind & set(reported.pairs)):
        say(
            f"warning: {n_fitted} of the {len(reported)} pairs of {reported.name}, which are reported on, made the "
            "vectors: effects on them are too large; name others with --pairs"
        )
    given = loaded, chat, by_layer, controls, reported, other, asked, folder
    results = with_smaller_batches(
        lambda size: evaluate_choices(*given, ABTask(times, wanted, where, size, tokens, str(path)), behind),
        size_or(batch_size, 16),
    )
    folder.sign(record)
    save_figure(plot_layer_sweep(results.sweep, model=display_name(model.source)), folder.path / "layer_sweep.html")
    print_json(results) if as_json else print_sweep(results)
    return 0


def size_or(batch_size: str | None, default: int) -> int | None:
    """The batch size that was asked for, None for auto."""
    return default if batch_size is None else number_or_auto(batch_size)


def _start(config: Path | None, model: ModelOptions) -> "tuple[CAAConfig, ModelOptions]":
    """The config, and the model that it names where the command line names none."""
    from dataclasses import replace

    from ..recipes.options import load_config

    settings = load_config(config)
    if model.named is None and settings.model_path is not None:
        model = replace(model, model=settings.model_path)
    one_model(model.model, model.model_path)
    return settings, model


def _vector_path(vector: Path | None, settings: "CAAConfig", model: ModelOptions) -> Path:
    return vector or settings.steering_vector_path or _default(model, CAA)


def _vectors(
    path: Path, model: ModelOptions, n_layers: int, layer: int | None, hook: str | None
) -> "dict[int, Direction]":
    """The vectors of a file or folder; a bare one was read at --hook, or at the output of the block of --layer."""
    from ..model.points import layer_of_hook, our_layer
    from ..recipes.caa import load_vectors

    if hook is not None:
        if path.is_dir():
            raise UserError(f"--hook says where one vector was read, and {path} is a folder of them")
        return load_vectors(path, model.source, n_layers, layer_of_hook(hook))
    place = None if layer is None else our_layer(layer, n_layers)
    return load_vectors(path, model.source, n_layers, place, moves=True)


def _default(model: ModelOptions, name: str) -> Path:
    from ..recipes.options import default_folder

    return default_folder(model.source) / name


def published_place(path: Path, source: str) -> Path:
    """A write-up's folder, pipeline/runs/{base name of the model}/..., as it is called here; any other as it is."""
    from ..recipes.caa import published_name
    from ..recipes.options import default_folder

    parts = path.parts[1:] if path.parts[:1] == ("pipeline",) else path.parts
    if path.exists() or parts[:1] != ("runs",) or parts[1:2] != (published_name(source),):
        return path
    here = default_folder(source).joinpath(*parts[2:])
    say(f"{path} is {here} here")
    return here


def _folder(path: Path, fresh: bool = False) -> "RunFolder":
    from ..run.stages import RunFolder

    folder = RunFolder(path, fresh, say)
    folder.check_writable()
    return folder


def _loaded(model: ModelOptions, folder: "RunFolder", *, claim: bool = True) -> "tuple[HookedModel, ModelRecord]":
    """The model and its record, and the folder claimed for it; what is made there signs it."""
    from ..model.provenance import describe_model

    loaded = model.load()
    record = describe_model(loaded, model.source)
    if claim:
        folder.claim(record)
    return loaded, record


def _only_layer(by_layer: "dict[int, Direction]", directory: Path) -> int:
    from ..files import read_record
    from ..recipes.caa_eval import AB_RESULTS, ABResults

    if len(by_layer) == 1:
        return next(iter(by_layer))
    path = directory / AB_RESULTS
    if not path.exists():
        raise UserError(f"there are vectors of layers {sorted(by_layer)}: choose one with --layer, or run caa ab first")
    chosen = read_record(path, ABResults).chosen
    if chosen is None:
        raise UserError(f"caa ab chose no layer among {sorted(by_layer)} (see {path}): choose one with --layer")
    return chosen.layer


_SHOWN = (
    "vector_shape",
    "n_compliant_responses_kept",
    "n_refusal_responses_kept",
    "compliant_filter_rate",
    "refusal_filter_rate",
    "judge",
)


@flat
def make(
    *,
    model: ModelOptions,
    given: Given[VectorOptions],
    judge: JudgeOptions,
    fresh: Fresh = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Make a refusal vector from free and instructed answers.

    Both answer the same harmless queries, the instructed ones with an instruction to refuse in front.
    """
    from ..recipes.responses import NothingSurvives, default_dataset, vector
    from .tables import print_facts, print_json

    dataset = given.values.get("dataset") or default_dataset(model.source, say)
    options = given.over(VectorOptions(dataset=dataset))
    verdict = judge.build("refusal")
    folder = _folder(output_dir or _default(model, RESPONSES), fresh)
    try:
        metadata = vector(model.load(), model.source, options, folder, verdict)
    except NothingSurvives as error:
        say(f"error: {error}")
        return SCIENCE_FAILED
    if as_json:
        print_json(metadata)
    else:
        print_facts({name: getattr(metadata, name) for name in _SHOWN} | {"folder": str(folder.path)})
    return 0


@flat
def evaluate(
    *,
    model: ModelOptions,
    vector_dir: Annotated[
        Path | None, typer.Option(help="What `responses extract` wrote; default runs/{alias}/harmless_refusal_vectors.")
    ] = None,
    given: Given[EvalOptions],
    judge: JudgeOptions,
    fresh: Fresh = False,
    output_dir: OutputDir = None,
    as_json: AsJson = False,
) -> int:
    """Choose the layer of a refusal vector, and measure it.

    What is measured are refusals of harmless queries, by coefficient.
    """
    from ..recipes.responses import VECTOR, default_dataset, recorded_dataset
    from ..recipes.responses_eval import evaluate_vector
    from .tables import print_coefficients, print_json, print_lines

    directory = _default(model, RESPONSES) if vector_dir is None else published_place(vector_dir, model.source)
    if not (directory / VECTOR).is_file():
        raise UserError(
            f"{directory} holds no {VECTOR}: make it with refusal-mi responses extract, or name its folder --vector-dir"
        )
    dataset = given.values.get("dataset") or recorded_dataset(directory) or default_dataset(model.source, say)
    options = given.over(EvalOptions(dataset=dataset))
    verdict = judge.build("refusal")
    folder = _folder(output_dir or directory, fresh)
    summary = evaluate_vector(model.load(), model.source, directory, options, folder, verdict)
    if as_json:
        print_json(summary)
    elif summary.status == "done":
        print_coefficients(summary)
    else:
        print_lines(f"{summary.status}: {summary.explanation}")
    return 0 if summary.status == "done" else SCIENCE_FAILED
