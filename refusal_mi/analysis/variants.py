"""Where another wording of a request acts: refusals, the direction in the stream, and what the heads read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_record, write_tensors
from ..generation import generate
from ..judges.named import check_says_refusal, identify, refused
from ..judges.substring import Judge, SubstringJudge, blind_spot, is_degenerate
from ..measures import refusal_scores
from ..model.provenance import ModelRecord, describe_model, versions
from ..precision import as_double
from ..reading import stream_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.record import DIRECTION, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..run.variants import FILE, Change, Grid, SideRow, VariantRow, VariantsResult, Wording
from ..stats import Paired, Rate, holm, mean_interval
from ..text.batches import with_smaller_batches
from ..text.chat import ChatFormat
from ..text.variants import PARTS, PLAIN, Parts, Variant, checked_variants, folder_name, label_parts, neutral
from ..values import Value
from .attribution import top_heads
from .result import template_tokens
from .sources import split_by_source

N_HEADS, NEW_TOKENS, N_HEADS_PROMPTS = 8, 64, 64
_N_WORDS, _N_BEGINNINGS = 3, 3


@dataclass(frozen=True, eq=False, repr=False)
class _Read(Value):
    """`{variant}/{side}.json`: what was read of every prompt; the projections lie beside it."""

    refused: tuple[bool, ...]
    degenerate: tuple[bool, ...]
    first_words: tuple[str, ...]
    scores: tuple[float, ...]
    attention: Mapping[str, tuple[float, ...]]
    written: Mapping[str, tuple[float, ...]]
    n_tokens: Mapping[str, tuple[int, ...]]
    n_shared: int
    caution: str | None


@dataclass(frozen=True)
class _Prompts:
    """Requests in one wording; the chat format has the wording's system message."""

    chat: ChatFormat
    texts: tuple[str, ...]
    parts: tuple[Parts, ...]


_Measured = tuple[_Read, Float[Tensor, "unit prompt pos layer"]]
"""And ⟨x, unit⟩ at the template positions: of the direction and of a random one."""


def variants(
    run: RunInputs,
    variants: Sequence[Variant],
    *,
    folder: RunFolder | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int | None = None,
) -> VariantsResult:
    """Ask a run's held-out requests, harmful and harmless, in other wordings, and say what that does and where.

    Of every wording: refused answers by text, the refusal score, the projection on the run's direction at every
    template position and layer, and what the heads that write the direction at the last position read it from, by part
    of the prompt. All are compared with the plain requests, prompt by prompt. The control of a variant has as many
    tokens of everyday words, drawn at random, in place of its own; that of the direction is a random one.

    Args:
        folder: where stages are kept, so that what was killed goes on; `RUN/variants` by default.
        judge: says what a refusal is (of three classes, "refuse" alone counts); by default
            the one that looks for English phrases.
        batch_size: prompts per pass; None: as many as the memory holds.

    Raises:
        UserError: the judge is one of harm; the run chose no direction; two variants have one name; the chat template
            has no system message; the parts of a prompt cannot be told.
    """
    asked = checked_variants(variants)
    if judge is not None:
        check_says_refusal(judge)
    work = _Work(run, folder or RunFolder(run.path / "variants"), judge or SubstringJudge(), max_new_tokens, batch_size)
    RunFolder(run.path).check_weights(work.model)
    wanted = {(each.name, is_control): work.worded(each, is_control) for each in asked for is_control in (False, True)}
    heads = work.heads()
    plain = {side: work.measured(PLAIN, side, work.plain(side), heads) for side in SIDES}
    read = {
        (name, is_control): {
            side: work.measured(folder_name(name), f"control-{side}" if is_control else side, prompts[side], heads)
            for side in SIDES
        }
        for (name, is_control), prompts in wanted.items()
    }
    sides: dict[str, dict[str, SideRow]] = {each.name: {} for each in asked}
    for side in SIDES:
        given, control = ([read[each.name, is_control][side] for each in asked] for is_control in (False, True))
        changes = [
            _changes([plain[side]] * len(asked), given),
            _changes([plain[side]] * len(asked), control),
            _changes(control, given),
        ]
        for name, one, other, *change in zip(sides, given, control, *changes, strict=True):
            sides[name][side] = SideRow(_wording(one), _wording(other), *change)
    named = {PLAIN: plain} | {name: of_sides for (name, is_control), of_sides in read.items() if not is_control}
    cautions = tuple(
        f"{name}, {side}: {of_side[0].caution}"
        for name, of_sides in named.items()
        for side, of_side in of_sides.items()
        if of_side[0].caution
    )
    result = VariantsResult(
        read_record(run.path / RUN, RunInfo).model,
        run.direction.layer,
        run.direction.position,
        run.chat.positions,
        template_tokens(run.chat),
        heads,
        {side: len(work.asked(side)) for side in SIDES},
        max_new_tokens,
        run.seed,
        {side: _wording(plain[side]) for side in SIDES},
        tuple(VariantRow(each, sides[each.name]) for each in asked),
        work.judge.name,
        cautions,
    )
    write_record(work.folder.path / FILE, result)
    return result


