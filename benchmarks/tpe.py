"""Would Optuna's TPE find a better least removal than the search does? `python -m benchmarks.tpe RUN [SOURCE [N]]`.

Both begin with the same successive halving; then the search tries generations of neighbours, and TPE as many removals,
all of them on all N validation prompts a side (SOURCE "" is the embedded model). Needs `pip install optuna`, which
nothing else does. Seeds 0 to 2; some minutes.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna
import torch

from refusal_mi.directions import Direction
from refusal_mi.model.loading import load_model
from refusal_mi.recipes.localize import N_DIRECTIONS, removal_scorer, source_directions
from refusal_mi.run.folder import RunInputs
from refusal_mi.search.localize import STRENGTHS, Localized, Measured, localize_removal, pareto
from refusal_mi.search.passes import Weights
from refusal_mi.search.removals import Removal, RemovalScorer

PARTS = (("embed", "attn", "mlp"), ("attn", "mlp"), ("embed", "attn"), ("embed", "mlp"), ("attn",), ("mlp",))
N_SEEDS, GENERATION = 3, 12
PENALTY = 10.0
"""Nats of KL for every share of refusals beyond those that the whole ablation leaves."""


class Remembering:
    """A scorer that measures no removal twice on the same prompts, so that both searches share their halving."""

    def __init__(self, scorer: RemovalScorer) -> None:
        self.scorer, self.known = scorer, dict[Any, torch.Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def score(self, removed: Sequence[Direction], weights: Sequence[Weights], prompts: Sequence[int]) -> torch.Tensor:
        """As `RemovalScorer.score`."""
        return self._of("score", removed, weights, prompts)

    def kl(self, removed: Sequence[Direction], weights: Sequence[Weights], prompts: Sequence[int]) -> torch.Tensor:
        """As `RemovalScorer.kl`."""
        return self._of("kl", removed, weights, prompts)

    def _of(
        self, what: str, removed: Sequence[Direction], weights: Sequence[Weights], prompts: Sequence[int]
    ) -> torch.Tensor:
        pairs = zip(removed, weights, strict=True)
        keys = [(what, id(one), tuple(sorted(of.items())), len(prompts)) for one, of in pairs]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            measure = getattr(self.scorer, what)
            rows = measure([removed[i] for i in new], [weights[i] for i in new], prompts)
            self.known |= {keys[i]: row for i, row in zip(new, rows, strict=True)}
        return torch.stack([self.known[key] for key in keys])


def tpe(scorer: RemovalScorer, found: Localized, directions: Sequence[Direction], n: int, seed: int) -> list[Measured]:
    """`n` removals asked for in generations of fixed size and told in order, after those that halving measured."""
    n_layers, left = scorer.model.cfg.n_layers, max(found.whole.refused(found.zero_point), 0.5 / scorer.n_harmful)
    space = {
        "direction": optuna.distributions.CategoricalDistribution(range(len(directions))),
        "first": optuna.distributions.IntDistribution(0, n_layers - 1),
        "length": optuna.distributions.IntDistribution(1, n_layers),
        "parts": optuna.distributions.CategoricalDistribution(range(len(PARTS))),
        "strength": optuna.distributions.FloatDistribution(*STRENGTHS),
        "peak": optuna.distributions.CategoricalDistribution((False, True)),
    }

    def cost(each: Measured) -> float:
        return each.mean_kl + PENALTY * max(0.0, each.refused(found.zero_point) - left)

    def removal(asked: dict[str, object]) -> Removal:
        first = int(asked["first"])  # type: ignore[call-overload]
        last = min(n_layers, first + int(asked["length"]))  # type: ignore[call-overload]
        parts = tuple(part for part in PARTS[asked["parts"]] if part != "embed" or first == 0)  # type: ignore[index]
        shape = "peak" if asked["peak"] and last - first > 1 else "flat"
        return Removal(directions[asked["direction"]], first, last, parts, asked["strength"], shape)  # type: ignore[index, arg-type]

    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    for each in [found.whole, *found.measured]:
        of = each.removal
        place = next(i for i, direction in enumerate(directions) if direction is of.direction)
        told = {
            "direction": place,
            "first": of.first,
            "length": of.last - of.first,
            "parts": PARTS.index(of.components),
        }
        told |= {"strength": of.strength, "peak": of.shape == "peak"}
        study.add_trial(optuna.trial.create_trial(params=told, distributions=space, value=cost(each)))
    measured: list[Measured] = []
    while len(measured) < n:
        trials = [study.ask(space) for _ in range(min(GENERATION, n - len(measured)))]
        removals = [removal(each.params) for each in trials]
        kept = [(trial, each) for trial, each in zip(trials, removals, strict=True) if each.components]
        of = [each.direction for _, each in kept], [each.weights(n_layers) for _, each in kept]
        scores, kl = scorer.score(*of, range(scorer.n_harmful)), scorer.kl(*of, range(scorer.n_harmless))
        some = [Measured(each, *rows) for (_, each), *rows in zip(kept, scores, kl, strict=True)]
        for (trial, _), each in zip(kept, some, strict=True):
            study.tell(trial, cost(each))
        measured += some
    return measured


def best_of(found: Localized, measured: Sequence[Measured]) -> Measured:
    """As the search ranks: no more refusals than the whole ablation leaves, then the least KL."""
    left = max(found.whole.refused(found.zero_point), 0.5 / len(found.whole.scores))
    return min(measured, key=lambda each: (max(0.0, each.refused(found.zero_point) - left), each.mean_kl))


def area(found: Localized, measured: Sequence[Measured]) -> float:
    """Of the front, in shares of what no removal beats: refusals from 0 to 1, KL up to the whole ablation's."""
    zero, total, high = found.zero_point, 0.0, 1.0
    for each in pareto([found.whole, *measured], zero):  # the most refusals first
        refused, kl = min(1.0, each.refused(zero)), min(1.0, each.mean_kl / found.whole.mean_kl)
        total, high = total + max(0.0, high - refused) * (1 - kl), min(high, refused)
    return total


