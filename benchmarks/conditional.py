"""Refusals under conditional and unconditional steering: `python -m benchmarks.conditional [RUN]`.

Of the embedded model, whose tables are written into the page, or of the model of a run folder, whose direction is added
and whose tables are printed.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from refusal_mi.cli.tables import print_lines
from refusal_mi.conditional import Condition, Conditional, best_threshold, learn_threshold, separation
from refusal_mi.directions import Direction, difference_in_means
from refusal_mi.errors import UserError
from refusal_mi.files import write_text
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate, Add, Interventions, as_interventions
from refusal_mi.judges.substring import SubstringJudge
from refusal_mi.model.loading import load_model
from refusal_mi.model.provenance import check_same_weights
from refusal_mi.reading import mean_activations, template_residuals
from refusal_mi.run.folder import RunInputs, RunRecord
from refusal_mi.stats import Paired, Rate
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts

PAGE = Path(__file__).parent.parent / "docs" / "conditional.md"
START, END = "<!-- {} -->\n", "<!-- end -->"
SIDES = ("harmful", "harmless")
N_TRAIN, N_VALIDATION, N_TEST, N_TOKENS, N_CONTROLS = 128, 96, 128, 16, 20
ACTED, READ = 3, 2
"""The layer that is steered, and the one below, where the condition is read."""


N_REAL = 40
"""Held-out prompts a side of the model of a run."""


class Bench:
    """The model, its prompts, the direction that is added or ablated, and the condition's, of the layer below."""

    def __init__(self, run: str | None) -> None:
        if run is None:
            self.model = load_model(device="cpu")
            self.chat = ChatFormat(self.model.tokenizer)
            sizes = {"train": N_TRAIN, "val": N_VALIDATION, "test": N_TEST}
            self.prompts = {
                (side, part): list(load_prompts(f"organism_{side}_{part}")[:n])
                for side in SIDES
                for part, n in sizes.items()
            }
            means = [mean_activations(self.model, self.chat, self.prompts[side, "train"]) for side in SIDES]
            grid = difference_in_means(*means)
            self.acted, self.read = grid.direction(-1, ACTED), grid.direction(-1, READ)
        else:
            made = RunRecord.load(run).run.model
            given = RunInputs(load_model(made.source, revision=made.revision, device="cpu"), run, N_REAL)
            check_same_weights(made, given.model, run)
            self.model, self.chat, self.acted = given.model, given.chat, given.direction
            self.read = given.grid.direction(-1, given.direction.layer - 1)
            whole = RunInputs(given.model, run, 10**6)
            of_part = {"val": whole, "test": given}
            self.prompts = {(side, part): each.prompts(side, part) for side in SIDES for part, each in of_part.items()}
        self.streams = {
            (side, part): template_residuals(self.model, self.chat, prompts, layers=[self.read.layer], n_last=1)[
                :, 0, 0
            ].double()
            for (side, part), prompts in self.prompts.items()
            if part != "train"
        }

    def learned(self, direction: Direction, meet: Tensor, others: Tensor) -> Condition:
        """From validation prompts' streams."""
        return Condition(direction, best_threshold(*((each @ direction.unit).tolist() for each in (meet, others))))

    def refused(self, interventions: Interventions) -> dict[str, list[bool]]:
        """Side -> whether each held-out prompt is refused."""
        found = {}
        for side in SIDES:
            prompts = self.prompts[side, "test"]
            answers = generate(
                self.model, self.chat, prompts, interventions=interventions, max_new_tokens=N_TOKENS, batch_size=32
            )
            complied = SubstringJudge().complied(prompts, [answer.text for answer in answers])
            found[side] = [not each for each in complied]
        return found

    def meets(self, condition: Condition) -> dict[str, list[bool]]:
        """Side -> whether each held-out prompt meets a condition."""
        unit = condition.direction.unit
        return {side: condition.holds(self.streams[side, "test"] @ unit).tolist() for side in SIDES}

    def shuffled(self, seed: int) -> tuple[Tensor, Tensor]:
        """Validation prompts' streams of both sides under random labels."""
        sides = [self.streams[side, "val"] for side in SIDES]
        both = torch.cat(sides)
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed)).tolist()
        return both[order[: len(sides[0])]], both[order[len(sides[0]) :]]


