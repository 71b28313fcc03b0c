"""One direction or several, by which method: each chosen on validation prompts, compared at equal refusal on others."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor

from ..directions import DirectionGrid, difference_in_means
from ..errors import UserError
from ..estimators.cones import fit_cone
from ..estimators.named import Named
from ..estimators.names import FITTED, N_CLUSTERS, NAMES, NUMBERED, POOLS
from ..estimators.pools import cluster_differences, peel
from ..estimators.rdo import RDOOptions, RDOTexts, fit_rdo
from ..estimators.samples import ActivationSamples, needs_prompts
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_json, write_record, write_tensors
from ..interventions import NEAR_DUPLICATE, Ablate
from ..measures import ScoredText, ce_loss, texts_to_score
from ..model.points import write_hooks
from ..model.provenance import ModelRecord, describe_model, versions
from ..reading import mean_activations, sample_activations, template_residuals
from ..run.answers import SIDES
from ..run.folder import RunInputs, load_ranked
from ..run.methods import FILE, AtStrength, ControlRow, MethodRow, MethodsResult
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.grid import select
from ..search.localize import expected_refused
from ..search.methods import N_HALVINGS, STRENGTHS, Curve, crossing_ends, match, overlap
from ..search.passes import Basis
from ..search.removals import RemovalScorer
from ..stats import Paired, Rate, mean_interval
from ..text.prompts import load_prompts
from ..values import Value
from .localize import KL_TOKENS, NEW_TOKENS, judged_answers, removal_scorer
from .rdo import own_texts
from .search import estimated, named_estimator

REFERENCE, N_PLACES, N_RANDOM = "mean", 4, 5
N_TEXTS = 64
"""Plain texts that CE is measured on."""
N_FITTED = 64
"""Training prompts a side that RDO and cones are fitted to."""


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
    RunFolder(run.path).check_weights(work.model)
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
    plain_short, first = work.plain_refused(), None
    measured: dict[str, _HeldOut] = {}
    for label, basis in bases.items():
        measured[label] = work.held_out_of(label, basis, plain_short, first)
        first = measured[label].curve if first is None else first
    assert first is not None
    curves = {label: each.curve for label, each in measured.items()}
    matches = {label: match(each, first) for label, each in curves.items()}
    singles = {label: f"{label.rpartition(':')[0]}:1" for label, basis in bases.items() if len(basis) > 1}
    over = {
        label: match(curves[label], curves[single], first).ratio
        for label, single in singles.items()
        if single in curves
    }
    read_at = {label: 1.0 if each.strength is None else each.strength for label, each in matches.items()}
    answers = {label: work.answers(label, bases[label], read_at[label]) for label in chosen}
    plain = work.answers("plain", None, 0.0)
    ranks = sorted({len(basis) for basis in bases.values()})
    result = MethodsResult(
        read_record(run.path / RUN, RunInfo).model,
        kl_tokens,
        work.zero,
        len(work.prompts("harmful", "val")),
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
    _grids: dict[int, DirectionGrid] = field(default_factory=dict)

    @property
    def zero(self) -> float:
        return self.run.record.zero_point_nats or 0.0

    @cached_property
    def validation(self) -> RemovalScorer:
        return removal_scorer(self.whole, "val", self.kl_tokens, self.batch_size)

    @cached_property
    def held_out(self) -> RemovalScorer:
        return removal_scorer(self.run, "test", self.kl_tokens, self.batch_size)

    @cached_property
    def model(self) -> ModelRecord:
        """The weights that are held."""
        run = self.run
        return describe_model(run.model, read_record(run.path / RUN, RunInfo).model.source)

    def prompts(self, side: str, part: str) -> list[str]:
        """All for training and validation; of the held-out ones as many as the run's inputs allow."""
        return (self.run if part == "test" else self.whole).prompts(side, part)

    @cached_property
    def whole(self) -> RunInputs:
        """The run with all of its prompts."""
        return replace(self.run, max_prompts=sys.maxsize)

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
            "prompts": {side: sha256_json(self.prompts(side, "test")) for side in SIDES},
            "thresholds": asdict(run.options.thresholds),
            "kl_tokens": self.kl_tokens,
        }

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Position and layer of the best survivors, one for each layer, the run's own first; then its neighbours."""
        run, layer, position = self.run, self.run.direction.layer, self.run.direction.position
        if position is None:
            raise UserError(f"{run.path}: its direction does not say at which position it was read")
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
                self.run.model, self.run.chat, self.prompts(side, "train"), layers=layers, batch_size=8
            )
            for side in SIDES
        }

    @cached_property
    def own_texts(self) -> RDOTexts:
        """What directions are fitted to by gradients."""
        run = self.run
        sides = [self.prompts(side, "train")[:N_FITTED] for side in SIDES]
        return own_texts(run.model, run.chat, run.direction, *sides)

    def chosen(self, name: str, k: int) -> _Chosen:
        """The best place of a method on validation prompts."""
        label = f"{name}:{k}"
        where = f"{_folder(label)}/chosen.json", f"{_folder(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.places}
        if name not in (*NAMES, *POOLS, *FITTED) and name.partition("-")[0] not in NUMBERED:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed

        def compute() -> None:
            try:
                trials = self._trials(name, k)
            except UserError as error:
                raise _Nothing(str(error)) from error
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

    def held_out_of(self, label: str, basis: Basis, plain: tuple[bool, ...], reference: Curve | None) -> _HeldOut:
        """Answers, scores and KL of held-out prompts at every strength.

        And at more of them, halving `N_HALVINGS` times where the share of refusals falls to the reference's target:
        between two strengths of the first it may fall from all to none.
        """
        where, n_tokens = f"{_folder(label)}/held_out.json", self.run.options.label_tokens

        def compute() -> None:
            scorer, names = self.held_out, write_hooks(self.run.model.cfg.n_layers)
            answered = judged_answers(self.run, self.prompts("harmful", "test"), n_tokens)

            def at(strengths: Sequence[float]) -> dict[float, _Row]:
                weights, bases = [dict.fromkeys(names, each) for each in strengths], [basis] * len(strengths)
                scores = scorer.score(bases, weights, range(scorer.n_harmful)).tolist()
                kl = scorer.kl(bases, weights, range(scorer.n_harmless)).tolist()
                refused = [plain if each == 0 else answered([Ablate(basis, each)]).refused for each in strengths]
                return dict(zip(strengths, zip(refused, map(tuple, scores), map(tuple, kl), strict=True), strict=True))

            rows = at((0.0, *STRENGTHS))
            for _ in range(N_HALVINGS):
                found = _held_out(rows).curve
                ends = crossing_ends(found, (found if reference is None else reference).target.item())
                if ends is None:
                    break
                rows |= at([sum(ends) / 2])
            write_record(self.folder.path / where, _held_out(rows))

        target = None if reference is None else reference.target.item()
        inputs = self.inputs | {"basis": self.hashes[label], "strengths": STRENGTHS, "n": n_tokens, "target": target}
        about = f"{len(STRENGTHS)} strengths and {N_HALVINGS} between, held-out prompts"
        self.folder.stage(f"{_folder(label)}-held-out", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, _HeldOut)

    def plain_refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each held-out prompt, in a short answer."""
        where, n_tokens = "plain.json", self.run.options.label_tokens

        def compute() -> None:
            judged = judged_answers(self.run, self.prompts("harmful", "test"), n_tokens)([])
            write_json(self.folder.path / where, judged.refused)

        self.folder.stage("plain", self.inputs | {"n": n_tokens}, [where], compute, about="short answers")
        return read_record(self.folder.path / where, tuple[bool, ...])  # type: ignore[no-any-return]

    def answers(self, label: str, basis: Basis | None, strength: float) -> _Answers:
        """Judged answers to the held-out harmful prompts, and CE on plain texts."""
        where = f"{_folder(label)}/answers.json"

        def compute() -> None:
            run = self.run
            steps = [] if basis is None else [Ablate(basis, strength)]
            judged = judged_answers(run, self.prompts("harmful", "test"), self.max_new_tokens)(steps)
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
                if k < len(rows):
                    halves = [torch.randperm(len(rows), generator=drawn).chunk(2) for _ in range(k)]
                    spans = torch.stack([rows[one].mean(0) - rows[other].mean(0) for one, other in halves])
                    with suppress(_Nothing):  # of few prompts two halves can be the same
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
        pool = _POOLS.get(name)
        estimator = None if pool else named_estimator(name)
        found: list[tuple[tuple[int | None, int], Basis]] = []
        for place in self.places:
            vectors = self._vector(estimator, *place)[None] if pool is None else pool(*self._column(*place).values(), k)
            if bool(vectors.any(-1).all()):
                found.append((place, _basis(vectors)))
        if not found:
            raise _Nothing("it gives fewer directions at every place")
        return found

    def _fitted(self, name: str, k: int) -> Float[Tensor, "k d_model"]:
        """Directions found by gradients from the run's own; what was killed goes on from its last step."""
        run, key = self.run, sha256_json(self.inputs)[:16]
        checkpoint = self.folder.path / _folder(f"{name}:{k}") / f"checkpoint-{key}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.fresh:
            checkpoint.unlink(missing_ok=True)
        held = (run.model, run.chat, run.direction, self.own_texts, RDOOptions(retention_form="code"))
        fit = (
            fit_rdo(*held, checkpoint=checkpoint)
            if name == "rdo"
            else fit_cone(*held, n_directions=k, checkpoint=checkpoint)
        )
        for each in checkpoint.parent.glob("checkpoint-*.pt"):
            each.unlink()
        return torch.stack([each.unit for each in fit.directions])

    def _vector(self, estimator: Any, position: int, layer: int) -> Float[Tensor, " d_model"]:
        """An estimator's direction at a place: of the package from that place alone, of a user from all."""
        if isinstance(estimator, Named) or estimator is difference_in_means:
            sides = [ActivationSamples(rows[:, None, None], (-1,)) for rows in self._column(position, layer).values()]
            given = sides if needs_prompts(estimator) else [each.means for each in sides]
            vector: Tensor = estimator(*given).vectors[0, 0]
            return vector.double()
        grid = self._grids.get(id(estimator))
        if grid is None:
            reader = sample_activations if needs_prompts(estimator) else mean_activations
            read = [reader(self.run.model, self.run.chat, self.prompts(side, "train")) for side in SIDES]
            grid = self._grids[id(estimator)] = estimated(estimator, read)
        if grid.is_degenerate[grid.positions.index(position)][layer]:
            return torch.zeros(grid.vectors.shape[-1], dtype=torch.float64)
        return grid.vectors[grid.positions.index(position), layer].double()


@dataclass(frozen=True, eq=False, repr=False)
class _Controls(Value):
    rows: tuple[ControlRow, ...]


_POOLS: Mapping[str, Callable[..., Tensor]] = {
    "peel": peel,
    "kmeans": lambda harmful, harmless, k: cluster_differences(harmful, harmless, N_CLUSTERS)[:k],
}
"""Rows of both classes at one place, and how many -> `[k d_model]`."""


def _basis(vectors: Float[Tensor, "k d_model"]) -> Basis:
    """Orthonormal rows that span the vectors."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    found = torch.linalg.qr(units.T)
    if found.R.diagonal().abs().min() < NEAR_DUPLICATE:
        raise _Nothing("its directions are all but dependent")
    return found.Q.T.contiguous()


def _folder(label: str) -> str:
    return re.sub(r"\W+", "-", label)


_Row = tuple[tuple[bool, ...], tuple[float, ...], tuple[float, ...]]


def _held_out(rows: Mapping[float, _Row]) -> _HeldOut:
    ordered = sorted(rows)
    return _HeldOut(tuple(ordered), *zip(*(rows[strength] for strength in ordered), strict=True))
