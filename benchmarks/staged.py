"""The staged search against the published one: same prompts, same rule, how close the winners are.

`python -m benchmarks.staged DIRECTORY ...` runs it on models of one's own, such as retrains of the embedded one.
"""

import functools
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks.common import arguments, compare, load_both, measured, report
from benchmarks.sweep import PublishedSweep, Scores, find_candidates, last_positions
from refusal_mi.directions import DirectionGrid, cosine
from refusal_mi.labels import discover_refusal_tokens
from refusal_mi.measures import next_token_logits
from refusal_mi.model.loading import load_model
from refusal_mi.search.grid import ScoreGrid, select
from refusal_mi.search.staged import staged_sweep
from refusal_mi.search.thresholds import CandidateScore, Thresholds


def as_grid(scores: Scores, n_layers: int) -> ScoreGrid:
    """What the published search measured, for the published rule."""
    return ScoreGrid(tuple(CandidateScore(*place, *values) for place, values in scores.items()), n_layers)


def distance(grid: DirectionGrid, rule: Thresholds, published: Scores, ours: ScoreGrid) -> float:
    """1 − cosine of the two winners."""
    winners = [select(scores, rule).best for scores in (as_grid(published, grid.n_layers), ours)]
    return abs(1.0 - cosine(*(grid.direction(best.position, best.layer) for best in winners)))


def main() -> None:
    """Run one row per model."""
    directories = [part for part in sys.argv[1:] if Path(part).is_dir()]
    sys.argv = [part for part in sys.argv if part not in directories]
    args = arguments(__doc__)
    for directory in directories or [None]:
        if directory is None:
            hooked, plain, tokenizer = load_both(args.model, args.device)
            name = args.model
        else:
            hooked, name = load_model(directory, device=args.device), Path(directory).name
            plain = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").to(args.device).eval()
            tokenizer = hooked.tokenizer
        chat, grid, harmful, harmless = find_candidates(hooked, tokenizer, long_template=args.long_template)
        is_random = directory is None and name != "embedded"
        rule = Thresholds(kl_max=None, induce_min=None) if is_random else Thresholds()
        # A random model refuses nothing: any tokens do.
        logits = [next_token_logits(hooked, chat, side) for side in (harmful, harmless)]
        tokens = (40, 41) if is_random else discover_refusal_tokens(*logits)
        grid, published = last_positions(grid, args.positions), PublishedSweep(plain, tokenizer, chat)
        run = functools.partial(published.run, grid, harmful, harmless, tokens)
        row = compare(
            f"staged search, {name}, {'long' if args.long_template else 'short'} template, {args.device}",
            measured(run) if is_random and args.device == "cpu" else run,
            lambda: staged_sweep(hooked, chat, grid, harmful, harmless, tokens, thresholds=rule),
            lambda a, b: distance(grid, rule, a, b),
            must_reach=10.0,
            n_pairs=args.pairs,
            # Among the directions of a random model there is nothing to find.
            largest_allowed=2.0 if is_random else 0.02,
            note="1 − cosine to the published winner" + ("; random weights: no meaning" if is_random else ""),
        )
        report(row)


if __name__ == "__main__":
    main()
