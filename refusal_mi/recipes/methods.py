"""One direction or several, by which method: each chosen on validation prompts, compared at equal refusal on others."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..estimators.cones import fit_cone
from ..estimators.names import FITTED, NAMES, NUMBERED, POOLS
from ..estimators.rdo import RDOOptions, RDOTexts, fit_rdo
from ..estimators.samples import ActivationSamples, needs_prompts
from ..files import read_record, read_tensors, sha256_json, write_json, write_record, write_tensors
from ..interventions import Ablate
from ..measures import ScoredText, ce_loss, texts_to_score
from ..model.points import write_hooks
from ..model.provenance import ModelRecord
from ..reading import template_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs, load_ranked
from ..run.record import RUN, RunInfo
from ..run.stages import RunFolder
from ..search.grid import select
from ..search.localize import expected_refused
from ..search.methods import STRENGTHS, Curve, Matched, match, overlap
from ..search.passes import Basis
from ..search.removals import RemovalScorer
from ..stats import Paired, Rate, mean_interval
from ..text.prompts import load_prompts
from ..values import Value, frame
from .localize import KL_TOKENS, NEW_TOKENS, judged_answers, removal_scorer
from .rdo import own_texts
from .search import AnyEstimator, named_estimator

FILE, REFERENCE, N_PLACES, N_RANDOM = "methods.json", "mean", 4, 5
N_TEXTS = 64
"""Plain texts that CE is measured on."""
N_FITTED = 64
"""Training prompts a side that RDO and cones are fitted to."""


@dataclass(frozen=True, eq=False, repr=False)
class AtStrength(Value):
    """What a removal does on held-out prompts."""

    strength: float
    refused: Rate
    """Short answers (the run's `label_tokens`), judged by text."""
    refused_by_score: Rate
    kl_nats: tuple[float, float, float]


@dataclass(frozen=True, eq=False, repr=False)
class MethodRow(Value):
    """A method with so many directions, at the place where it was best on validation prompts."""

    label: str
    """Method and number of directions: "peel:2"."""
    k: int
    """Dimensions of what is removed."""
    layer: int
    position: int | None
    """Of the first direction, for ranks, which come from several places."""
    curve: tuple[AtStrength, ...]
    matched: Matched
    read_at: float
    """Strength at which longer answers were read: the matched one, or 1."""
    refused_by_text: Rate
    degenerate: Rate
    text_change: Mapping[str, float | int]
    """Refused answers minus those of the reference at its own matched strength, the same prompts."""
    ce_change: float
    """CE on plain texts minus that of the plain model (nats per token)."""

    def at(self, strength: float) -> AtStrength:
        """What was measured at one strength."""
        return next(each for each in self.curve if each.strength == strength)


@dataclass(frozen=True, eq=False, repr=False)
class ControlRow(Value):
    """A subspace that no method chose, at strength 1."""

    label: str
    """random: isotropic; within: random halves of one class."""
    k: int
    seed: int
    refused_by_score: float
    """Counted smoothly (`search.localize.expected_refused`)."""
    kl_nats: float


@dataclass(frozen=True, eq=False, repr=False)
class MethodsResult(Value):
    """`methods.json`."""

    model: ModelRecord
    kl_tokens: int
    zero_point_nats: float
    n_validation: int
    n_held_out: int
    plain_refused_by_text: Rate
    """As `MethodRow.refused_by_text`."""
    target: float
    """The share of refused short answers that is matched: `Curve.target` of the reference."""
    rows: tuple[MethodRow, ...]
    """The reference, mean:1, first."""
    controls: tuple[ControlRow, ...]
    overlaps: tuple[tuple[float, ...], ...]
    """Of the rows' subspaces: ‖Q₁Q₂ᵀ‖² / min(k₁, k₂)."""
    d_model: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Methods that gave no directions, and why."""

    @classmethod
    def load(cls, path: str | Path) -> "MethodsResult":
        """Read `methods.json`, or the one in this folder."""
        path = Path(path)
        return read_record(path / FILE if path.is_dir() else path, cls)

    def row(self, label: str) -> MethodRow:
        """One method's, such as "peel:2"."""
        return next(each for each in self.rows if each.label == label)

    def to_frame(self) -> Any:
        """A pandas table with a row for each method and strength."""
        rows = [(row, each) for row in self.rows for each in row.curve]
        return frame(
            [
                {"label": row.label, "k": row.k, "strength": each.strength, "refused": each.refused.value}
                | {"refused_by_score": each.refused_by_score.value, "kl": each.kl_nats[0]}
                for row, each in rows
            ]
        )


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
    """`{label}/held_out.json`: every prompt at every strength."""

    strengths: tuple[float, ...]
    refused: tuple[tuple[bool, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    kl: tuple[tuple[float, ...], ...]

    @property
    def curve(self) -> Curve:
        return Curve(self.strengths, *(torch.tensor(each, dtype=torch.float64) for each in (self.refused, self.kl)))

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
    chosen: dict[str, _Chosen] = {}
    skipped: dict[str, str] = {}
    for name, k in asked:
        label = f"{name}:{k}"
        try:
            chosen[label] = work.chosen(name, k)
        except _Nothing as error:
            skipped[label] = str(error)
    reference = f"{REFERENCE}:1"
    if reference not in chosen:
        raise UserError(f"{run.path}: the difference of means gives no direction to compare with")
    bases = {label: work.basis(label) for label in chosen}
    measured = {label: work.held_out_of(label, basis) for label, basis in bases.items()}
    first = measured[reference].curve
    matches = {label: match(each.curve, first) for label, each in measured.items()}
    read_at = {label: 1.0 if each.strength is None else each.strength for label, each in matches.items()}
    answers = {label: work.answers(label, bases[label], read_at[label]) for label in chosen}
    plain = work.answers("plain", None, 0.0)
    ranks = sorted({len(basis) for basis in bases.values()})
    result = MethodsResult(
        read_record(run.path / RUN, RunInfo).model,
        kl_tokens,
        work.zero,
        len(run.prompts("harmful", "val")),
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


class _Nothing(Exception):
    """A method gives no directions here."""


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
        return removal_scorer(self.run, "val", self.kl_tokens, self.batch_size)

    @cached_property
    def held_out(self) -> RemovalScorer:
        return removal_scorer(self.run, "test", self.kl_tokens, self.batch_size)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every stage depends on."""
        run = self.run
        prompts = {f"{side} {part}": run.prompts(side, part) for side in SIDES for part in ("train", "val", "test")}
        info = read_record(run.path / RUN, RunInfo)
        return {
            "model": info.model.fingerprint,
            "template": [run.options.system, run.record.response_prefix, run.options.template_kwargs],
            "prompts": sha256_json(prompts),
            "tokens": run.refusal_prefixes,
            "direction": sha256_json(run.direction.vector.tolist()),
            "kl_tokens": self.kl_tokens,
        }

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Position and layer of the best survivors, one for each layer, the run's own first; then its neighbours."""
        run, layer, position = self.run, self.run.direction.layer, self.run.direction.position
        assert position is not None
        best = {layer: position}
        for row in select(run.scores, run.options.thresholds).survivors:
            best.setdefault(row.layer, row.position)
        for near in sorted(range(run.grid.n_layers), key=lambda each: abs(each - layer)):
            best.setdefault(near, position)
        return [(position, layer) for layer, position in best.items()][: self.n_places]

    @cached_property
    def streams(self) -> dict[str, Float[Tensor, "prompt pos layer d_model"]]:
        """Of the training prompts, at the layers of `places`."""
        layers = [layer for _, layer in self.places]
        return {
            side: template_residuals(
                self.run.model, self.run.chat, self.run.prompts(side, "train"), layers=layers, batch_size=8
            )
            for side in SIDES
        }

    @cached_property
    def own_texts(self) -> RDOTexts:
        """What directions are fitted to by gradients."""
        run = self.run
        sides = [run.prompts(side, "train")[:N_FITTED] for side in SIDES]
        return own_texts(run.model, run.chat, run.direction, *sides)

    def chosen(self, name: str, k: int) -> _Chosen:
        """The best place of a method on validation prompts."""
        label = f"{name}:{k}"
        where = f"{_folder(label)}/chosen.json", f"{_folder(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.places}
        if name not in (*NAMES, *POOLS, *FITTED) and name.partition("-")[0] not in NUMBERED:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed

        def compute() -> None:
            trials = self._trials(name, k)
            whole = [dict.fromkeys(write_hooks(self.run.model.cfg.n_layers), 1.0)] * (len(trials) + 1)
            bases = [self.run.direction.unit[None], *(basis for _, basis in trials)]
            scorer = self.validation
            scores = scorer.score(bases, whole, range(scorer.n_harmful))
            kl = scorer.kl(bases, whole, range(scorer.n_harmless)).mean(-1)
            shares = expected_refused(scores, self.zero)
            left = shares[0].clamp(min=0.5 / scores.shape[1])
            best = min(range(1, len(bases)), key=lambda i: (max(0.0, (shares[i] - left).item()), kl[i].item()))
            (position, layer), basis = trials[best - 1]
            write_tensors(self.folder.path / where[1], basis)
            write_record(self.folder.path / where[0], _Chosen(layer, position, shares[best].item(), kl[best].item()))

        about = f"{k} direction{'s' * (k > 1)} at up to {len(self.places)} places, validation prompts"
        done = self.folder.stage(f"{_folder(label)}-chosen", inputs, where, compute, about=about)
        self.hashes[label] = done[where[1]]
        return read_record(self.folder.path / where[0], _Chosen)

    def basis(self, label: str) -> Basis:
        """What a method removes."""
        basis: Tensor = read_tensors(self.folder.path / f"{_folder(label)}/basis.pt")
        return basis

    def held_out_of(self, label: str, basis: Basis) -> _HeldOut:
        """Answers, scores and KL of held-out prompts at every strength."""
        where, n_tokens = f"{_folder(label)}/held_out.json", self.run.options.label_tokens

        def compute() -> None:
            scorer, names, every = self.held_out, write_hooks(self.run.model.cfg.n_layers), (0.0, *STRENGTHS)
            weights, bases = [dict.fromkeys(names, strength) for strength in every], [basis] * len(every)
            scores = scorer.score(bases, weights, range(scorer.n_harmful)).tolist()
            kl = scorer.kl(bases, weights, range(scorer.n_harmless)).tolist()
            answered = judged_answers(self.run, self.run.prompts("harmful"), n_tokens)
            changed = [answered([Ablate(basis, strength)]).refused for strength in STRENGTHS]
            refused = (self.plain_refused(), *changed)
            write_record(self.folder.path / where, _HeldOut(every, refused, _rows(scores), _rows(kl)))

        inputs = self.inputs | {"basis": self.hashes[label], "strengths": STRENGTHS, "n": n_tokens}
        about = f"{len(STRENGTHS)} strengths, held-out prompts"
        self.folder.stage(f"{_folder(label)}-held-out", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _HeldOut)

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
            judged = judged_answers(run, run.prompts("harmful"), self.max_new_tokens)(steps)
            loss = ce_loss(run.model, run.chat, self._texts(), interventions=steps)
            record = _Answers(judged.refused, judged.degenerate, loss.ce_loss)
            write_record(self.folder.path / where, record)

        inputs = self.inputs | {"basis": self.hashes.get(label), "strength": strength, "n": self.max_new_tokens}
        about = f"answers of {self.max_new_tokens} tokens and CE at strength {strength:.3g}"
        self.folder.stage(f"{_folder(label)}-answers", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _Answers)

    def controls(self, ranks: Sequence[int], n_random: int) -> tuple[ControlRow, ...]:
        """Subspaces that no method chose, whole, on held-out prompts."""
        where = "controls.json"

        def compute() -> None:
            named = [(name, len(basis), seed, basis) for name, seed, basis in self._controls(ranks, n_random)]
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

    def _controls(self, ranks: Sequence[int], n_random: int) -> list[tuple[str, int, Basis]]:
        width, found = self.run.model.cfg.d_model, []
        column = self._column(*self.places[0])
        for k in ranks:
            for seed in range(n_random):
                drawn = torch.Generator().manual_seed(1000 * k + seed)
                found.append(("random", seed, _basis(torch.randn(k, width, generator=drawn, dtype=torch.float64))))
            for seed, side in enumerate(SIDES):
                rows, drawn = column[side], torch.Generator().manual_seed(1000 * k + seed)
                halves = [torch.randperm(len(rows), generator=drawn).chunk(2) for _ in range(k)]
                spans = torch.stack([rows[one].mean(0) - rows[other].mean(0) for one, other in halves])
                found.append((f"within {side}", seed, _basis(spans)))
        return found

    def _texts(self) -> list[ScoredText]:
        run = self.run
        texts = load_prompts(run.options.text_set, limit=N_TEXTS)
        return texts_to_score(run.chat, texts.sample(min(N_TEXTS, len(texts)), run.options.seed).instructions)

    def _column(self, position: int, layer: int) -> dict[str, Float[Tensor, "prompt d_model"]]:
        index = [each for _, each in self.places].index(layer)
        return {side: self.streams[side][:, position, index].double() for side in SIDES}

    def _trials(self, name: str, k: int) -> list[tuple[tuple[int | None, int], Basis]]:
        """Place and basis of every place where the method gives all of its directions."""
        if name == "ranks":
            n_there = len(select(self.run.scores, self.run.options.thresholds).survivors)
            if k > n_there:
                raise _Nothing(f"the search has {n_there} survivor(s)")
            directions = load_ranked(self.run.path, range(k))
            first = directions[0]
            return [((first.position, first.layer), _basis(torch.stack([each.unit for each in directions])))]
        if name in FITTED:
            direction = self.run.direction
            return [((direction.position, direction.layer), _basis(self._fitted(name, k)))]
        names = [f"{name}-{index + 1}" for index in range(k)] if name in NUMBERED else [name]
        estimators = [named_estimator(each) for each in names]
        found: list[tuple[tuple[int | None, int], Basis]] = []
        for place in self.places:
            vectors = [self._vector(each, *place) for each in estimators]
            if all(bool(vector.any()) for vector in vectors):
                found.append((place, _basis(torch.stack(vectors))))
        if not found:
            raise _Nothing("it gives fewer directions at every place")
        return found

    def _fitted(self, name: str, k: int) -> Float[Tensor, "k d_model"]:
        """Directions found by gradients from the run's own; what was killed goes on from its last step."""
        run, checkpoint = self.run, self.folder.path / _folder(f"{name}:{k}") / "checkpoint.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        held = (run.model, run.chat, run.direction, self.own_texts, RDOOptions(retention_form="code"))
        fit = (
            fit_rdo(*held, checkpoint=checkpoint)
            if name == "rdo"
            else fit_cone(*held, n_directions=k, checkpoint=checkpoint)
        )
        checkpoint.unlink(missing_ok=True)
        return torch.stack([each.unit for each in fit.directions])

    def _vector(self, estimator: AnyEstimator, position: int, layer: int) -> Float[Tensor, " d_model"]:
        """An estimator's direction at one place, which it is given as the only one."""
        sides = [ActivationSamples(rows[:, None, None], (-1,)) for rows in self._column(position, layer).values()]
        given = sides if needs_prompts(estimator) else [each.means for each in sides]
        vector: Tensor = estimator(*given).vectors[0, 0]  # type: ignore[arg-type]
        return vector.double()


@dataclass(frozen=True, eq=False, repr=False)
class _Controls(Value):
    rows: tuple[ControlRow, ...]


def _basis(vectors: Float[Tensor, "k d_model"]) -> Basis:
    """Orthonormal rows that span the vectors."""
    return torch.linalg.qr(torch.nn.functional.normalize(vectors.double(), dim=-1).T).Q.T.contiguous()


def _folder(label: str) -> str:
    return re.sub(r"\W+", "-", label)


def _rows(table: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table))