def main(path: str, source: str | None = None, n_validation: str = "32") -> None:
    """Print both, and what the best of each does on held-out prompts."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run = RunInputs(load_model(source or None), path, 100)
    zero = run.record.zero_point_nats or 0.0
    scorer: Any = Remembering(removal_scorer(replace(run, max_prompts=int(n_validation)), "val", 1, None))
    held_out = removal_scorer(run, "test", 1, None)
    directions = source_directions(run, N_DIRECTIONS)
    halved, ours = (localize_removal(scorer, directions, zero, n_generations=n) for n in (0, 4))
    n = ours.n_tried - halved.n_tried
    sys.stdout.write(f"{halved.n_tried} removals halved; then {n} more by each\n")

    def say(name: str, measured: Sequence[Measured]) -> None:
        best = best_of(halved, measured)
        of = [best.removal.direction], [best.removal.weights(run.model.cfg.n_layers)]
        kl = held_out.kl(*of, range(held_out.n_harmless)).mean().item()
        refused = (held_out.score(*of, range(held_out.n_harmful)) > zero).double().mean().item()
        sys.stdout.write(
            f"{name}: KL {best.mean_kl:.5f}, refused {best.refused(zero):.3f}, front {area(halved, measured):.3f}; "
            f"held out KL {kl:.5f}, refused {refused:.2f}; {best.removal.label}\n"
        )
        sys.stdout.flush()

    say("halving alone", halved.measured)
    say("neighbours", ours.measured)
    for seed in range(N_SEEDS):
        say(f"TPE, seed {seed}", [*halved.measured, *tpe(scorer, halved, directions, n, seed)])


if __name__ == "__main__":
    main(*sys.argv[1:])