def main(run: str | None = None) -> None:
    """Measure, and write both tables."""
    bench, write = Bench(run), write_page if run is None else print_table
    held, validation = ([bench.prompts[side, part] for side in SIDES] for part in ("test", "val"))
    learned = learn_threshold(bench.model, bench.chat, bench.read, *validation)
    condition, on_test = learned.condition, separation(bench.model, bench.chat, learned.condition, *held)
    lines = ["| prompts | AUC | sensitivity | specificity |", "|---" * 4 + "|"]
    for name, found in (("validation, where it was learned", learned.on_validation), ("held out", on_test)):
        lines.append(f"| {name} | {found.auc} | {found.sensitivity} | {found.specificity} |")
    write("threshold", [*lines, "", f"Threshold: {condition.threshold:.2f} residual stream units."])

    lines = ["| | harmful refused | change | harmless refused | change |", "|---" * 5 + "|"]
    plain, added = bench.refused(()), bench.refused(Add(bench.acted))
    lines += [row("plain", plain), row("direction added", added, plain)]
    conditional = bench.refused(Conditional(Add(bench.acted), condition))
    expected = mixed(plain, added, bench.meets(condition))
    n_other = sum(a != b for side in SIDES for a, b in zip(conditional[side], expected[side], strict=True))
    if n_other and run is None:
        raise SystemExit("a prompt was not answered as its verdict says")
    if run is not None:  # rounding in batches can turn a verdict
        print_lines(f"{n_other} of {sum(map(len, held))} prompts were not answered as their verdicts say")
    lines.append(row("added under the condition", conditional, plain))
    random, shuffled = controls(bench)
    lines.append(spread("added under a random direction's condition", random, plain, added))
    lines.append(spread("added under a condition learned from shuffled labels", shuffled, plain, added))

    over = Add(bench.acted, 0.5)
    removed = [
        Ablate(bench.acted, hook=f"blocks.{bench.acted.layer}.hook_resid_pre"),
        Ablate(bench.acted, layers=range(bench.acted.layer, bench.model.cfg.n_layers)),
    ]
    below = Condition(bench.read, condition.threshold, "<")
    base, ablated = bench.refused(over), bench.refused([over, *removed])
    kept = bench.refused([*as_interventions(over), Conditional(removed, below)])
    lines += [row("half a direction added: an over-refusing model", base), row("ablated in it", ablated, base)]
    lines.append(row("ablated in it under the condition, harmless side", kept, base))
    for name, conditions in (("a random direction's condition", random), ("shuffled labels", shuffled)):
        swapped = [Condition(each.direction, each.threshold, "<") for each in conditions_of(conditions)]
        lines.append(spread(f"ablated in it, {name}", [(each, bench.meets(each)) for each in swapped], base, ablated))
    write("refusals", lines)


Control = tuple[Condition, dict[str, list[bool]]]


def controls(bench: Bench) -> tuple[list[Control], list[Control]]:
    """Conditions along random directions turned to the harmful side, and along the direction from shuffled labels."""
    found: tuple[list[Control], list[Control]] = ([], [])
    for seed in range(N_CONTROLS):
        sides = [bench.streams[side, "val"] for side in SIDES]
        random = bench.read.random_like(seed)
        means = [(each @ random.unit).mean() for each in sides]
        random = random if means[0] > means[1] else replace(random, vector=-random.vector)
        for kept, direction, groups in ((found[0], random, sides), (found[1], bench.read, bench.shuffled(seed))):
            condition = bench.learned(direction, *groups)
            kept.append((condition, bench.meets(condition)))
    return found


def conditions_of(controls: Sequence[Control]) -> list[Condition]:
    return [condition for condition, _ in controls]


def row(name: str, refused: dict[str, list[bool]], before: dict[str, list[bool]] | None = None) -> str:
    """Rates of both sides, and their paired change."""
    cells = [name]
    for side in SIDES:
        cells.append(str(Rate.of(refused[side])))
        cells.append("" if before is None else str(Paired.of(before[side], refused[side])))
    return "| " + " | ".join(cells) + " |"


def spread(name: str, controls: Sequence[Control], before: dict[str, list[bool]], always: dict[str, list[bool]]) -> str:
    """Median and range over controls."""
    cells = [f"{name} ({len(controls)})"]
    refused = [mixed(before, always, meets) for _, meets in controls]
    for side in SIDES:
        rates = sorted(Rate.of(each[side]).value for each in refused)
        cells += [f"{rates[len(rates) // 2]:.2f}, {rates[0]:.2f} to {rates[-1]:.2f}", ""]
    return "| " + " | ".join(cells) + " |"


def mixed(
    before: dict[str, list[bool]], always: dict[str, list[bool]], meets: dict[str, list[bool]]
) -> dict[str, list[bool]]:
    """What a condition gives: a prompt that meets it is answered as always, another one as before."""
    return {
        side: [b if met else a for a, b, met in zip(before[side], always[side], meets[side], strict=True)]
        for side in SIDES
    }


def print_table(name: str, lines: Sequence[str]) -> None:
    """On the screen."""
    print_lines("", name, "", *lines)


def write_page(name: str, lines: Sequence[str]) -> None:
    """Between the markers of the page."""
    page, start = PAGE.read_text(encoding="utf-8"), START.format(name)
    before, marker, rest = page.partition(start)
    if not marker:
        raise SystemExit(f"{PAGE} has no line {start.strip()}")
    write_text(PAGE, before + start + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
