"""`refusal-mi vector` and `vector-eval`: response-averaged refusal vectors, made and tested."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .arguments import AsJson, parse_layers, parse_numbers, parse_positions, parse_tokens
from .bundles import JudgeOptions, ModelOptions, TemplateOptions, flat, limit

if TYPE_CHECKING:
    from ..stages import RunFolder

SCIENCE_FAILED = 1
_SHOWN = (
    "vector_shape",
    "n_compliant_responses_kept",
    "n_refusal_responses_kept",
    "compliant_filter_rate",
    "refusal_filter_rate",
    "judge",
)

Dataset = Annotated[
    str | None,
    typer.Option(help="Queries: a set, or TRAIN,VAL,TEST; default alpaca, for the embedded model its own harmless."),
]
Column = Annotated[str | None, typer.Option(help="Column that holds the query.")]
Layers = Annotated[str | None, typer.Option(help="Layers to use, such as 3,5-7; default all.")]
MaxNewTokens = Annotated[int, typer.Option(help="Of every answer.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("vector")(make)
    app.command("vector-eval")(evaluate)


@flat
def make(
    *,
    model: ModelOptions,
    dataset: Dataset = None,
    column: Column = None,
    n_samples: Annotated[int, typer.Option(help="Queries.")] = 20,
    n_completions: Annotated[int, typer.Option(help="Sampled answers to each query, in each mode.")] = 10,
    max_new_tokens: MaxNewTokens = 64,
    generation_batch_size: Annotated[int, typer.Option(help="Prompts per batch; sampled text depends on it.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the queries and the sampling.")] = 42,
    refusal_instruction: Annotated[
        list[str] | None, typer.Option(help="Put in front of the query; repeatable, their means are averaged.")
    ] = None,
    token_weights: Annotated[str, typer.Option(help="mean over a response's tokens, or its first.")] = "mean",
    layers: Layers = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Give every response the same norm, per layer, before averaging.")
    ] = False,
    judge: JudgeOptions,
    template: TemplateOptions,
    response_prefix: Annotated[
        str | None, typer.Option(help="Text that every answer begins with; default: found by generating.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Default runs/{alias}/harmless_refusal_vectors.")] = None,
    as_json: AsJson = False,
) -> int:
    """Make a refusal vector from free and instructed answers.

    Both answer the same harmless queries, the instructed ones with an instruction to refuse in front.
    """
    from ..pipelines.alpaca import REFUSAL_INSTRUCTION, VectorOptions, vector
    from ..pipelines.defaults import default_queries
    from ..pipelines.response_filter import NothingSurvives
    from .tables import print_facts, print_json

    given = tuple(text if text[-1:].isspace() else f"{text}\n" for text in refusal_instruction or ())
    options = VectorOptions(
        dataset=dataset or default_queries(model.source),
        column=column,
        n_samples=n_samples,
        n_completions=n_completions,
        max_new_tokens=max_new_tokens,
        batch_size=generation_batch_size,
        seed=seed,
        refusal_instructions=given or (REFUSAL_INSTRUCTION,),
        token_weights=token_weights,  # type: ignore[arg-type]
        layers=parse_layers(layers),
        normalize=normalize,
        system=template.system,
        template_kwargs=template.kwargs,
        response_prefix=response_prefix,
    )
    verdict = judge.found("refusal")
    path = output_dir or _default_folder(model)
    folder = _folder(path, fresh)
    try:
        found = vector(model.load(), model.source, options, folder, verdict)
    except NothingSurvives as error:
        typer.echo(f"error: {error}", err=True)
        return SCIENCE_FAILED
    if as_json:
        print_json(found)
    else:
        print_facts({key: found[key] for key in _SHOWN} | {"folder": str(path)})
    return 0


@flat
def evaluate(
    *,
    model: ModelOptions,
    vector_dir: Annotated[
        Path | None, typer.Option(help="What `vector` wrote; default runs/{alias}/harmless_refusal_vectors.")
    ] = None,
    dataset: Dataset = None,
    column: Column = None,
    n_validation_samples: Annotated[int, typer.Option(help="Queries that choose the layer.")] = 32,
    n_test_samples: Annotated[int, typer.Option(help="Queries that are reported on.")] = 20,
    coefficients: Annotated[str, typer.Option(help="How often the vector is added, such as 0.0 0.5 1.0.")] = (
        "0.0,0.5,1.0,2.0,5.0"
    ),
    max_new_tokens: MaxNewTokens = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.")] = 8,
    validation_seed: Annotated[int, typer.Option(help="Of the validation sample.")] = 200,
    test_seed: Annotated[int, typer.Option(help="Of the test sample.")] = 100,
    layer: Annotated[
        str, typer.Option(help="auto (highest steering score), sound (best that is neither late nor degenerate), or N.")
    ] = "auto",
    layers: Layers = None,
    kl_max: Annotated[
        float | None, typer.Option(help="Largest KL of ablating the row on validation queries, in nats; default: any.")
    ] = None,
    refusal_tokens: Annotated[
        str | None, typer.Option(help="Token ids of the refusal score; default: found from the responses.")
    ] = None,
    positions: Annotated[str, typer.Option(help="Where the vector is added: all, prompt or response.")] = "all",
    n_random: Annotated[int, typer.Option(help="Random vectors of equal norm, as controls.")] = 1,
    judge: JudgeOptions,
    template: TemplateOptions,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage again.")] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Default: the vector's folder.")] = None,
    as_json: AsJson = False,
) -> int:
    """Choose the layer of a refusal vector, and measure it.

    What is measured are refusals of harmless queries, by coefficient.
    """
    from ..pipelines.alpaca import VECTOR
    from ..pipelines.alpaca_eval import evaluate_vector
    from ..pipelines.alpaca_measures import EvalOptions
    from ..pipelines.defaults import default_queries
    from .tables import print_json

    if layer not in ("auto", "sound") and not layer.isdigit():
        raise UserError(f"--layer takes auto, sound or a number, not {layer!r}")
    directory = vector_dir or _default_folder(model)
    if not (directory / VECTOR).is_file():
        raise UserError(
            f"{directory} holds no {VECTOR}: make it with refusal-mi vector, or name its folder --vector-dir"
        )
    options = EvalOptions(
        dataset=dataset or _recorded_dataset(directory) or default_queries(model.source),
        column=column,
        n_validation_samples=n_validation_samples,
        n_test_samples=n_test_samples,
        coefficients=parse_numbers(coefficients, "--coefficients"),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        validation_seed=validation_seed,
        test_seed=test_seed,
        layer=int(layer) if layer.isdigit() else None,
        sound_layer=layer == "sound",
        layers=parse_layers(layers),
        kl_max=limit(kl_max),
        refusal_tokens=parse_tokens(refusal_tokens),
        positions=parse_positions(positions),
        n_random=n_random,
        system=template.system,
        template_kwargs=template.kwargs,
    )
    verdict = judge.found("refusal")
    folder = _folder(output_dir or directory, fresh)
    summary = evaluate_vector(model.load(), model.source, directory, options, folder, verdict)
    print_json(summary) if as_json else _print_rates(summary)
    return 0 if summary["status"] == "done" else SCIENCE_FAILED


def _recorded_dataset(directory: Path) -> str | None:
    from ..files import read_json

    record = directory / "metadata.json"
    return read_json(record).get("dataset") if record.exists() else None


def _default_folder(model: ModelOptions) -> Path:
    from ..pipelines.defaults import default_folder

    return default_folder(model.source) / "harmless_refusal_vectors"


def _folder(path: Path, fresh: bool) -> "RunFolder":
    from ..stages import RunFolder

    folder = RunFolder(path, fresh, lambda message: typer.echo(message, err=True))
    folder.check_writable()
    return folder


def _print_rates(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if summary["status"] != "done":
        console.print(f"{summary['status']}: {summary['explanation']}", highlight=False)
        return
    gain = summary["selected_layer_steering_score"]
    console.print(
        f"layer {summary['selected_layer']} ({summary['hook_name']}): refusal score "
        f"{summary['baseline_refusal_score']:.2f} -> {gain:.2f}",
        highlight=False,
    )
    controls = summary["random_controls"]
    n = summary["n_test_samples"]
    table = Table(f"coefficient (n = {n})", "refused [95%]", "degenerate", *(f"random {seed}" for seed in controls))
    for key, found in summary["results_by_coefficient"].items():
        low, high = found["interval"]
        random = [f"{runs[key]['refusal_rate']:.2f}" if key in runs else "" for runs in controls.values()]
        refused = f"{found['refusal_rate']:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(key, refused, f"{found['degenerate_rate']['rate']:.2f}", *random)
    console.print(table)
