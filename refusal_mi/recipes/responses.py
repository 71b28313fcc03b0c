"""Response-averaged refusal vectors: the same query answered freely and on the order to refuse."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import Direction
from ..errors import UserError
from ..files import read_json, read_tensors, write_json, write_tensors
from ..generation import Sampling, discover_response_prefix, generate
from ..judges.http import identify
from ..judges.substring import Judge, SubstringJudge
from ..model.points import HookedModel, resid_hook
from ..model.provenance import describe_model, versions
from ..reading import combine_spans
from ..run.stages import RunFolder
from ..text.batches import Span
from ..text.chat import ChatFormat
from ..text.prompts import PromptSet, load_prompts

MIN_KEPT = 0.5
"""Below this fraction of one side, the filter's result carries a warning."""


class NothingSurvives(UserError):
    """No response of one side passed the filter; the responses are on disk."""


def passes(rows: Sequence[dict[str, str]], tokens: Sequence[Any], side: str, judge: Judge) -> list[bool]:
    complied = judge.complied([row["instruction"] for row in rows], [row["response"] for row in rows])
    wanted = side == "compliant"
    return [flag == wanted and bool(entry["token_ids"]) for flag, entry in zip(complied, tokens, strict=True)]


def warn_of_few(
    side: str, rows: Sequence[dict[str, str]], kept: Sequence[dict[str, str]], max_new_tokens: int
) -> str | None:
    """A warning where few responses of a side passed; none is an error."""
    if len(kept) >= MIN_KEPT * len(rows):
        return None
    lost = [row for row in rows if row not in kept][:2]
    shown = "; ".join(repr(row["response"][:160]) for row in lost)
    way_out = (
        "try another --refusal-instruction, or a higher --n-samples or --n-completions"
        if side == "refusing"
        else "this model refuses harmless queries: try another --dataset or --system, or a higher --n-samples"
    )
    message = (
        f"only {len(kept)} of {len(rows)} {side} responses pass the filter (left out, for example: {shown}); "
        f"{way_out}, a longer --max-new-tokens (now {max_new_tokens}) or another --judge"
    )
    if kept:
        return message
    raise NothingSurvives(
        f"no {side} response passes the filter, so there is no vector; the responses are kept: {message}"
    )


REFUSAL_INSTRUCTION = "You must refuse to answer this question.\n"
VECTOR = "refusal_vector.pt"
RESPONSES = ("compliant_responses.json", "refusal_responses.json")
KEPT = ("filtered_compliant_responses.json", "filtered_refusal_responses.json")
TOKENS = "response_tokens.json"
_SAMPLING = Sampling(seed=0, temperature=1.0, top_p=0.95, top_k=64)
_SIDES = ("compliant", "refusing")


@dataclass(frozen=True)
class VectorOptions:
    """Options of `vector`, with the published defaults."""

    dataset: str = "alpaca"
    """One prompt set, or TRAIN,VAL,TEST of which TRAIN is used here."""
    column: str | None = None
    n_samples: int = 20
    """Queries."""
    n_completions: int = 10
    """Sampled answers to each query, free and under each refusal instruction."""
    max_new_tokens: int = 64
    batch_size: int = 8
    """Sampled text depends on it."""
    seed: int = 42
    refusal_instructions: tuple[str, ...] = (REFUSAL_INSTRUCTION,)
    """Put in front of the query; the means under several are averaged."""
    token_weights: Literal["mean", "first"] = "mean"
    """Average over all tokens of a response, or read its first."""
    layers: tuple[int, ...] | None = None
    """Rows to keep, the others are zero; None is all of 0..n_layers."""
    normalize: bool = False
    """Give every response the same norm, per layer, before averaging."""
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    response_prefix: str | None = None
    """None: found by generating."""

    def __post_init__(self) -> None:
        for name in ("n_samples", "n_completions", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.refusal_instructions:
            raise UserError("a refusal vector needs at least one refusal instruction")
        if self.token_weights not in ("mean", "first"):
            raise UserError(f"token weights are mean or first, not {self.token_weights!r}")


def vector(
    model: HookedModel, source: str, options: VectorOptions, folder: RunFolder, judge: Judge | None = None
) -> dict[str, Any]:
    """Sample, filter and read responses; write the documented files; return what `metadata.json` holds.

    vector[l] = mean(refusing responses) − mean(compliant responses) of the stream entering block l, averaged over
    the generated tokens in the templated context in which they were generated.

    Raises:
        NothingSurvives: no response of one side passes the filter.
    """
    judge = judge or SubstringJudge()
    record = describe_model(model, source)
    folder.claim(record)
    chat = ChatFormat(model.tokenizer, options.system, options.template_kwargs, options.response_prefix or "")
    queries = query_pools(options.dataset, options.column)[0].sample(options.n_samples, options.seed)
    layers = _checked_layers(options.layers, model.cfg.n_layers)
    base = {"model": record, "chat": chat.record(), "versions": versions()}
    prefix_only = {"response_prefix": options.response_prefix}
    sampled = {key: value for key, value in asdict(options).items() if key in _SAMPLED_OPTIONS}
    write_json(folder.path / "run.json", {**base, "options": asdict(options), "recipe": "response-averaged vector"})
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
        [VECTOR, "metadata.json", *KEPT],
        lambda: _write_vector(model, chat, options, layers, judge, folder),
        about="mean residual streams over the responses",
    )
    return read_json(folder.path / "metadata.json")


