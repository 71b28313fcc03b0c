"""The stages of a comparison of methods: what is chosen on validation prompts, and measured once on held-out ones."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from torch import Tensor

from ..engine.jobs import Engine
from ..errors import UserError
from ..estimators.names import FITTED
from ..files import read_record, read_tensors, sha256_file, sha256_json, write_json, write_record, write_tensors
from ..measures import ScoredText, texts_to_score
from ..model.provenance import ModelRecord, describe_model, versions
from ..run.answers import SIDES
from ..run.folder import RunInputs
from ..run.methods import ControlRow, Opened
from ..run.record import DIRECTION, EVALUATIONS, MEAN_DIFFS, PROMPTS, RUN, RunInfo
from ..run.stages import RunFolder
from ..search.localize import expected_refused
from ..search.methods import CLOSE, STRENGTHS
from ..search.passes import Basis
from ..text.prompts import load_prompts
from ..values import Value
from .effects import texts_sha256
from .pieces import Piece, Pieces
from .removing import Answers, HeldOut, Removing, Task
from .spans import NoDirections, Spans

AS_FEW = 0.5
"""Prompts by which a place may leave more refusals than the run's own direction and still count as leaving as few."""
N_TEXTS = 64
"""Plain texts that CE is measured on."""
Record = TypeVar("Record")


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(Value):
    """`{label}/chosen.json`; the basis lies beside it."""

    layer: int
    position: int | None
    expected: float
    kl_nats: float
    """On validation prompts."""


