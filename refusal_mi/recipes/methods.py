"""One direction or several, by which method: each chosen on validation prompts, compared at equal refusal on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..directions import Direction
from ..engine.jobs import Engine
from ..errors import UserError
from ..estimators.names import FITTED, POOLS
from ..files import read_record, write_record
from ..model.provenance import check_same_weights
from ..run.folder import RunInputs
from ..run.methods import FILE, DrawsRow, MethodRow, MethodsResult
from ..run.record import RUN, RunInfo
from ..run.stages import RunFolder
from ..search.methods import Curve, common_target, match, match_draws, overlap
from ..search.passes import Basis
from ..stats import Paired, Rate
from ..text.prompts import PromptSet
from .localize import KL_TOKENS, NEW_TOKENS
from .method_costs import PLAIN, RANDOM, Removed, beside, dependences, over_refusal_sets, random_controls
from .method_stages import Chosen, Comparison, in_draw
from .removing import HeldOut
from .search import named_estimator
from .spans import random_span

NAME, N_PLACES, N_RANDOM = "mean", 4, 5
REFERENCE = f"{NAME}:1"


@dataclass
class _Found:
    """What one draw of the training prompts gives, and what it does to held-out prompts."""

    draw: int
    chosen: dict[str, Chosen] = field(default_factory=dict)
    """By method, such as "peel:2", whatever the draw."""
    skipped: dict[str, str] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)
    measured: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def curves(self) -> dict[str, Curve]:
        return {label: each.curve for label, each in self.measured.items()}

    @property
    def singles(self) -> dict[str, str]:
        """Several directions -> one of the same method."""
        names = {label: f"{label.rpartition(':')[0]}:1" for label, basis in self.bases.items() if len(basis) > 1}
        return {label: single for label, single in names.items() if single in self.bases}


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
    over_refusal: Sequence[PromptSet] = (),
    capability: Sequence[str] = (),
    n_draws: int = 1,
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
        over_refusal: sets of harmless prompts beside the run's own held-out ones, whose refusals are counted where
            each method is matched.
        capability: tasks that are asked there too: "everyday", which needs no harness, or what
            `recipes.capability.measure_capability` takes.
        n_draws: how often everything is found and matched: from all training prompts, and from as many drawn with
            repetition.
        engine: where methods are measured, each stage of each as one item, the references of all draws first; None is
            here. Directions are estimated and fitted here, and tasks are asked here.

    Raises:
        UserError: the run chose no direction, or a method does not exist.
    """
    folder = folder or RunFolder(run.path / "methods")
    work = Comparison(run, folder, kl_tokens, n_places, max_new_tokens, batch_size, engine)
    check_same_weights(read_record(run.path / RUN, RunInfo).model, run.model, str(run.path))
    sets = over_refusal_sets(run, over_refusal)
    asked = list(dict.fromkeys([(NAME, 1), *methods]))
    first, *others = found = [_chosen(work, asked, draw) for draw in range(n_draws)]
    opened = work.opened(list(first.chosen), n_draws)
    _measure(work, found)
    curves, reference = first.curves, first.curves[REFERENCE]
    matches = {label: match(curve, reference) for label, curve in curves.items()}
    over = {label: match(curves[label], curves[one], reference).ratio for label, one in first.singles.items()}
    read_at = {label: 1.0 if each.strength is None else each.strength for label, each in matches.items()}
    answers = work.answers({**{label: (first.bases[label], read_at[label]) for label in curves}, PLAIN: (None, 0.0)})
    plain = answers[PLAIN]
    ranks = sorted({len(basis) for basis in first.bases.values()})
    width = run.model.cfg.d_model
    removed = [Removed(label, basis, read_at[label], work.hashes[label]) for label, basis in first.bases.items()]
    removed = [Removed(PLAIN, None, 0.0, None), *removed, *random_controls(ranks, width)]
    directions = _directions(first, width)
    result = MethodsResult(
        read_record(run.path / RUN, RunInfo).model,
        kl_tokens,
        work.zero,
        len(work.spans.run.prompts("harmful", "val")),
        reference.refused.shape[1],
        Rate.of(plain.refused),
        reference.target.item(),
        tuple(
            MethodRow(
                label,
                len(first.bases[label]),
                each.layer,
                each.position,
                first.measured[label].at_strengths(work.zero),
                matches[label],
                over.get(label, (None, None, None)),
                read_at[label],
                Rate.of(answers[label].refused),
                Rate.of(answers[label].degenerate),
                Paired.of(answers[REFERENCE].refused, answers[label].refused).describe(),
                answers[label].ce_loss - plain.ce_loss,
            )
            for label, each in first.chosen.items()
        ),
        work.controls(ranks, n_random),
        tuple(tuple(overlap(a, b) for b in first.bases.values()) for a in first.bases.values()),
        width,
        first.skipped,
        opened,
        beside(work, removed, sets, capability),
        _over_draws(found) if others else (),
        dependences(work, directions),
        tuple(directions),
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


def _chosen(work: Comparison, asked: Sequence[tuple[str, int]], draw: int) -> _Found:
    """Everything that is found from one draw of the training prompts, at its best place on validation prompts."""
    chosen, skipped = work.chosen(asked, draw)
    if REFERENCE not in chosen:
        raise UserError(f"{work.run.path}: the difference of means gives no direction to compare with")
    return _Found(draw, chosen, skipped, {label: work.basis(in_draw(label, draw)) for label in chosen})


def _measure(work: Comparison, found: Sequence[_Found]) -> None:
    """Held-out prompts at every strength, at more of them where each pair of methods is compared.

    All draws side by side: their references, then what is compared with these, then strengths between.
    """
    plain = work.plain_refused()
    of_label = {in_draw(label, each.draw): (each, label) for each in found for label in each.bases}
    bases = {full: each.bases[label] for full, (each, label) in of_label.items()}
    firsts = [in_draw(REFERENCE, each.draw) for each in found]
    measured = work.held_out_of({full: bases[full] for full in firsts}, plain, {})
    shares = {each.draw: measured[full].curve.target.item() for each, full in zip(found, firsts, strict=True)}
    others = {full: shares[each.draw] for full, (each, _) in of_label.items() if full not in firsts}
    measured |= work.held_out_of({full: bases[full] for full in others}, plain, others)
    for full, (each, label) in of_label.items():
        each.measured[label] = measured[full]
    targets = {in_draw(label, each.draw): some for each in found for label, some in _targets(each).items()}
    for full, more in work.nearer(bases, plain, measured, targets).items():
        each, label = of_label[full]
        each.measured[label] = more


def _targets(found: _Found) -> dict[str, list[float]]:
    """The shares of refusals, above the reference's, at which methods are compared with others."""
    curves, first = found.curves, found.curves[REFERENCE]
    targets: dict[str, set[float]] = {label: set() for label in found.bases}
    for label, other in [*((label, REFERENCE) for label in found.bases), *found.singles.items()]:
        target = common_target(curves[label], curves[other], first).item()
        if target > first.target.item():
            targets[label].add(target)
            targets[other].add(target)
    return {label: sorted(some) for label, some in targets.items() if some}


def _over_draws(found: Sequence[_Found]) -> tuple[DrawsRow, ...]:
    """Every method to the reference, and several directions to one of the same method, over all draws."""
    rows = []
    first, curves = found[0], [each.curves for each in found]
    pairs = [*((label, REFERENCE) for label in first.chosen if label != REFERENCE), *first.singles.items()]
    for label, other in dict.fromkeys(pairs):
        triples = [
            (each[label], each[other], each[REFERENCE]) if {label, other} <= each.keys() else None for each in curves
        ]
        layers = tuple(each.chosen[label].layer if label in each.chosen else None for each in found)
        over = match_draws(triples)
        rows.append(DrawsRow(label, other, layers, over.ratios, over.one_fit, over.sd_draws, over.se_prompts))
    return tuple(rows)


def _directions(found: _Found, width: int) -> Mapping[str, Direction]:
    """The methods of one direction, and a random one."""
    places = {label: each.layer for label, each in found.chosen.items() if len(found.bases[label]) == 1}
    single = {label: Direction.of(found.bases[label][0], layer) for label, layer in places.items()}
    random = Direction.of(random_span(1, width, 0)[0], places[REFERENCE])
    return {**single, f"{RANDOM}:1": random}
