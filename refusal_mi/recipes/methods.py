"""One direction or several, by which method: each chosen on validation prompts, compared at equal refusal on others."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..errors import UserError
from ..estimators.names import FITTED, POOLS
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_json, write_record, write_tensors
from ..interventions import Ablate
from ..measures import ScoredText, ce_loss, texts_to_score
from ..model.points import write_hooks
from ..model.provenance import ModelRecord, check_same_weights, describe_model, versions
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.methods import FILE, AtStrength, ControlRow, MethodRow, MethodsResult
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.localize import expected_refused
from ..search.methods import CLOSE, STRENGTHS, Curve, common_target, crossing_ends, match, overlap
from ..search.passes import Basis
from ..search.removals import RemovalScorer
from ..stats import Paired, Rate, mean_interval
from ..text.prompts import load_prompts
from ..values import Value
from .localize import KL_TOKENS, NEW_TOKENS, judged_answers, removal_scorer
from .search import named_estimator
from .spans import NoDirections, Spans

REFERENCE, N_PLACES, N_RANDOM = "mean", 4, 5
AS_FEW = 0.5
"""Prompts by which a place may leave more refusals than the run's own direction and still count as leaving as few."""
N_TEXTS = 64
"""Plain texts that CE is measured on."""


@dataclass(frozen=True, eq=False, repr=False)
class _Chosen(Value):
    """`{label}/chosen.json`; the basis lies beside it."""

    layer: int
    position: int | None
    expected: float
    kl_nats: float
    """On validation prompts."""


