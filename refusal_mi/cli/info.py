"""`refusal-mi model-info`: what the package sees in a model before any run."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import AsJson
from .bundles import ModelOptions, TemplateOptions, flat

if TYPE_CHECKING:
    from ..chat import ChatFormat
    from ..models import HookedModel
    from ..prompts import PromptSet

N_PROBE_PROMPTS = 32


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("model-info")(command)


@flat
def command(
    *,
    model: ModelOptions,
    template: TemplateOptions,
    discover: Annotated[
        bool, typer.Option(help="Run the model to find its response prefix and refusal tokens.")
    ] = True,
    as_json: AsJson = False,
) -> int:
    """Show what this package sees in a model.

    That is its template, post-instruction tokens, refusal tokens, layers, writers, dtype and memory.
    """
    from ..generation import discover_response_prefix
    from ..models import write_hooks
    from ..pipelines.context import N_PREFIX_PROMPTS
    from ..provenance import describe_model
    from .tables import print_facts, print_json

    source, loaded = model.source, model.load()
    chat = template.chat(loaded)
    if discover:
        mixed = [text for prompts in _sets(source) for text in prompts.instructions[: N_PREFIX_PROMPTS // 2]]
        chat = chat.with_response_prefix(discover_response_prefix(loaded, chat, mixed))
    record = describe_model(loaded, source)
    parameters = list(loaded.original_model.parameters())  # type: ignore[attr-defined]
    facts: dict[str, Any] = {
        **record,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "weight_mib": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
        **chat.describe(),
        "post_instruction_positions": list(chat.positions),
        "writers": write_hooks(loaded.cfg.n_layers),
        "refusal_tokens": _discover(loaded, chat, source) if discover else "not asked for",
    }
    print_json(facts) if as_json else print_facts(facts)
    return 0


def _sets(source: str) -> "list[PromptSet]":
    from ..pipelines.defaults import default_sets
    from ..prompts import load_prompts

    return [load_prompts(name.split(",")[0]) for name in default_sets(source)[:2]]


def _discover(model: "HookedModel", chat: "ChatFormat", source: str) -> list[str] | str:
    from ..errors import UserError
    from ..scores import discover_refusal_tokens, next_token_logits

    logits = [next_token_logits(model, chat, prompts.instructions[:N_PROBE_PROMPTS]) for prompts in _sets(source)]
    try:
        tokens = discover_refusal_tokens(*logits)
    except UserError as error:
        return str(error)
    return [f"{token} {chat.tokenizer.decode([token])!r}" for token in tokens]
