"""One direction or several, by which method: each chosen on validation prompts, compared at equal refusal on others."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from ..engine.jobs import Engine
from ..errors import UserError
from ..estimators.names import FITTED, POOLS
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_json, write_record, write_tensors
from ..measures import texts_to_score
from ..model.provenance import ModelRecord, check_same_weights, describe_model, versions
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.methods import FILE, ControlRow, MethodRow, MethodsResult
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.localize import expected_refused
from ..search.methods import CLOSE, STRENGTHS, Curve, common_target, match, overlap
from ..search.passes import Basis
from ..stats import Paired, Rate
from ..text.prompts import load_prompts
from ..values import Value
from .localize import KL_TOKENS, NEW_TOKENS
from .pieces import Piece, Pieces
from .removing import Answers, HeldOut, Removing, Task
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
    engine: Engine | None = None,
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
        engine: where methods are measured, each stage of each as one item, the reference first; None is here.
            Directions are estimated and fitted here.

    Raises:
        UserError: the run chose no direction, or a method does not exist.
    """
    folder = folder or RunFolder(run.path / "methods")
    work = _Comparison(run, folder, kl_tokens, n_places, max_new_tokens, batch_size, engine)
    asked = dict.fromkeys([(REFERENCE, 1), *methods])
    check_same_weights(read_record(run.path / RUN, RunInfo).model, run.model, str(run.path))
    chosen, skipped = work.chosen(list(asked))
    reference = f"{REFERENCE}:1"
    if reference not in chosen:
        raise UserError(f"{run.path}: the difference of means gives no direction to compare with")
    bases = {label: work.basis(label) for label in chosen}
    plain_short = work.plain_refused()
    measured = work.held_out_of({reference: bases[reference]}, plain_short, None)
    first = measured[reference].curve
    others = {label: basis for label, basis in bases.items() if label != reference}
    measured |= work.held_out_of(others, plain_short, first)
    singles = {label: f"{label.rpartition(':')[0]}:1" for label, basis in bases.items() if len(basis) > 1}
    pairs = [(label, reference) for label in bases]
    pairs += [(label, single) for label, single in singles.items() if single in bases]
    targets: dict[str, set[float]] = {label: set() for label in bases}
    for label, other in pairs:
        target = common_target(measured[label].curve, measured[other].curve, first).item()
        if target > first.target.item():
            targets[label].add(target)
            targets[other].add(target)
    measured |= work.nearer(
        bases, plain_short, measured, {each: sorted(some) for each, some in targets.items() if some}
    )
    curves = {label: each.curve for label, each in measured.items()}
    matches = {label: match(curves[label], curves[reference]) for label in curves}
    over = {
        label: match(curves[label], curves[single], curves[reference]).ratio for label, single in pairs[len(bases) :]
    }
    read_at = {label: 1.0 if each.strength is None else each.strength for label, each in matches.items()}
    answers = work.answers({**{label: (bases[label], read_at[label]) for label in chosen}, "plain": (None, 0.0)})
    plain = answers["plain"]
    ranks = sorted({len(basis) for basis in bases.values()})
    result = MethodsResult(
        read_record(run.path / RUN, RunInfo).model,
        kl_tokens,
        work.zero,
        len(work.spans.run.prompts("harmful", "val")),
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
    engine: Engine | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def zero(self) -> float:
        return self.run.record.zero_point_nats or 0.0

    @cached_property
    def validation(self) -> Pieces:
        """What is measured on validation prompts."""
        job = Removing.of(self.spans.run, "val", self.kl_tokens, self.batch_size, self.max_new_tokens)
        return Pieces(self.folder, job, self.run.model, self.engine)

    @cached_property
    def held_out(self) -> Pieces:
        """What is measured on held-out prompts."""
        run = self.run
        texts = load_prompts(run.options.text_set, limit=N_TEXTS)
        some = texts_to_score(run.chat, texts.sample(min(N_TEXTS, len(texts)), run.options.seed).instructions)
        job = Removing.of(run, "test", self.kl_tokens, self.batch_size, self.max_new_tokens)
        return Pieces(self.folder, replace(job, texts=tuple(some)), run.model, self.engine)

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

    def chosen(self, methods: Sequence[tuple[str, int]]) -> tuple[dict[str, _Chosen], dict[str, str]]:
        """The best place of every method on validation prompts, and why others give no directions."""
        pieces = {method: self._choosing(*method) for method in methods}
        fitted = [
            [each] for (name, _), each in pieces.items() if name in FITTED
        ]  # a fit is kept before the next begins
        for some in ([each for (name, _), each in pieces.items() if name not in FITTED], *fitted):
            self.hashes |= self.validation.run(some)
        why = self.validation.left_out
        labels = {f"{name}:{k}": each.name for (name, k), each in pieces.items()}
        chosen = {
            label: read_record(self.folder.path / _folder(label) / "chosen.json", _Chosen)
            for label, name in labels.items()
            if name not in why
        }
        return chosen, {label: why[name] for label, name in labels.items() if name in why}

    def _choosing(self, name: str, k: int) -> Piece:
        label = f"{name}:{k}"
        where = f"{_folder(label)}/chosen.json", f"{_folder(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.spans.places, "as_few": AS_FEW}
        if ":" in name:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed
        trials: list[tuple[tuple[int | None, int], Basis]] = []

        def item() -> Task:
            try:
                trials[:] = self.spans.trials(name, k)
            except UserError as error:
                raise NoDirections(str(error)) from error
            bases = (self.run.direction.unit[None], *(basis for _, basis in trials))
            return Task("whole", label, (bases,))

        def write(found: tuple[Tensor, Tensor]) -> None:
            scores, kl = found[0], found[1].mean(-1)
            shares = expected_refused(scores, self.zero)
            more = (shares - shares[0] - AS_FEW / scores.shape[1]).clamp(min=0)
            best = min(range(1, len(shares)), key=lambda i: (more[i].item(), kl[i].item()))
            (position, layer), basis = trials[best - 1]
            write_tensors(self.folder.path / where[1], basis)
            write_record(self.folder.path / where[0], _Chosen(layer, position, shares[best].item(), kl[best].item()))

        about = f"{k} direction{'s' * (k > 1)} at up to {len(self.spans.places)} places, validation prompts"
        return Piece(f"{_folder(label)}-chosen", inputs, where, about, item, write)

    def basis(self, label: str) -> Basis:
        """What a method removes."""
        basis: Tensor = read_tensors(self.folder.path / f"{_folder(label)}/basis.pt")
        return basis

    def held_out_of(
        self, bases: Mapping[str, Basis], plain: tuple[bool, ...], reference: Curve | None
    ) -> dict[str, HeldOut]:
        """Answers, scores and KL of held-out prompts at every strength.

        And at more of them where the share of refusals falls to the reference's target: between two strengths of the
        first it may fall from all to none.
        """
        target = None if reference is None else reference.target.item()
        about = f"{len(STRENGTHS)} strengths and more between, held-out prompts"
        self.held_out.run(
            [
                self._piece("held-out", Task("curve", label, (basis, plain, target)), {"target": target}, about)
                for label, basis in bases.items()
            ]
        )
        return {label: read_record(self.folder.path / _folder(label) / "held_out.json", HeldOut) for label in bases}

    def nearer(
        self,
        bases: Mapping[str, Basis],
        plain: tuple[bool, ...],
        found: Mapping[str, HeldOut],
        targets: Mapping[str, Sequence[float]],
    ) -> dict[str, HeldOut]:
        """What was measured, and more strengths where the share of refusals falls to each of the targets."""
        pieces = []
        for label, some in targets.items():
            about = f"strengths where {', '.join(f'{each:.2f}' for each in some)} are refused, held-out prompts"
            task = Task("nearer", label, (found[label], bases[label], plain, some))
            pieces.append(self._piece("nearer", task, {"targets": some, "before": found[label].strengths}, about))
        self.held_out.run(pieces)
        return {label: read_record(self.folder.path / _folder(label) / "nearer.json", HeldOut) for label in targets}

    def _piece(self, name: str, task: Task, inputs: Mapping[str, Any], about: str) -> Piece:
        """A stage that measures a method at strengths."""
        where, label = f"{_folder(task.label)}/{name.replace('-', '_')}.json", task.label
        settings = {"basis": self._hash(label), "strengths": STRENGTHS, "close": CLOSE}
        given = self.inputs | settings | {"n": self.run.options.label_tokens} | dict(inputs)
        return self._stage(f"{_folder(label)}-{name}", given, where, about, task)

    def _stage(self, name: str, inputs: Mapping[str, Any], where: str, about: str, task: Task) -> Piece:
        return Piece(name, inputs, [where], about, lambda: task, partial(write_record, self.folder.path / where))

    def _hash(self, label: str) -> str | None:
        return self.hashes.get(f"{_folder(label)}/basis.pt")

    def plain_refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each held-out prompt, in a short answer."""
        where, inputs = "plain.json", self.inputs | {"n": self.run.options.label_tokens}
        write, task = partial(write_json, self.folder.path / where), Task("refused", "plain")
        self.held_out.run([Piece("plain", inputs, [where], "short answers", lambda: task, write)])
        return read_record(self.folder.path / where, tuple[bool, ...])  # type: ignore[no-any-return]

    def answers(self, removed: Mapping[str, tuple[Basis | None, float]]) -> dict[str, Answers]:
        """Judged answers to the held-out harmful prompts, and CE on plain texts, under removals at a strength."""
        pieces = []
        for label, (basis, strength) in removed.items():
            inputs = self.inputs | {"basis": self._hash(label), "strength": strength, "n": self.max_new_tokens}
            inputs |= {"texts": self.run.options.text_set, "seed": self.run.options.seed}
            about = f"answers of {self.max_new_tokens} tokens and CE at strength {strength:.3g}"
            where, task = f"{_folder(label)}/answers.json", Task("answers", label, (basis, strength))
            pieces.append(self._stage(f"{_folder(label)}-answers", inputs, where, about, task))
        self.held_out.run(pieces)
        return {label: read_record(self.folder.path / _folder(label) / "answers.json", Answers) for label in removed}

    def controls(self, ranks: Sequence[int], n_random: int) -> tuple[ControlRow, ...]:
        """Subspaces that no method chose, whole, on held-out prompts."""
        where, named = "controls.json", list[tuple[str, int, Basis]]()

        def item() -> Task:
            named[:] = self.spans.controls(ranks, n_random)
            return Task("whole", "controls", ([basis for *_, basis in named],))

        def write(found: tuple[Tensor, Tensor]) -> None:
            shares, kl = expected_refused(found[0], self.zero).tolist(), found[1].mean(-1).tolist()
            rows = [
                ControlRow(name, len(basis), seed, *numbers)
                for (name, seed, basis), *numbers in zip(named, shares, kl, strict=True)
            ]
            write_record(self.folder.path / where, _Controls(tuple(rows)))

        inputs = self.inputs | {"ranks": ranks, "n_random": n_random}
        about = f"{n_random} random subspaces and 2 within a class of each of {len(ranks)} ranks"
        self.held_out.run([Piece("controls", inputs, [where], about, item, write)])
        return read_record(self.folder.path / where, _Controls).rows


@dataclass(frozen=True, eq=False, repr=False)
class _Controls(Value):
    rows: tuple[ControlRow, ...]


def _folder(label: str) -> str:
    return re.sub(r"\W+", "-", label)
