"""The stages of a comparison of methods: what is chosen on validation prompts, and measured once on held-out ones."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_json, write_record, write_tensors
from ..interventions import Ablate
from ..measures import ScoredText, ce_loss, texts_to_score
from ..model.points import write_hooks
from ..model.provenance import ModelRecord, describe_model, versions
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.methods import AtStrength, ControlRow, Opened
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.localize import expected_refused
from ..search.methods import CLOSE, STRENGTHS, Curve, crossing_ends
from ..search.passes import Basis
from ..search.removals import RemovalScorer
from ..stats import Rate, mean_interval
from ..text.prompts import load_prompts
from ..values import Value
from .localize import judged_answers, removal_scorer
from .spans import NoDirections, Spans

AS_FEW = 0.5
"""Prompts by which a place may leave more refusals than the run's own direction and still count as leaving as few."""
N_TEXTS = 64
"""Plain texts that CE is measured on."""


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(Value):
    """`{label}/chosen.json`; the basis lies beside it."""

    layer: int
    position: int | None
    expected: float
    kl_nats: float
    """On validation prompts."""


@dataclass(frozen=True, eq=False, repr=False)
class HeldOut(Value):
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

    def with_more(self, other: "HeldOut") -> "HeldOut":
        """Both, in the order of their strengths."""
        names = ("strengths", "refused", "scores", "kl")
        tables = [zip(*(getattr(each, name) for name in names), strict=True) for each in (self, other)]
        return HeldOut(*zip(*sorted(row for table in tables for row in table), strict=True))

    def at_strengths(self, zero: float) -> tuple[AtStrength, ...]:
        rows = zip(self.strengths, self.refused, self.scores, self.kl, strict=True)
        return tuple(
            AtStrength(strength, Rate.of(refused), Rate.of([score > zero for score in scores]), mean_interval(list(kl)))
            for strength, refused, scores, kl in rows
        )


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Value):
    refused: tuple[bool, ...]
    degenerate: tuple[bool, ...]
    ce_loss: float


