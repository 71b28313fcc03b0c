"""`refusal-mi complete`: what a server with an exported model answers to the held-out prompts of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..terminal import say
from .options import SCIENCE_FAILED, AsJson, Fresh, Model, ModelPath, NewTokens, Workers, at_least, one_model

MOST_NAMED = 20
"""Prompts that are named one by one where they were not answered."""

if TYPE_CHECKING:
    from ..run.folder import RunRecord
    from ..run.served import ServedRecord
    from ..text.chat import ChatFormat


def complete(
    model: Model = None,
    model_path: ModelPath = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Address of an OpenAI-compatible server, such as http://localhost:8000/v1.", metavar="URL"),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model, as the server calls it; default: the only one that it lists.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder with the direction; default runs/{alias}.")] = None,
    label: Annotated[str, typer.Option(help="Name of these answers beside the run's own.")] = "served",
    completions: Annotated[
        bool, typer.Option("--completions", help="Send rendered prompts: for a server without a chat template.")
    ] = False,
    max_new_tokens: NewTokens = None,
    workers: Workers = None,
    n_tries: Annotated[int, typer.Option(help="Tries of every prompt, further and further apart.")] = 5,
    timeout: Annotated[int, typer.Option(help="Seconds that one answer may take.")] = 300,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> int:
    """Let a server answer the held-out prompts of a run.

    For an exported model behind vLLM, transformers serve and the like: the prompts go there, greedy answers come back
    into the run folder, where judge and the report find them. A key is read from REFUSAL_MI_SERVER_KEY.
    """
    from ..recipes.options import default_folder
    from ..recipes.served import complete as compute
    from ..recipes.server import Server
    from ..report.page import write_report
    from ..run.folder import RunRecord, check_model_of_run
    from ..run.served import record_file
    from ..run.stages import RunFolder
    from .tables import print_json

    if endpoint is None:
        raise UserError("--endpoint URL is missing: the address of a server, such as http://localhost:8000/v1")
    at_least("--n-tries", n_tries, 1, 5), at_least("--timeout", timeout, 1, 300)
    n_workers = at_least("--workers", workers, 1, 4)
    tokens = None if max_new_tokens is None else at_least("--max-new-tokens", max_new_tokens, 1, 1)
    source = None if run is not None and model is None and model_path is None else one_model(model, model_path)
    server = Server(endpoint, model_name, "completions" if completions else "chat", n_workers, n_tries, float(timeout))
    path = default_folder(str(source)) if run is None else run
    if source is not None:
        check_model_of_run(path, source)
    folder = RunFolder(path, fresh, say)
    folder.check_writable()
    chat = _chat(RunRecord.load(path), source) if completions else None
    found = compute(folder, server, label=label, max_new_tokens=tokens, chat=chat)
    record = RunRecord.load(path)
    report = write_report(path) if (path / "report.html").is_file() else None
    print_json(found) if as_json else _print(found, record, report)
    for prompt, problem in [*found.unanswered.items()][:MOST_NAMED]:
        say(f"not answered: {prompt[:80]!r}: {problem}")
    if len(found.unanswered) > MOST_NAMED:
        n = len(found.unanswered) - MOST_NAMED
        say(f"not answered: {n} more prompts, named in {path / record_file(label)}")
    if found.unanswered:
        say("the same command without --fresh asks for these again")
    return SCIENCE_FAILED if found.unanswered else 0


def _chat(record: "RunRecord", source: str | None) -> "ChatFormat":
    """The chat format of a run, with the tokenizer as the server reads it."""
    from ..model.loading import ORGANISM, load_tokenizer, silence_libraries
    from ..text.chat import ChatFormat

    silence_libraries()
    options, made = record.run.options, record.run.model
    there = str(ORGANISM) if record.is_embedded else made.source if source is None else str(source)
    tokenizer = load_tokenizer(there, made.revision)
    prefix = "" if record.prompts is None else record.prompts.response_prefix
    return ChatFormat(tokenizer, options.system, options.template_kwargs, prefix, options.allow_special_tokens)


def _print(found: "ServedRecord", record: "RunRecord", report: Path | None) -> None:
    """Rates beside those of the run, and how often the server wrote what the run did."""
    from ..run.answers import Evaluation
    from .tables import Console, print_lines, print_rates

    console = Console()
    for side, served in found.sets.items():
        measured = record.side(side)
        known = {} if measured is None else {effect.label: effect for effect in measured.effects}
        path = record.path / f"completions/{served.set_name}_{found.label}_evaluations.json"
        effects = known | {found.label: Evaluation.load(path).effect(found.label)}
        print_rates(console, f"{served.set_name} ({side}), n = {served.n}", effects)
        if served.n_truncated:
            print_lines(f"cut off by the limit of tokens: {served.n_truncated} of {served.n} answers")
        if served.same_text:
            same = ", ".join(f"{label} {n}" for label, n in served.same_text.items())
            print_lines(f"the same text as the run's answers, of {served.n}: {same}")
        if measured is None or found.label not in known:
            print_lines(
                "not in the report: it shows answers beside the plain model's, to the same prompts asked the same way"
            )
    if len(found.answered_by) > 1:
        print_lines(f"caution: the answers name several models: {', '.join(found.answered_by)}")
    print_lines(f"written: {record.path / 'completions'}", *([] if report is None else [f"report: {report}"]))
