"""`refusal-mi variants`: the same requests in the user's own wordings; what that does to refusals, and where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import number_or_auto
from ..terminal import say
from .options import (
    AsJson,
    BatchSize,
    Fresh,
    JudgeOptions,
    ModelOptions,
    NewTokens,
    NPrompts,
    OutputDir,
    Seed,
    at_least,
    flat,
)

if TYPE_CHECKING:
    from ..run.variants import Change, VariantsResult, Wording

FOLDER = "variants"


@flat
def variants(
    model: ModelOptions,
    judge: JudgeOptions,
    variants: Annotated[
        Path | None,
        typer.Option(
            help="The wordings: JSON, JSON Lines or TOML; each a name, and a template with {instruction} in it, a "
            "system message, or both. Required."
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    n_prompts: NPrompts = None,
    max_new_tokens: NewTokens = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    output_dir: OutputDir = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> int:
    """Ask the same requests in other wordings, and compare.

    Held-out requests, harmful and harmless, with a prefix, suffix, role or system message of your own: refusals by
    text, the direction in the stream at every layer, what the heads read. Beside each: as many tokens of random words.
    """
    from ..errors import UserError
    from ..model.provenance import display_name
    from ..recipes.options import default_folder
    from ..run.folder import check_model_of_run
    from ..run.stages import RunFolder
    from ..text.variants import read_variants
    from .tables import print_json

    if variants is None:
        raise UserError("--variants FILE is missing: a JSON or TOML file of wordings (docs/variants.md has one)")
    source = model.source
    at_most = at_least("--n-prompts", n_prompts, 2, 100)
    tokens = at_least("--max-new-tokens", max_new_tokens, 1, 64)
    asked, size, says = read_variants(variants), number_or_auto(batch_size), judge.build("refusal")
    path = run or default_folder(source)
    check_model_of_run(path, source)
    folder = RunFolder(output_dir or path / FOLDER, fresh, say)
    folder.check_writable()

    from ..analysis.variants import variants as compute
    from ..run.folder import RunInputs

    inputs = RunInputs(model.load(), path, at_most, seed=42 if seed is None else seed)
    found = compute(inputs, asked, folder=folder, judge=says, max_new_tokens=tokens, batch_size=size)
    _draw(found, display_name(source), folder.path)
    print_json(found) if as_json else _print(found, folder.path)
    return 0


def _draw(found: "VariantsResult", name: str, folder: Path) -> None:
    from ..figures.save import save_figures
    from ..figures.variants import plot_variant_parts, plot_variant_rates, plot_variants

    drawn = {"projections": plot_variants, "rates": plot_variant_rates, "parts": plot_variant_parts}
    save_figures({file: plot(found, model=name) for file, plot in drawn.items()}, folder)


def _print(found: "VariantsResult", folder: Path) -> None:
    """Rates, a table for each side; then, for harmful requests, what is inside."""
    from .tables import print_lines, print_matrix

    sides = list(found.plain)
    for side in sides:
        rates = [(name, [str(each.refused), *_of_rate(change)]) for name, each, change in _named(found, side)]
        print_lines(f"{side} requests, refused by text")
        print_matrix(side, ["refused [95%]", "change [95%]", "p (Holm)"], rates)
    print_lines("degenerate answers")
    each_side = [[f"{each.degenerate.value:.2f}" for _, each, _ in found.wordings(side)] for side in sides]
    names = [name for name, _, _ in _named(found, sides[0])]
    print_matrix("share", sides, [(name, row) for name, *row in zip(names, *each_side, strict=True)])
    print_lines(
        "harmful requests: score, ⟨x, r̂⟩ and its change; tokens, attention of the last one",
        "and what is written along r̂, each of instruction, variant, template",
    )
    layer = found.direction_layer
    inside = [(name, _inside(each, change, found.slot, layer)) for name, each, change in _named(found, "harmful")]
    heads = ["tokens", "score", f"layer {layer}", "change [95%]", "random", "attention", "written"]
    print_matrix("harmful", heads, inside)
    for row in found.rows:
        for label, layers in (("changes ⟨x, r̂⟩ beyond", found.acts_at), ("differs there from", found.differs_at)):
            where = ", ".join(f"{side} {found.in_words(layers(row.name, side))}" for side in sides)
            print_lines(f"{row.name} {label} its control: {where}")
    for side in sides:
        for name, wording, _ in found.wordings(side):
            if wording.n_shared:
                print_lines(f"{name}, {side}: a token has letters of two parts in {wording.n_shared} prompts")
    for name, wording, _ in found.wordings("harmful"):
        print_lines(f"{name} begins: " + ", ".join(f"{text} … ({n})" for text, n in wording.first_words.items()))
    print_lines(*(f"caution: {each}" for each in found.cautions), f"{folder}")


def _named(found: "VariantsResult", side: str) -> "list[tuple[str, Wording, Change | None]]":
    """The wordings of a side; a control, which follows its variant, under a short name."""
    return [
        ("  control" if index and index % 2 == 0 else name, each, change)
        for index, (name, each, change) in enumerate(found.wordings(side))
    ]


def _of_rate(change: "Change | None") -> list[str]:
    from ..stats import p_text, signed

    if change is None:
        return ["", ""]
    limits = f"[{signed(change.refused['low'])}, {signed(change.refused['high'])}]"
    return [f"{signed(change.refused['difference'])} {limits}", p_text(change.p_holm).removeprefix("= ")]


def _inside(wording: "Wording", change: "Change | None", slot: int, layer: int) -> list[str]:
    from ..stats import signed

    changed = ["", ""]
    if change is not None:
        mean, low, high = map(signed, change.projections[slot][layer])
        changed = [f"{mean} [{low}, {high}]", signed(change.random_projections[slot][layer][0])]
    parts = ("instruction", "variant", "template")
    tokens = ", ".join(f"{wording.n_tokens[part]:.0f}" for part in parts)
    attention = ", ".join(f"{round(wording.attention[part][0], 2) + 0.0:.2f}" for part in parts)
    written = ", ".join(f"{round(wording.written[part][0], 1) + 0.0:.1f}" for part in parts)
    score, at = wording.score_nats[0], wording.projections[slot][layer][0]
    return [each.replace("-", "−") for each in (tokens, f"{score:.2f}", f"{at:.2f}", *changed, attention, written)]