_SAMPLED_OPTIONS = ("n_samples", "n_completions", "max_new_tokens", "batch_size", "seed", "refusal_instructions")


def query_pools(dataset: str, column: str | None) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Where training, validation and test queries are drawn from: one set for all, or TRAIN,VAL,TEST."""
    names = [name.strip() for name in dataset.split(",")]
    if len(names) not in (1, 3):
        raise UserError(f"expected one prompt set or TRAIN,VAL,TEST, not {len(names)} sets: {dataset!r}")
    train, val, test = (load_prompts(name, column=column) for name in (names * 3)[:3])
    return train, val, test


def load_vectors(path: Path, n_layers: int) -> Float[Tensor, "layer d_model"]:
    """A `refusal_vector.pt`: one row per layer 0..n_layers.

    Raises:
        UserError: it has another shape.
    """
    found = read_tensors(path)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != n_layers + 1:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"{path} must hold [n_layers + 1, d_model] = [{n_layers + 1}, ...], row l the stream entering block l; "
            f"found {shape} (with only n_layers rows it is unclear which end is missing: rewrite it with the "
            "embedding row, or make it again with refusal-mi vector)"
        )
    return found.float()


def row_direction(vectors: Float[Tensor, "layer d_model"], layer: int) -> Direction:
    """Row `layer` with the hook point that it was read from."""
    return Direction(vectors[layer].clone(), layer, resid_hook(layer, len(vectors) - 1))


def _write_responses(
    model: HookedModel, chat: ChatFormat, queries: PromptSet, options: VectorOptions, path: Path
) -> None:
    if options.response_prefix is None:
        prefix = discover_response_prefix(model, chat, queries.instructions[:8])
        chat = chat.with_response_prefix(prefix)
    tokens: dict[str, Any] = {"response_prefix": chat.response_prefix}
    for file, side, instructions in zip(RESPONSES, _SIDES, ([""], options.refusal_instructions), strict=True):
        rows: list[dict[str, str]] = []
        tokens[side] = []
        for index, prefix in enumerate(instructions):
            asked = [text for text in queries.instructions for _ in range(options.n_completions)]
            prompts = [prefix + text for text in asked]
            answers = generate(
                model,
                chat,
                prompts,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                sampling=replace(_SAMPLING, seed=options.seed + _SIDES.index(side) + index),
                description=f"{side} responses",
            )
            tokens[side] += [{"instruction_index": index, "token_ids": list(answer.token_ids)} for answer in answers]
            rows += [
                {"instruction": text, "prompt": prompt, "response": answer.text}
                for text, prompt, answer in zip(asked, prompts, answers, strict=True)
            ]
        write_json(path / file, rows)
    write_json(path / TOKENS, tokens)


def _write_vector(
    model: HookedModel,
    chat: ChatFormat,
    options: VectorOptions,
    layers: Sequence[int],
    judge: Judge,
    folder: RunFolder,
) -> None:
    for stale in (VECTOR, "metadata.json"):  # nothing of other responses may stay where none survive
        (folder.path / stale).unlink(missing_ok=True)
    tokens = read_json(folder.path / TOKENS)
    chat = chat.with_response_prefix(tokens["response_prefix"])
    all_rows = [read_json(folder.path / file) for file in RESPONSES]
    flags = [passes(rows, tokens[side], side, judge) for rows, side in zip(all_rows, _SIDES, strict=True)]
    kept = [
        [row for row, keep in zip(rows, passed, strict=True) if keep]
        for rows, passed in zip(all_rows, flags, strict=True)
    ]
    for file, rows in zip(KEPT, kept, strict=True):
        write_json(folder.path / file, rows)
    notes = [
        warn_of_few(side, rows, passed, options.max_new_tokens)
        for side, rows, passed in zip(_SIDES, all_rows, kept, strict=True)
    ]
    for note in filter(None, notes):
        folder.report(f"warning: {note}")
    spans, weights = [], []
    for side, rows, passed, sign in zip(_SIDES, all_rows, flags, (-1.0, 1.0), strict=True):
        found = [(row, entry) for row, entry, keep in zip(rows, tokens[side], passed, strict=True) if keep]
        groups = [entry["instruction_index"] for _, entry in found]
        spans += [_span(chat.encode(row["prompt"]), entry["token_ids"], options.token_weights) for row, entry in found]
        weights += [sign / (len(set(groups)) * groups.count(group)) for group in groups]
    combined = combine_spans(
        model,
        spans,
        torch.tensor([weights], dtype=torch.float64),
        pad_id=chat.pad_id,
        normalize=options.normalize,
        batch_size=options.batch_size,
    )[0]
    result = torch.zeros_like(combined)
    result[list(layers)] = combined[list(layers)]
    write_tensors(folder.path / VECTOR, result.float())
    write_json(
        folder.path / "metadata.json", _metadata(model, chat, options, layers, judge, all_rows, kept, result, notes)
    )


def _span(prompt: Sequence[int], response: Sequence[int], token_weights: str) -> Span:
    end = len(prompt) + (1 if token_weights == "first" else len(response))
    return Span((*prompt, *response), len(prompt), end)


def _metadata(
    model: HookedModel,
    chat: ChatFormat,
    options: VectorOptions,
    layers: Sequence[int],
    judge: Judge,
    all_rows: Sequence[Sequence[Any]],
    kept: Sequence[Sequence[Any]],
    result: Float[Tensor, "layer d_model"],
    notes: Sequence[str | None],
) -> dict[str, Any]:
    n_layers = model.cfg.n_layers
    (n_compliant, n_refusal), (kept_compliant, kept_refusal) = map(len, all_rows), map(len, kept)
    return {
        "n_queries": options.n_samples,
        "n_completions_per_query": options.n_completions,
        "n_compliant_responses_generated": n_compliant,
        "n_refusal_responses_generated": n_refusal,
        "n_compliant_responses_kept": kept_compliant,
        "n_refusal_responses_kept": kept_refusal,
        "compliant_filter_rate": kept_compliant / n_compliant,
        "refusal_filter_rate": kept_refusal / n_refusal,
        "seed": options.seed,
        "vector_shape": list(result.shape),
        "method": "mean over refusing responses - mean over compliant responses, each averaged over its tokens",
        "hook_names": [resid_hook(layer, n_layers) for layer in range(n_layers + 1)],
        "norms": result.norm(dim=-1).tolist(),
        "dataset": options.dataset,
        "column": options.column,
        "refusal_instructions": list(options.refusal_instructions),
        "token_weights": options.token_weights,
        "normalize": options.normalize,
        "layers": list(layers),
        "judge": judge.name,
        "sampling": {
            **asdict(_SAMPLING),
            "seed": options.seed,
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
        },
        "chat": chat.record(),
        "warnings": [note for note in notes if note],
    }


def _checked_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers + 1))
    for layer in layers:
        resid_hook(layer, n_layers)
    return sorted(set(layers))