@dataclass
class _Work:
    """The stages: each written whole, and kept while what it was computed from is the same."""

    run: RunInputs
    folder: RunFolder
    judge: Judge
    max_new_tokens: int
    batch_size: int | None

    @cached_property
    def model(self) -> ModelRecord:
        """The weights that are held."""
        return describe_model(self.run.model, read_record(self.run.path / RUN, RunInfo).model.source)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every stage depends on."""
        run = self.run
        files = {file: sha256_file(run.path / file) for file in (DIRECTION, PROMPTS)}
        shared = {"model": self.model, "chat": run.chat.record(), "versions": versions(), "files": files}
        return shared | {"seed": run.seed, "prefixes": run.refusal_prefixes, "judge": identify(self.judge)}

    @cached_property
    def units(self) -> Float[Tensor, "unit d_model"]:
        """The direction, and a random one."""
        direction = self.run.direction
        return torch.stack([direction.unit.double(), direction.random_like(self.run.seed).unit.double()])

    def asked(self, side: str) -> list[str]:
        return self.run.prompts(side, "test")

    def plain(self, side: str) -> _Prompts:
        """The requests as they stand."""
        return self._prompts(side, [None] * len(self.asked(side)))

    def worded(self, variant: Variant, is_control: bool) -> dict[str, _Prompts]:
        """The requests of both sides in a variant, or in its control."""
        found: dict[str, _Prompts] = {}
        for side in SIDES:
            n = len(self.asked(side))
            each = [neutral(variant, self._n_tokens, self.run.seed, at) for at in range(n)] if is_control else None
            found[side] = self._prompts(side, each or [variant] * n)
        return found

    def heads(self) -> tuple[tuple[int, int], ...]:
        """Those that write most along the direction on prompts that are used for nothing else here."""
        prompts = self.run.prompts("harmful", "val")[:N_HEADS_PROMPTS]

        def compute() -> None:
            run = self.run
            found = with_smaller_batches(
                lambda size: top_heads(run.model, run.chat, run.direction, prompts, N_HEADS, batch_size=size),
                self.batch_size,
            )
            write_record(self.folder.path / "heads.json", _Heads(found))

        inputs = self.inputs | {"prompts": sha256_json(prompts), "n": N_HEADS}
        self.folder.stage("heads", inputs, ["heads.json"], compute, about="heads that write the direction")
        return read_record(self.folder.path / "heads.json", _Heads).heads

    def measured(self, wording: str, side: str, prompts: _Prompts, heads: Sequence[tuple[int, int]]) -> _Measured:
        """What the model does with the requests of a side in one wording, kept in the wording's folder."""
        where = f"{wording}/{side}.json", f"{wording}/{side}.pt"

        def compute() -> None:
            read, table = with_smaller_batches(lambda size: self._measure(prompts, heads, size), self.batch_size)
            write_tensors(self.folder.path / where[1], table)
            write_record(self.folder.path / where[0], read)

        inputs = self.inputs | {"texts": sha256_json(prompts.texts), "system": prompts.chat.system, "heads": heads}
        inputs |= {"n": self.max_new_tokens, "parts": sha256_json([each.labels for each in prompts.parts])}
        about = f"{len(prompts.texts)} answers of {self.max_new_tokens} tokens"
        self.folder.stage(f"{wording}.{side}", inputs, where, compute, about=about)
        return read_record(self.folder.path / where[0], _Read), read_tensors(self.folder.path / where[1])

    def _prompts(self, side: str, wordings: Sequence[Variant | None]) -> _Prompts:
        systems = {each.system for each in wordings if each is not None and each.system is not None}
        chat = replace(self.run.chat, system=systems.pop()) if systems else self.run.chat
        asked, name = self.asked(side), next((each.name for each in wordings if each is not None), PLAIN)
        try:
            parts = label_parts(chat, asked, wordings)
        except UserError as error:
            raise UserError(f"{name!r}: {error}") from None
        end = self.run.chat.post_instruction_ids
        if any(each.token_ids[-len(end) :] != end or set(each.labels[-len(end) :]) != {"template"} for each in parts):
            raise UserError(
                f"{name!r} runs into the tokens that the chat template puts after the user's message, where the "
                "direction was read: let it end in another character"
            )
        pairs = zip(asked, wordings, strict=True)
        texts = tuple(instruction if wording is None else wording.wrap(instruction) for instruction, wording in pairs)
        return _Prompts(chat, texts, tuple(parts))

    def _n_tokens(self, text: str) -> int:
        return len(self.run.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _measure(
        self, prompts: _Prompts, heads: Sequence[tuple[int, int]], size: int
    ) -> tuple[_Read, Float[Tensor, "unit prompt pos layer"]]:
        run, chat, texts = self.run, prompts.chat, prompts.texts
        made = generate(run.model, chat, texts, max_new_tokens=self.max_new_tokens, batch_size=size)
        answers = [each.text for each in made]
        scores = refusal_scores(run.model, chat, texts, run.refusal_prefixes, batch_size=size)
        rows = [each.token_ids for each in prompts.parts]
        unit = run.direction.unit
        written, pattern = split_by_source(
            run.model, rows, unit, heads, pad_id=chat.pad_id, position=-1, batch_size=max(1, size // 4)
        )
        attention, along = (
            {part: _of_part(table, prompts.parts, part) for part in PARTS}
            for table in (pattern.mean(1), written.sum(1))
        )
        read = _Read(
            tuple(refused(self.judge, texts, answers)),
            tuple(map(is_degenerate, answers)),
            tuple(" ".join(each.split()[:_N_WORDS]) for each in answers),
            tuple(scores.tolist()),
            attention,
            along,
            {part: tuple(each.count(part) for each in prompts.parts) for part in PARTS},
            sum(each.n_shared > 0 for each in prompts.parts),
            blind_spot(self.judge, texts, answers),
        )
        return read, self._projected(prompts, size)

    def _projected(self, prompts: _Prompts, size: int) -> Float[Tensor, "unit prompt pos layer"]:
        model, n_positions = self.run.model, len(self.run.chat.positions)
        table = torch.empty(2, len(prompts.texts), n_positions, model.cfg.n_layers + 1, dtype=torch.float64)
        stream = stream_residuals(model, prompts.chat, prompts.texts, n_last=n_positions, batch_size=size)
        for indices, residuals in stream:
            for layer in range(residuals.shape[2]):
                x = as_double(residuals[:, :, layer])
                table[:, indices, :, layer] = torch.einsum("bpd,kd->kbp", x, self.units.to(x)).double().cpu()
        return table


@dataclass(frozen=True)
class _Heads:
    heads: tuple[tuple[int, int], ...]


def _of_part(table: Float[Tensor, "prompt pos"], parts: Sequence[Parts], part: str) -> tuple[float, ...]:
    """Sums over the tokens of a part; rows are padded on the left."""
    inside = [torch.tensor([label == part for label in each.labels], dtype=table.dtype) for each in parts]
    return tuple((row[-len(mask) :] @ mask).item() for row, mask in zip(table, inside, strict=True))


def _wording(measured: _Measured) -> Wording:
    read, table = measured
    beginnings = Counter(read.first_words).most_common(_N_BEGINNINGS)
    return Wording(
        Rate.of(read.refused),
        Rate.of(read.degenerate),
        mean_interval(read.scores),
        _grid(table[0]),
        _grid(table[1]),
        {part: mean_interval(values) for part, values in read.attention.items()},
        {part: mean_interval(values) for part, values in read.written.items()},
        {part: sum(values) / len(values) for part, values in read.n_tokens.items()},
        read.n_shared,
        dict(beginnings),
    )


def _changes(before: Sequence[_Measured], after: Sequence[_Measured]) -> list[Change]:
    """What each of `after` changes, with p-values adjusted over all of them."""
    pairs = [Paired.of(one.refused, other.refused) for (one, _), (other, _) in zip(before, after, strict=True)]
    found = []
    for (one, old), (other, new), paired, p in zip(
        before, after, pairs, holm([each.p_value for each in pairs]), strict=True
    ):
        score = mean_interval([b - a for a, b in zip(one.scores, other.scores, strict=True)])
        found.append(Change(paired.describe(), p, score, _grid(new[0] - old[0]), _grid(new[1] - old[1])))
    return found


def _grid(table: Float[Tensor, "prompt pos layer"]) -> Grid:
    return tuple(
        tuple(mean_interval(table[:, pos, layer].tolist()) for layer in range(table.shape[2]))
        for pos in range(table.shape[1])
    )