@dataclass(frozen=True, eq=False, repr=False)
class _HeldOut(Value):
    """`{label}/held_out.json`: every prompt at every strength, and at more where the share falls to the target."""

    strengths: tuple[float, ...]
    refused: tuple[tuple[bool, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    kl: tuple[tuple[float, ...], ...]

    @property
    def curve(self) -> Curve:
        """Of as many prompts of each side as there are of both."""
        tables = (torch.tensor(each, dtype=torch.float64) for each in (self.refused, self.kl))
        return Curve(self.strengths, *tables).of_first(min(len(self.refused[0]), len(self.kl[0])))

    def with_more(self, other: "_HeldOut") -> "_HeldOut":
        """Both, in the order of their strengths."""
        names = ("strengths", "refused", "scores", "kl")
        tables = [zip(*(getattr(each, name) for name in names), strict=True) for each in (self, other)]
        return _HeldOut(*zip(*sorted(row for table in tables for row in table), strict=True))

    def at_strengths(self, zero: float) -> tuple[AtStrength, ...]:
        rows = zip(self.strengths, self.refused, self.scores, self.kl, strict=True)
        return tuple(
            AtStrength(strength, Rate.of(refused), Rate.of([score > zero for score in scores]), mean_interval(list(kl)))
            for strength, refused, scores, kl in rows
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Answers(Value):
    refused: tuple[bool, ...]
    degenerate: tuple[bool, ...]
    ce_loss: float


def compare_methods(
    run: RunInputs,
    methods: Sequence[tuple[str, int]],
    *,
    folder: RunFolder | None = None,
    kl_tokens: int = KL_TOKENS,
    n_places: int = N_PLACES,
    n_random: int = N_RANDOM,
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int | None = None,
) -> MethodsResult:
    """Remove the directions of every method, and say what each costs where all leave as many refusals.

    Directions are estimated from the training prompts of a finished run, at the best places of its search. For every
    method the place with the least KL among those that stop as many validation prompts' refusals as the run's own
    direction is taken. On held-out prompts, used once, its span is removed at several strengths; the costs are
    compared at equal refusal with that of one difference of means (`search.methods.match`), and the answers there are
    judged. Beside them: random subspaces of the same rank, and spans of differences within one class.

    Args:
        methods: names and how many directions, as `estimators.names.parse_methods` reads them.
        folder: where stages are kept, so that what was killed goes on; `RUN/methods` by default.
        kl_tokens: over how many tokens of the plain model's answers the KL goes.
        n_places: how many layers are tried: those of the search's survivors, each at its best position, then those
            next to the run's own.

    Raises:
        UserError: the run chose no direction, or a method does not exist.
    """
    work = _Comparison(run, folder or RunFolder(run.path / "methods"), kl_tokens, n_places, max_new_tokens, batch_size)
    asked = dict.fromkeys([(REFERENCE, 1), *methods])
    check_same_weights(read_record(run.path / RUN, RunInfo).model, run.model, str(run.path))
    chosen: dict[str, _Chosen] = {}
    skipped: dict[str, str] = {}
    for name, k in asked:
        label = f"{name}:{k}"
        try:
            chosen[label] = work.chosen(name, k)
        except NoDirections as error:
            skipped[label] = str(error)
    reference = f"{REFERENCE}:1"
    if reference not in chosen:
        raise UserError(f"{run.path}: the difference of means gives no direction to compare with")
    bases = {label: work.basis(label) for label in chosen}
    plain_short, first = work.plain_refused(), None
    measured: dict[str, _HeldOut] = {}
    for label, basis in bases.items():
        measured[label] = work.held_out_of(label, basis, plain_short, first)
        first = measured[label].curve if first is None else first
    assert first is not None
    singles = {label: f"{label.rpartition(':')[0]}:1" for label, basis in bases.items() if len(basis) > 1}
    pairs = [(label, reference) for label in bases]
    pairs += [(label, single) for label, single in singles.items() if single in bases]
    targets: dict[str, set[float]] = {label: set() for label in bases}
    for label, other in pairs:
        target = common_target(measured[label].curve, measured[other].curve, first).item()
        if target > first.target.item():
            targets[label].add(target)
            targets[other].add(target)
    for label in [each for each in bases if targets[each]]:
        measured[label] = work.nearer(label, bases[label], plain_short, measured[label], sorted(targets[label]))
    curves = {label: each.curve for label, each in measured.items()}
    matches = {label: match(curves[label], curves[reference]) for label in curves}
    over = {
        label: match(curves[label], curves[single], curves[reference]).ratio for label, single in pairs[len(bases) :]
    }
    read_at = {label: 1.0 if each.strength is None else each.strength for label, each in matches.items()}
    answers = {label: work.answers(label, bases[label], read_at[label]) for label in chosen}
    plain = work.answers("plain", None, 0.0)
    ranks = sorted({len(basis) for basis in bases.values()})
    result = MethodsResult(
        read_record(run.path / RUN, RunInfo).model,
        kl_tokens,
        work.zero,
        work.validation.n_harmful,
        first.refused.shape[1],
        Rate.of(plain.refused),
        first.target.item(),
        tuple(
            MethodRow(
                label,
                len(bases[label]),
                each.layer,
                each.position,
                measured[label].at_strengths(work.zero),
                matches[label],
                over.get(label, (None, None, None)),
                read_at[label],
                Rate.of(answers[label].refused),
                Rate.of(answers[label].degenerate),
                Paired.of(answers[reference].refused, answers[label].refused).describe(),
                answers[label].ce_loss - plain.ce_loss,
            )
            for label, each in chosen.items()
        ),
        work.controls(ranks, n_random),
        tuple(tuple(overlap(a, b) for b in bases.values()) for a in bases.values()),
        run.model.cfg.d_model,
        skipped,
    )
    write_record(work.folder.path / FILE, result)
    return result


def check_methods(methods: Sequence[tuple[str, int]]) -> None:
    """Make sure that every method is there, before a model is loaded.

    Raises:
        UserError: a function of the user's own cannot be imported, or there is no such estimator.
    """
    for name, _ in methods:
        if name not in (*POOLS, *FITTED):
            named_estimator(name)


@dataclass
class _Comparison:
    """The stages: each written whole, and kept while what it was computed from is the same."""

    run: RunInputs
    folder: RunFolder
    kl_tokens: int
    n_places: int
    max_new_tokens: int
    batch_size: int | None
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def zero(self) -> float:
        return self.run.record.zero_point_nats or 0.0

    @cached_property
    def validation(self) -> RemovalScorer:
        return removal_scorer(self.spans.run, "val", self.kl_tokens, self.batch_size)

    @cached_property
    def held_out(self) -> RemovalScorer:
        return removal_scorer(self.run, "test", self.kl_tokens, self.batch_size)

    @cached_property
    def model(self) -> ModelRecord:
        """The weights that are held."""
        run = self.run
        return describe_model(run.model, read_record(run.path / RUN, RunInfo).model.source)

    @cached_property
    def spans(self) -> Spans:
        """What is removed."""
        return Spans(self.run, self.n_places, self._checkpoint)

    def _checkpoint(self, label: str) -> Path:
        """The file that a fit goes on from."""
        path = self.folder.path / _folder(label) / f"checkpoint-{sha256_json(self.inputs)[:16]}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.fresh:
            path.unlink(missing_ok=True)
        return path

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every stage depends on."""
        run = self.run
        files = [MEAN_DIFFS, EVALUATIONS, DIRECTION, PROMPTS]
        return {
            "model": self.model,
            "chat": run.chat.record(),
            "versions": versions(),
            "files": {file: sha256_file(run.path / file) for file in files},
            "prompts": {side: sha256_json(self.run.prompts(side)) for side in SIDES},
            "thresholds": asdict(run.options.thresholds),
            "kl_tokens": self.kl_tokens,
        }

    def chosen(self, name: str, k: int) -> _Chosen:
        """The best place of a method on validation prompts."""
        label = f"{name}:{k}"
        where = f"{_folder(label)}/chosen.json", f"{_folder(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.spans.places, "as_few": AS_FEW}
        if ":" in name:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed

        def compute() -> None:
            try:
                trials = self.spans.trials(name, k)
            except UserError as error:
                raise NoDirections(str(error)) from error
            whole = [dict.fromkeys(write_hooks(self.run.model.cfg.n_layers), 1.0)] * (len(trials) + 1)
            bases = [self.run.direction.unit[None], *(basis for _, basis in trials)]
            scorer = self.validation
            scores = scorer.score(bases, whole, range(scorer.n_harmful))
            kl = scorer.kl(bases, whole, range(scorer.n_harmless)).mean(-1)
            shares = expected_refused(scores, self.zero)
            more = (shares - shares[0] - AS_FEW / scores.shape[1]).clamp(min=0)
            best = min(range(1, len(bases)), key=lambda i: (more[i].item(), kl[i].item()))
            (position, layer), basis = trials[best - 1]
            write_tensors(self.folder.path / where[1], basis)
            write_record(self.folder.path / where[0], _Chosen(layer, position, shares[best].item(), kl[best].item()))

        about = f"{k} direction{'s' * (k > 1)} at up to {len(self.spans.places)} places, validation prompts"
        done = self.folder.stage(f"{_folder(label)}-chosen", inputs, where, compute, about=about)
        self.hashes[label] = done[where[1]]
        return read_record(self.folder.path / where[0], _Chosen)

    def basis(self, label: str) -> Basis:
        """What a method removes."""
        basis: Tensor = read_tensors(self.folder.path / f"{_folder(label)}/basis.pt")
        return basis

    def held_out_of(self, label: str, basis: Basis, plain: tuple[bool, ...], reference: Curve | None) -> _HeldOut:
        """Answers, scores and KL of held-out prompts at every strength.

        And at more of them where the share of refusals falls to the reference's target: between two strengths of the
        first it may fall from all to none.
        """
        where = f"{_folder(label)}/held_out.json"
        target = None if reference is None else reference.target.item()

        def compute() -> None:
            found = self._at(basis, plain, (0.0, *STRENGTHS))
            found = self._halved(found, basis, plain, found.curve.target.item() if target is None else target)
            write_record(self.folder.path / where, found)

        about = f"{len(STRENGTHS)} strengths and more between, held-out prompts"
        inputs = self._held_out_inputs(label) | {"target": target}
        self.folder.stage(f"{_folder(label)}-held-out", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _HeldOut)

    def nearer(
        self, label: str, basis: Basis, plain: tuple[bool, ...], found: _HeldOut, targets: Sequence[float]
    ) -> _HeldOut:
        """What was measured, and more strengths where the share of refusals falls to each of the targets."""
        where = f"{_folder(label)}/nearer.json"

        def compute() -> None:
            more = found
            for target in targets:
                more = self._halved(more, basis, plain, target)
            write_record(self.folder.path / where, more)

        about = f"strengths where {', '.join(f'{each:.2f}' for each in targets)} are refused, held-out prompts"
        inputs = self._held_out_inputs(label) | {"targets": targets, "before": found.strengths}
        self.folder.stage(f"{_folder(label)}-nearer", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _HeldOut)

    def _held_out_inputs(self, label: str) -> dict[str, Any]:
        return self.inputs | {
            "basis": self.hashes[label],
            "strengths": STRENGTHS,
            "close": CLOSE,
            "n": self.run.options.label_tokens,
        }

    def _halved(self, found: _HeldOut, basis: Basis, plain: tuple[bool, ...], target: float) -> _HeldOut:
        """With strengths halfway between those around a target, until they are close."""
        while True:
            ends = crossing_ends(found.curve, target)
            if ends is None or ends[1] - ends[0] < CLOSE:
                return found
            found = found.with_more(self._at(basis, plain, [sum(ends) / 2]))

    def _at(self, basis: Basis, plain: tuple[bool, ...], strengths: Sequence[float]) -> _HeldOut:
        """Answers, scores and KL of held-out prompts."""
        scorer, names = self.held_out, write_hooks(self.run.model.cfg.n_layers)
        answered = judged_answers(self.run, self.run.prompts("harmful"), self.run.options.label_tokens)
        weights, bases = [dict.fromkeys(names, each) for each in strengths], [basis] * len(strengths)
        scores = scorer.score(bases, weights, range(scorer.n_harmful)).tolist()
        kl = scorer.kl(bases, weights, range(scorer.n_harmless)).tolist()
        refused = [plain if each == 0 else answered([Ablate(basis, each)]).refused for each in strengths]
        return _HeldOut(tuple(strengths), tuple(refused), tuple(map(tuple, scores)), tuple(map(tuple, kl)))

    def plain_refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each held-out prompt, in a short answer."""
        where, n_tokens = "plain.json", self.run.options.label_tokens

        def compute() -> None:
            judged = judged_answers(self.run, self.run.prompts("harmful"), n_tokens)([])
            write_json(self.folder.path / where, judged.refused)

        self.folder.stage("plain", self.inputs | {"n": n_tokens}, [where], compute, about="short answers")
        return read_record(self.folder.path / where, tuple[bool, ...])  # type: ignore[no-any-return]

    def answers(self, label: str, basis: Basis | None, strength: float) -> _Answers:
        """Judged answers to the held-out harmful prompts, and CE on plain texts."""
        where = f"{_folder(label)}/answers.json"

        def compute() -> None:
            run = self.run
            steps = [] if basis is None else [Ablate(basis, strength)]
            judged = judged_answers(run, self.run.prompts("harmful"), self.max_new_tokens)(steps)
            loss = ce_loss(run.model, run.chat, self._texts(), interventions=steps)
            record = _Answers(judged.refused, judged.degenerate, loss.ce_loss)
            write_record(self.folder.path / where, record)

        inputs = self.inputs | {"basis": self.hashes.get(label), "strength": strength, "n": self.max_new_tokens}
        inputs |= {"texts": self.run.options.text_set, "seed": self.run.options.seed}
        about = f"answers of {self.max_new_tokens} tokens and CE at strength {strength:.3g}"
        self.folder.stage(f"{_folder(label)}-answers", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _Answers)

    def controls(self, ranks: Sequence[int], n_random: int) -> tuple[ControlRow, ...]:
        """Subspaces that no method chose, whole, on held-out prompts."""
        where = "controls.json"

        def compute() -> None:
            named = [(name, len(basis), seed, basis) for name, seed, basis in self.spans.controls(ranks, n_random)]
            whole = [dict.fromkeys(write_hooks(self.run.model.cfg.n_layers), 1.0)] * len(named)
            bases, scorer = [basis for *_, basis in named], self.held_out
            shares = expected_refused(scorer.score(bases, whole, range(scorer.n_harmful)), self.zero).tolist()
            kl = scorer.kl(bases, whole, range(scorer.n_harmless)).mean(-1).tolist()
            rows = [ControlRow(*each[:3], *numbers) for each, *numbers in zip(named, shares, kl, strict=True)]
            write_record(self.folder.path / where, _Controls(tuple(rows)))

        inputs = self.inputs | {"ranks": ranks, "n_random": n_random}
        about = f"{n_random} random subspaces and 2 within a class of each of {len(ranks)} ranks"
        self.folder.stage("controls", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _Controls).rows

    def _texts(self) -> list[ScoredText]:
        run = self.run
        texts = load_prompts(run.options.text_set, limit=N_TEXTS)
        return texts_to_score(run.chat, texts.sample(min(N_TEXTS, len(texts)), run.options.seed).instructions)


@dataclass(frozen=True, eq=False, repr=False)
class _Controls(Value):
    rows: tuple[ControlRow, ...]


def _folder(label: str) -> str:
    return re.sub(r"\W+", "-", label)