@dataclass
class Comparison:
    """The stages: each written whole, and kept while what it was computed from is the same.

    Stages that do not need each other are asked for together, and done side by side where an engine is.
    """

    run: RunInputs
    folder: RunFolder
    kl_tokens: int
    n_places: int
    max_new_tokens: int
    batch_size: int | None
    engine: Engine | None = None
    """Where models are run; None is here."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Label -> that of its basis."""
    _of_draw: dict[int, Spans] = field(default_factory=dict)

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
        """What is measured on held-out prompts, and beside them."""
        job = Removing.of(self.run, "test", self.kl_tokens, self.batch_size, self.max_new_tokens)
        return Pieces(self.folder, replace(job, texts=self.texts), self.run.model, self.engine)

    @cached_property
    def texts(self) -> tuple[ScoredText, ...]:
        """Plain texts that CE is measured on."""
        run = self.run
        texts = load_prompts(run.options.text_set, limit=N_TEXTS)
        some = texts.sample(min(N_TEXTS, len(texts)), run.options.seed)
        return tuple(texts_to_score(run.chat, some.instructions))

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

    def chosen(self, methods: Sequence[tuple[str, int]], draw: int = 0) -> tuple[dict[str, Chosen], dict[str, str]]:
        """The best place of every method on validation prompts, and why others give no directions.

        Args:
            draw: of the training prompts; 0 is all of them.

        Returns:
            Both by label, whatever the draw.
        """
        pieces = {method: self._choosing(*method, draw) for method in methods}
        together = [each for (name, _), each in pieces.items() if name not in FITTED]
        alone = [[each] for (name, _), each in pieces.items() if name in FITTED]
        done: dict[str, str] = {}
        for some in (together, *alone):  # a fit is kept before the next begins
            done |= self.validation.run(some)
        found, skipped = dict[str, Chosen](), dict[str, str]()
        for (name, k), piece in pieces.items():
            record, basis = piece.outputs
            if piece.name in self.validation.left_out:
                skipped[label_of(name, k)] = self.validation.left_out[piece.name]
                continue
            self.hashes[label_of(name, k, draw)] = done[basis]
            found[label_of(name, k)] = read_record(self.folder.path / record, Chosen)
        return found, skipped

    def _choosing(self, name: str, k: int, draw: int) -> Piece:
        label = label_of(name, k, draw)
        where = f"{folder_of(label)}/chosen.json", f"{folder_of(label)}/basis.pt"
        inputs = self.inputs | {"label": label, "places": self.spans.places, "as_few": AS_FEW}
        inputs |= {"draw": draw} if draw else {}
        if ":" in name:
            inputs |= {"call": str(uuid4())}  # a function of the user's own, which may have changed
        trials: list[tuple[tuple[int | None, int], Basis]] = []

        def item() -> Task:
            try:
                trials[:] = self._spans_of(draw).trials(name, k)
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
            write_record(self.folder.path / where[0], Chosen(layer, position, shares[best].item(), kl[best].item()))

        about = f"{k} direction{'s' * (k > 1)} at up to {len(self.spans.places)} places, validation prompts"
        return Piece(f"{stage_of(label)}-chosen", inputs, where, about, item, write)

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

    def held_out_of(
        self, bases: Mapping[str, Basis], plain: tuple[bool, ...], targets: Mapping[str, float]
    ) -> dict[str, HeldOut]:
        """Answers, scores and KL of held-out prompts at every strength.

        And at more of them where the share of refusals falls to a target: between two strengths of the first it may
        fall from all to none.

        Args:
            targets: the reference's share of refusals; of what is not in it, its own.
        """
        about, where = f"{len(STRENGTHS)} strengths and more between, held-out prompts", "held_out.json"
        pieces = []
        for label, basis in bases.items():
            target = targets.get(label)
            inputs = self._held_out_inputs(label) | {"target": target}
            pieces.append(self.piece(label, where, inputs, about, Task("curve", label, (basis, plain, target))))
        return self._read(pieces, bases, HeldOut)

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
            inputs = self._held_out_inputs(label) | {"targets": some, "before": found[label].strengths}
            task = Task("nearer", label, (found[label], bases[label], plain, some))
            pieces.append(self.piece(label, "nearer.json", inputs, about, task))
        return self._read(pieces, targets, HeldOut)

    def _held_out_inputs(self, label: str) -> dict[str, Any]:
        return self.inputs | {
            "basis": self.hashes[label],
            "strengths": STRENGTHS,
            "close": CLOSE,
            "n": self.run.options.label_tokens,
        }

    def piece(self, label: str, file: str, inputs: Mapping[str, Any], about: str, task: Task) -> Piece:
        """A stage of a method, whose result is a file in its folder."""
        where, name = f"{folder_of(label)}/{file}", Path(file).stem.replace("_", "-")
        write = partial(write_record, self.folder.path / where)
        return Piece(f"{stage_of(label)}-{name}", inputs, [where], about, lambda: task, write)

    def _read(self, pieces: Sequence[Piece], labels: Iterable[str], kind: type[Record]) -> dict[str, Record]:
        """Do stages on held-out prompts; the file of each."""
        self.held_out.run(pieces)
        pairs = zip(labels, pieces, strict=True)
        return {label: read_record(self.folder.path / piece.outputs[0], kind) for label, piece in pairs}

    def plain_refused(self) -> tuple[bool, ...]:
        """Whether the plain model refuses each held-out prompt, in a short answer."""
        path, inputs = self.folder.path / "plain.json", self.inputs | {"n": self.run.options.label_tokens}
        task, write = Task("refused", "plain"), partial(write_json, path)
        self.held_out.run([Piece("plain", inputs, [path.name], "short answers", lambda: task, write)])
        return read_record(path, tuple[bool, ...])  # type: ignore[no-any-return]

    def answers(self, removed: Mapping[str, tuple[Basis | None, float]]) -> dict[str, Answers]:
        """Judged answers to the held-out harmful prompts, and CE on plain texts, under removals at a strength."""
        pieces = []
        for label, (basis, strength) in removed.items():
            inputs = self.inputs | {"basis": self.hashes.get(label), "strength": strength, "n": self.max_new_tokens}
            inputs |= {"texts": texts_sha256({"plain": self.texts})}
            about = f"answers of {self.max_new_tokens} tokens and CE at strength {strength:.3g}"
            pieces.append(self.piece(label, "answers.json", inputs, about, Task("answers", label, (basis, strength))))
        return self._read(pieces, removed, Answers)

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


@dataclass(frozen=True, eq=False, repr=False)
class _AllOpened(Value):
    rows: tuple[Opened, ...]


def label_of(name: str, k: int, draw: int = 0) -> str:
    """What is found from one draw of the training prompts: "peel:2", or "draw 1/peel:2"."""
    return in_draw(f"{name}:{k}", draw)


def in_draw(label: str, draw: int) -> str:
    """The same of another draw than all training prompts."""
    return f"draw {draw}/{label}" if draw else label


def folder_of(label: str) -> str:
    """Where its files lie."""
    return "/".join(re.sub(r"\W+", "-", part) for part in label.split("/"))


def stage_of(label: str) -> str:
    """The same as part of a stage's name."""
    return folder_of(label).replace("/", "-")
