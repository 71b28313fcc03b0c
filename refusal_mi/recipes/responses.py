"""Response-averaged refusal vectors: the same query answered freely and on the order to refuse."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..files import read_record, write_json, write_record, write_tensors
from ..generation import Sampling, discover_response_prefix, generate
from ..judges.named import identify
from ..judges.substring import Judge, SubstringJudge, blind_spot
from ..model.points import HookedModel, resid_hook
from ..model.provenance import describe_model, versions
from ..reading import combine_spans
from ..run.stages import RunFolder
from ..text.batches import Span
from ..text.chat import ChatFormat, ChatRecord
from ..text.prompts import PromptSet, load_prompts
from ..values import Value
from .options import VectorOptions, default_queries

MIN_KEPT = 0.5
"""Below this fraction of one side, the filter's result carries a warning."""
VECTOR = "refusal_vector.pt"
RESPONSES = ("compliant_responses.json", "refusal_responses.json")
KEPT = ("filtered_compliant_responses.json", "filtered_refusal_responses.json")
TOKENS = "response_tokens.json"
METADATA = "metadata.json"
_SAMPLING = Sampling(seed=0, temperature=1.0, top_p=0.95, top_k=64)
_SIDES = ("compliant", "refusing")


class NothingSurvives(UserError):
    """No response of one side passed the filter; the responses are on disk."""


@dataclass(frozen=True)
class Response:
    """An answer and what was asked, as published files hold them."""

    instruction: str
    """The query."""
    prompt: str
    """The query with what was put in front of it."""
    response: str


@dataclass(frozen=True)
class ResponseTokens:
    """What the model wrote, in tokens."""

    instruction_index: int
    """Which of the refusal instructions was in front."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SavedTokens:
    """What `response_tokens.json` holds."""

    response_prefix: str
    compliant: tuple[ResponseTokens, ...]
    refusing: tuple[ResponseTokens, ...]


@dataclass(frozen=True)
class ResponseSampling(Sampling):
    """How the responses were drawn, with all that sampled text depends on."""

    batch_size: int = field(kw_only=True)
    max_new_tokens: int = field(kw_only=True)


@dataclass(frozen=True, kw_only=True)
class VectorMetadata:
    """What `metadata.json` holds."""

    n_queries: int
    n_completions_per_query: int
    n_compliant_responses_generated: int
    n_refusal_responses_generated: int
    n_compliant_responses_kept: int
    n_refusal_responses_kept: int
    compliant_filter_rate: float
    """Fraction that was kept."""
    refusal_filter_rate: float
    seed: int
    vector_shape: tuple[int, int]
    method: str = "mean over refusing responses - mean over compliant responses, each averaged over its tokens"
    hook_names: tuple[str, ...]
    """Where each row was read."""
    norms: tuple[float, ...]
    """Of each row."""
    dataset: str
    column: str | None
    refusal_instructions: tuple[str, ...]
    token_weights: Literal["mean", "first"]
    normalize: bool
    layers: tuple[int, ...]
    """Rows that are not zero."""
    judge: str
    sampling: ResponseSampling
    chat: ChatRecord
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Side(Value):
    """All responses of one side, and which of them pass the filter."""

    name: str
    responses: list[Response]
    tokens: tuple[ResponseTokens, ...]
    passed: list[bool]

    @property
    def kept(self) -> list[Response]:
        return [response for response, passed in zip(self.responses, self.passed, strict=True) if passed]


def did_as_asked(
    responses: Sequence[Response], tokens: Sequence[ResponseTokens], side: str, judge: Judge
) -> list[bool]:
    """Which responses are what their side should be, and not empty."""
    complied = judge.complied([row.instruction for row in responses], [row.response for row in responses])
    wanted = side == "compliant"
    return [flag == wanted and bool(entry.token_ids) for flag, entry in zip(complied, tokens, strict=True)]


def _warn_of_few(side: _Side, max_new_tokens: int) -> str | None:
    """A warning where few responses of a side passed; none is an error."""
    kept = side.kept
    if len(kept) >= MIN_KEPT * len(side.responses):
        return None
    lost = [row for row in side.responses if row not in kept][:2]
    shown = "; ".join(repr(row.response[:160]) for row in lost)
    way_out = (
        "try another --refusal-instruction, or a higher --n-samples or --n-completions"
        if side.name == "refusing"
        else "this model refuses harmless queries: try another --dataset or --system, or a higher --n-samples"
    )
    message = (
        f"only {len(kept)} of {len(side.responses)} {side.name} responses pass the filter (left out, for example: "
        f"{shown}); {way_out}, a longer --max-new-tokens (now {max_new_tokens}) or another --judge"
    )
    if kept:
        return message
    raise NothingSurvives(
        f"no {side.name} response passes the filter, so there is no vector; the responses are kept: {message}"
    )


def vector(
    model: HookedModel, source: str, options: VectorOptions, folder: RunFolder, judge: Judge | None = None
) -> VectorMetadata:
    """Sample, filter and read responses; write the documented files; return what `metadata.json` holds.

    vector[l] = mean(refusing responses) − mean(compliant responses) of the stream entering block l, averaged over
    the generated tokens in the templated context in which they were generated.

    Raises:
        NothingSurvives: no response of one side passes the filter.
    """
    judge = judge or SubstringJudge()
    record = describe_model(model, source)
    folder.claim(record)
    chat = ChatFormat(
        model.tokenizer,
        options.system,
        options.template_kwargs,
        options.response_prefix or "",
        options.allow_special_tokens,
    )
    queries = query_pools(options.dataset, options.column)[0].sample(options.n_samples, options.seed)
    layers = _checked_layers(options.layers, model.cfg.n_layers)
    base = {"model": record, "chat": chat.record(), "versions": versions()}
    prefix_only = {"response_prefix": options.response_prefix}
    sampled = {key: value for key, value in asdict(options).items() if key in _SAMPLED_OPTIONS}
    write_record(folder.path / "run.json", {**base, "options": options, "recipe": "response-averaged vector"})
    n_each = options.n_samples * options.n_completions
    hashes = folder.stage(
        "responses",
        {**base, **prefix_only, "options": sampled, "queries": queries.sha256},
        [*RESPONSES, TOKENS],
        lambda: _write_responses(model, chat, queries, options, folder.path),
        about=f"{n_each} free answers, {n_each * len(options.refusal_instructions)} under an instruction to refuse",
    )
    kept = {name: getattr(options, name) for name in ("token_weights", "layers", "normalize")}
    folder.stage(
        "vector",
        {**base, **kept, "judge": identify(judge), "files": hashes},
        [VECTOR, METADATA, *KEPT],
        lambda: _write_vector(model, chat, options, layers, judge, folder),
        about="mean residual streams over the responses",
    )
    return read_record(folder.path / METADATA, VectorMetadata)


_SAMPLED_OPTIONS = ("n_samples", "n_completions", "max_new_tokens", "batch_size", "seed", "refusal_instructions")


def query_pools(dataset: str, column: str | None) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Where training, validation and test queries are drawn from: one set for all, or TRAIN,VAL,TEST."""
    names = [name.strip() for name in dataset.split(",")]
    if len(names) not in (1, 3):
        raise UserError(f"expected one prompt set or TRAIN,VAL,TEST, not {len(names)} sets: {dataset!r}")
    train, val, test = (load_prompts(name, column=column) for name in (names * 3)[:3])
    return train, val, test