@dataclass
class Comparison:
    """The stages: each written whole, and kept while what it was computed from is the same."""

    run: RunInputs
    folder: RunFolder
    kl_tokens: int
    n_places: int
    max_new_tokens: int
    batch_size: int | None
    hashes: dict[str, str] = field(default_factory=dict)
    """Label -> that of its basis."""
    _of_draw: dict[int, Spans] = field(default_factory=dict)

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

    def _spans_of(self, draw: int) -> Spans:
        if draw not in self._of_draw:
            self._of_draw[draw] = self.spans.of_draw(draw)
        return self._of_draw[draw]

    def _checkpoint(self, label: str) -> Path:
        """The file that a fit goes on from."""
        path = self.folder.path / folder_of(label) / f"checkpoint-{sha256_json(self.inputs)[:16]}.pt"
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

    def chosen(self, name: str, k: int, draw: int = 0) -> Chosen:
        """The best place of a method on validation prompts.

        Args:
            draw: of the training prompts; 0 is all of them.

        Raises:
            NoDirections: the method gives none.
        """
        label = label_of(name, k, draw)
        where = f"{folder_of(label)}/chosen.json", f"{folder_of(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.spans.places, "as_few": AS_FEW}
        inputs |= {"draw": draw} if draw else {}
        if ":" in name:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed

        def compute() -> None:
            try:
                trials = self._spans_of(draw).trials(name, k)
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
            write_record(self.folder.path / where[0], Chosen(layer, position, shares[best].item(), kl[best].item()))

        about = f"{k} direction{'s' * (k > 1)} at up to {len(self.spans.places)} places, validation prompts"
        done = self.folder.stage(f"{stage_of(label)}-chosen", inputs, where, compute, about=about)
        self.hashes[label] = done[where[1]]
        return read_record(self.folder.path / where[0], Chosen)

    def opened(self, labels: Sequence[str], n_draws: int) -> tuple[Opened, ...]:
        """When held-out prompts were looked at, with what is chosen by now; before any of them is."""
        where, chosen = "opened.json", sha256_json(self.hashes)
        path = self.folder.path / where

        def compute() -> None:
            before = read_record(path, _AllOpened).rows if path.is_file() else ()
            used = [label for label in self.hashes if (self.folder.path / folder_of(label) / "held_out.json").is_file()]
            if used and not before:  # a folder of before this file
                whole = len(used) == len(self.hashes)
                before = (Opened(None, tuple(used), 1, chosen if whole else ""),)
            if chosen not in [each.chosen for each in before]:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                before = (*before, Opened(now, tuple(labels), n_draws, chosen))
            write_record(path, _AllOpened(before))

        self.folder.stage(
            "opened", {"chosen": chosen}, [where], compute, about="held-out prompts are used from here on"
        )
        return read_record(path, _AllOpened).rows

    def basis(self, label: str) -> Basis:
        """What a method removes."""
        basis: Tensor = read_tensors(self.folder.path / f"{folder_of(label)}/basis.pt")
        return basis

    def held_out_of(self, label: str, basis: Basis, plain: tuple[bool, ...], reference: Curve | None) -> HeldOut:
        """Answers, scores and KL of held-out prompts at every strength.

        And at more of them where the share of refusals falls to the reference's target: between two strengths of the
        first it may fall from all to none.
        """
        where = f"{folder_of(label)}/held_out.json"
        target = None if reference is None else reference.target.item()

        def compute() -> None:
            found = self._at(basis, plain, (0.0, *STRENGTHS))
            found = self._halved(found, basis, plain, found.curve.target.item() if target is None else target)
            write_record(self.folder.path / where, found)

        about = f"{len(STRENGTHS)} strengths and more between, held-out prompts"
        inputs = self._held_out_inputs(label) | {"target": target}
        self.folder.stage(f"{stage_of(label)}-held-out", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, HeldOut)

    def nearer(
        self, label: str, basis: Basis, plain: tuple[bool, ...], found: HeldOut, targets: Sequence[float]
    ) -> HeldOut:
        """What was measured, and more strengths where the share of refusals falls to each of the targets."""
        where = f"{folder_of(label)}/nearer.json"

        def compute() -> None:
            more = found
            for target in targets:
                more = self._halved(more, basis, plain, target)
            write_record(self.folder.path / where, more)

        about = f"strengths where {', '.join(f'{each:.2f}' for each in targets)} are refused, held-out prompts"
        inputs = self._held_out_inputs(label) | {"targets": targets, "before": found.strengths}
        self.folder.stage(f"{stage_of(label)}-nearer", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, HeldOut)

    def _held_out_inputs(self, label: str) -> dict[str, Any]:
        return self.inputs | {
            "basis": self.hashes[label],
            "strengths": STRENGTHS,
            "close": CLOSE,
            "n": self.run.options.label_tokens,
        }

    def _halved(self, found: HeldOut, basis: Basis, plain: tuple[bool, ...], target: float) -> HeldOut:
        """With strengths halfway between those around a target, until they are close."""
        while True:
            ends = crossing_ends(found.curve, target)
            if ends is None or ends[1] - ends[0] < CLOSE:
                return found
            found = found.with_more(self._at(basis, plain, [sum(ends) / 2]))

    def _at(self, basis: Basis, plain: tuple[bool, ...], strengths: Sequence[float]) -> HeldOut:
        """Answers, scores and KL of held-out prompts."""
        scorer, names = self.held_out, write_hooks(self.run.model.cfg.n_layers)
        answered = judged_answers(self.run, self.run.prompts("harmful"), self.run.options.label_tokens)
        weights, bases = [dict.fromkeys(names, each) for each in strengths], [basis] * len(strengths)
        scores = scorer.score(bases, weights, range(scorer.n_harmful)).tolist()
        kl = scorer.kl(bases, weights, range(scorer.n_harmless)).tolist()
        refused = [plain if each == 0 else answered([Ablate(basis, each)]).refused for each in strengths]
        return HeldOut(tuple(strengths), tuple(refused), tuple(map(tuple, scores)), tuple(map(tuple, kl)))

    def plain_refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each held-out prompt, in a short answer."""
        where, n_tokens = "plain.json", self.run.options.label_tokens

        def compute() -> None:
            judged = judged_answers(self.run, self.run.prompts("harmful"), n_tokens)([])
            write_json(self.folder.path / where, judged.refused)

        self.folder.stage("plain", self.inputs | {"n": n_tokens}, [where], compute, about="short answers")
        return read_record(self.folder.path / where, tuple[bool, ...])  # type: ignore[no-any-return]

    def answers(self, label: str, basis: Basis | None, strength: float) -> Answers:
        """Judged answers to the held-out harmful prompts, and CE on plain texts."""
        where = f"{folder_of(label)}/answers.json"

        def compute() -> None:
            run = self.run
            steps = [] if basis is None else [Ablate(basis, strength)]
            judged = judged_answers(run, self.run.prompts("harmful"), self.max_new_tokens)(steps)
            loss = ce_loss(run.model, run.chat, self._texts(), interventions=steps)
            record = Answers(judged.refused, judged.degenerate, loss.ce_loss)
            write_record(self.folder.path / where, record)

        inputs = self.inputs | {"basis": self.hashes.get(label), "strength": strength, "n": self.max_new_tokens}
        inputs |= {"texts": self.run.options.text_set, "seed": self.run.options.seed}
        about = f"answers of {self.max_new_tokens} tokens and CE at strength {strength:.3g}"
        self.folder.stage(f"{stage_of(label)}-answers", inputs, [where], compute, about=about)
        return read_record(self.folder.path / where, Answers)

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


@dataclass(frozen=True, eq=False, repr=False)
class _AllOpened(Value):
    rows: tuple[Opened, ...]


def label_of(name: str, k: int, draw: int = 0) -> str:
    """What is found from one draw of the training prompts: "peel:2", or "draw 1/peel:2"."""
    return f"draw {draw}/{name}:{k}" if draw else f"{name}:{k}"


def folder_of(label: str) -> str:
    """Where its files lie."""
    return "/".join(re.sub(r"\W+", "-", part) for part in label.split("/"))


def stage_of(label: str) -> str:
    """The same as part of a stage's name."""
    return folder_of(label).replace("/", "-")