def default_dataset(source: str, report: Callable[[str], None]) -> str:
    """The queries of a vector that names none: the hub's Alpaca, where it does not answer the bundled harmless ones.

    Args:
        report: told when the bundled ones stand in.
    """
    name = default_queries(source)
    if name != "alpaca":
        return name
    try:
        load_prompts(name)
    except UserError as error:
        report(f"warning: the queries are the bundled set harmless, since alpaca cannot be read: {error}")
        return "harmless"
    return name


def row_direction(vectors: Float[Tensor, "layer d_model"], layer: int) -> Direction:
    """Row `layer` with the hook point that it was read from."""
    return Direction(vectors[layer].clone(), layer, resid_hook(layer, len(vectors) - 1))


@dataclass(frozen=True)
class _Dataset:
    """Of a `metadata.json`, published ones too, which do not say it."""

    dataset: str | None = None


def recorded_dataset(directory: Path) -> str | None:
    """The queries that a vector was made from; None where its folder does not say."""
    path = directory / METADATA
    return read_record(path, _Dataset).dataset if path.exists() else None


def _write_responses(
    model: HookedModel, chat: ChatFormat, queries: PromptSet, options: VectorOptions, path: Path
) -> None:
    if options.response_prefix is None:
        prefix = discover_response_prefix(model, chat, queries.instructions[:8])
        chat = chat.with_response_prefix(prefix)
    asked = [text for text in queries.instructions for _ in range(options.n_completions)]
    tokens: list[tuple[ResponseTokens, ...]] = []
    for place, (file, instructions) in enumerate(zip(RESPONSES, ([""], options.refusal_instructions), strict=True)):
        rows: list[Response] = []
        ids: list[ResponseTokens] = []
        for index, instruction in enumerate(instructions):
            prompts = [instruction + text for text in asked]
            answers = generate(
                model,
                chat,
                prompts,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                sampling=replace(_SAMPLING, seed=options.seed + place + index),
                description=f"{_SIDES[place]} responses",
            )
            ids += [ResponseTokens(index, answer.token_ids) for answer in answers]
            rows += [
                Response(text, prompt, answer.text)
                for text, prompt, answer in zip(asked, prompts, answers, strict=True)
            ]
        write_json(path / file, rows)
        tokens.append(tuple(ids))
    write_record(path / TOKENS, SavedTokens(chat.response_prefix, *tokens))


def _write_vector(
    model: HookedModel,
    chat: ChatFormat,
    options: VectorOptions,
    layers: tuple[int, ...],
    judge: Judge,
    folder: RunFolder,
) -> None:
    for stale in (VECTOR, METADATA):  # nothing of other responses may stay where none survive
        (folder.path / stale).unlink(missing_ok=True)
    saved = read_record(folder.path / TOKENS, SavedTokens)
    chat = chat.with_response_prefix(saved.response_prefix)
    compliant, refusing = _filter(folder.path, saved, judge)
    found_few = (_warn_of_few(side, options.max_new_tokens) for side in (compliant, refusing))
    rows = [row for side in (compliant, refusing) for row in side.responses]
    blind = blind_spot(judge, [row.instruction for row in rows], [row.response for row in rows])
    warnings = tuple(warning for warning in (*found_few, blind) if warning is not None)
    for warning in warnings:
        folder.report(f"warning: {warning}")
    vectors = _difference(model, chat, options, compliant, refusing)
    result = torch.zeros_like(vectors)
    result[list(layers)] = vectors[list(layers)]
    write_tensors(folder.path / VECTOR, result.float())
    sampling = ResponseSampling(
        **asdict(replace(_SAMPLING, seed=options.seed)),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    metadata = VectorMetadata(
        n_queries=options.n_samples,
        n_completions_per_query=options.n_completions,
        n_compliant_responses_generated=len(compliant.responses),
        n_refusal_responses_generated=len(refusing.responses),
        n_compliant_responses_kept=len(compliant.kept),
        n_refusal_responses_kept=len(refusing.kept),
        compliant_filter_rate=len(compliant.kept) / len(compliant.responses),
        refusal_filter_rate=len(refusing.kept) / len(refusing.responses),
        seed=options.seed,
        vector_shape=(len(result), result.shape[1]),
        hook_names=tuple(resid_hook(layer, len(result) - 1) for layer in range(len(result))),
        norms=tuple(result.norm(dim=-1).tolist()),
        dataset=options.dataset,
        column=options.column,
        refusal_instructions=options.refusal_instructions,
        token_weights=options.token_weights,
        normalize=options.normalize,
        layers=layers,
        judge=judge.name,
        sampling=sampling,
        chat=chat.record(),
        warnings=warnings,
    )
    write_json(folder.path / METADATA, metadata)


def _filter(folder: Path, saved: SavedTokens, judge: Judge) -> tuple[_Side, _Side]:
    """Judge the saved responses, and write those that pass."""
    sides = []
    for name, file, tokens in zip(_SIDES, RESPONSES, (saved.compliant, saved.refusing), strict=True):
        responses = read_record(folder / file, list[Response])
        sides.append(_Side(name, responses, tokens, did_as_asked(responses, tokens, name, judge)))
    for file, side in zip(KEPT, sides, strict=True):
        write_json(folder / file, side.kept)
    return sides[0], sides[1]


def _difference(
    model: HookedModel, chat: ChatFormat, options: VectorOptions, compliant: _Side, refusing: _Side
) -> Float[Tensor, "layer d_model"]:
    """Mean over the refusing responses − mean over the compliant ones; several instructions weigh the same."""
    spans: list[Span] = []
    weights: list[float] = []
    for side, sign in ((compliant, -1.0), (refusing, 1.0)):
        tokens = [entry for entry, passed in zip(side.tokens, side.passed, strict=True) if passed]
        groups = [entry.instruction_index for entry in tokens]
        spans += [
            _span(prompt, entry.token_ids, options.token_weights)
            for prompt, entry in zip(chat.encode_all([each.prompt for each in side.kept]), tokens, strict=True)
        ]
        weights += [sign / (len(set(groups)) * groups.count(group)) for group in groups]
    return combine_spans(
        model,
        spans,
        torch.tensor([weights], dtype=torch.float64),
        pad_id=chat.pad_id,
        normalize=options.normalize,
        batch_size=options.batch_size,
    )[0]


def _span(prompt: Sequence[int], response: Sequence[int], token_weights: str) -> Span:
    end = len(prompt) + (1 if token_weights == "first" else len(response))
    return Span((*prompt, *response), len(prompt), end)


def _checked_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(n_layers + 1))
    for layer in layers:
        resid_hook(layer, n_layers)
    return tuple(sorted(set(layers)))
