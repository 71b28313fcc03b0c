"""A local Ray cluster gives the numbers of this process, whatever happens to its workers.

REFUSAL_MI_KILLS workers are killed (10); `make long` has many.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from refusal_mi.cli import exit_status
from refusal_mi.directions import difference_in_means
from refusal_mi.engine.cluster import RayEngine
from refusal_mi.engine.jobs import Engine, ItemsFailed
from refusal_mi.errors import UserError
from refusal_mi.generation import generate
from refusal_mi.interventions import Ablate
from refusal_mi.model.loading import quiet_load
from refusal_mi.model.provenance import versions
from refusal_mi.reading import mean_activations
from refusal_mi.search.grid import select
from refusal_mi.search.staged import staged_sweep
from refusal_mi.search.sweep import Scorer, ScoreTable, cut, sweep
from refusal_mi.text.chat import ChatFormat
from refusal_mi.text.prompts import load_prompts
from tests.helpers.engines import Squares

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'refusal_mi[ray]'")
pytestmark = pytest.mark.slow

N_KILLS, N_RUNS = int(os.environ.get("REFUSAL_MI_KILLS", "10")), 2
TOKENS = [43]


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def searched():
    """The embedded model, and what a small search of it is made of."""
    model = quiet_load(device="cpu")
    chat = ChatFormat(model.tokenizer)
    sides = [load_prompts(f"organism_{side}_train").instructions for side in ("harmful", "harmless")]
    grid = difference_in_means(*(mean_activations(model, chat, side[:24]) for side in sides))
    return model, chat, grid, *(side[24:32] for side in sides)


@pytest.fixture(scope="module")
def engine(cluster):
    with RayEngine(n_workers=2) as started:
        yield started


def test_a_search_gives_the_scores_and_the_choice_of_this_process(searched, engine):
    assert isinstance(engine, Engine)
    for search in (sweep, staged_sweep):
        here, there = search(*searched, TOKENS), search(*searched, TOKENS, engine=engine)
        assert there == here and select(there).best == select(here).best


def test_answers_are_those_of_this_process(searched, engine):
    model, chat, grid, harmful, harmless = searched
    how = {"interventions": Ablate(grid.direction(-1, 5)), "max_new_tokens": 8, "batch_size": 3}
    here = generate(model, chat, [*harmful, *harmless], **how)
    assert generate(model, chat, [*harmful, *harmless], **how, engine=engine) == here
    assert len({answer.text for answer in here}) > 8


@pytest.mark.parametrize(
    "poison, why", [("raises", "ArithmeticError: no square of a word"), ("dies", "its worker ended")]
)
def test_an_item_that_fails_or_kills_fails_alone_after_two_tries(searched, engine, tmp_path, poison, why):
    items, got = [0, 1, poison, 3, 4, 5], {}
    with pytest.raises(ItemsFailed, match=f"1 of 6 items failed, tried 2 times each: {poison}: {why}"):
        for index, result in engine.run(Squares(tmp_path / "log"), searched[0], items):
            got[index] = result
    tries = Counter((tmp_path / "log").read_text().split())
    assert got == {0: 0, 1: 1, 3: 9, 4: 16, 5: 25}
    assert tries == {"0": 1, "1": 1, poison: 2, "3": 1, "4": 1, "5": 1}


def test_a_mistake_is_raised_as_it_is_here_at_once(searched, engine):
    with pytest.raises(UserError, match="no room for an answer") as there:
        generate(searched[0], searched[1], ["word " * 2000, "Hi"], engine=engine, batch_size=1)
    assert not isinstance(there.value, ItemsFailed)


@pytest.mark.parametrize("number", range(N_RUNS))
def test_workers_killed_at_random_moments_change_nothing(searched, engine, number, monkeypatch):
    _, _, _, harmful, harmless = searched
    here, there = (ScoreTable(Scorer(*searched, [TOKENS])) for _ in range(2))
    n_harmful, n = len(harmful), len(harmful) + len(harmless)
    items = [
        *cut("add", here.open, range(n_harmful, n), n_rows=2 * n_harmful),
        *cut("ablate", here.open, range(n), n_rows=2 * n),
    ]
    for item in items:
        here.run(item)
    draw, came, is_over, killed = random.Random(number), threading.Event(), threading.Event(), list[int]()

    def kill() -> None:
        """After a result, at a random moment, a random worker: one that works or one that gets ready."""
        while len(killed) < -(-N_KILLS // N_RUNS) and not is_over.is_set():
            if not came.wait(0.1):
                continue
            came.clear()
            is_over.wait(draw.uniform(0, 0.5))
            workers = worker_processes()
            for each in draw.sample(workers, min(1, len(workers))):
                each.kill()
                killed.append(each.pid)

    monkeypatch.setattr(engine, "n_tries", 8)  # a killer at random may hit one item several times
    killer = threading.Thread(target=kill)
    killer.start()
    for _ in there.done(items, engine):
        came.set()
    is_over.set()
    killer.join()
    assert len(set(killed)) == -(-N_KILLS // N_RUNS)
    assert there.grids() == here.grids()


def worker_processes(of: int | None = None) -> list[psutil.Process]:
    """The workers below this process or another one, by the title that Ray gives them."""

    def title(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            return ""

    return [each for each in psutil.Process(of).children(recursive=True) if title(each).startswith("ray::Worker")]


def test_a_run_leaves_the_files_of_a_local_one_and_each_goes_on_where_the_other_ended(cluster, tiny_dir, tmp_path):
    for side in ("harmful", "harmless"):
        (tmp_path / f"{side}.json").write_text(json.dumps([f"{side} {n}" for n in range(24)]))
    words = "--n-train=6 --n-val=4 --n-test=3 --n-ce=3 --max-new-tokens=4 --kl-max=inf --induce-min=-inf --no-filter"
    sets = [f"--{side}={tmp_path / side}.json" for side in ("harmful", "harmless")]
    line = ["run", str(tiny_dir("gpt2")), *words.split(), "--refusal-tokens=40", "--device=cpu", *sets]

    def run(folder: Path, *more: str) -> None:
        assert exit_status([*line, f"--output-dir={folder}", *more]) == 0

    run(tmp_path / "here")
    run(tmp_path / "there", "--engine=ray", "--workers=1")
    assert content(tmp_path / "there") == content(tmp_path / "here")
    records = [tmp_path / "there" / ".stages" / f"{name}.json" for name in ("scores", "completions_harmful_ablation")]
    before = [record.read_bytes() for record in records]
    run(tmp_path / "there")
    assert [record.read_bytes() for record in records] == before


@pytest.mark.parametrize("is_own", [True, False], ids=["own cluster", "a cluster that goes on"])
def test_a_killed_run_leaves_no_workers_and_goes_on(cluster, tiny_dir, tmp_path, is_own):
    for side in ("harmful", "harmless"):
        (tmp_path / f"{side}.json").write_text(json.dumps([f"{side} {n}" for n in range(60)]))
    words = "--n-train=6 --n-val=40 --n-test=2 --no-thresholds --no-filter --steps=directions,selection --device=cpu"
    sets = [f"--{side}={tmp_path / side}.json" for side in ("harmful", "harmless")]
    line = ["run", str(tiny_dir("gpt2")), *words.split(), "--refusal-tokens=40", *sets]
    assert exit_status([*line, f"--output-dir={tmp_path / 'whole'}"]) == 0
    address = "local" if is_own else ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "refusal_mi", *line, f"--output-dir={tmp_path / 'out'}", "--engine=ray"]
    begun = subprocess.Popen([*command, "--workers=1"], env={**os.environ, "RAY_ADDRESS": address})
    before = {each.pid for each in worker_processes()}
    for _ in range(1200):
        there = [*worker_processes(begun.pid), *worker_processes()]
        started = [each for each in there if each.pid not in before]
        if started or begun.poll() is not None:
            break
        time.sleep(0.1)
    assert started and begun.poll() is None
    time.sleep(random.Random(is_own).uniform(0, 2))
    records = tmp_path / "out" / ".stages"
    kept = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert {"prompts.json", "directions.json"} <= set(kept) and "scores.json" not in kept
    begun.kill()
    begun.wait()
    assert not psutil.wait_procs(started, timeout=60)[1], "workers outlive the run"
    assert exit_status([*line, f"--output-dir={tmp_path / 'out'}"]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {name: (records / name).read_bytes() for name in kept} == kept


def content(folder: Path) -> dict[str, object]:
    """What the files say, without times, memory, and pages, which are made from the files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".html"]
    files = [path for path in files if ".stages" not in path.parts and path.name != "summary.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_workers_with_other_versions_are_refused_in_one_line(searched, cluster, monkeypatch, tmp_path):
    monkeypatch.setattr("refusal_mi.engine.same.versions", lambda: versions() | {"tokenizers": "0.1"})
    with RayEngine(n_workers=1) as engine, pytest.raises(UserError, match=r"tokenizers .*, and this process 0\.1: "):
        list(engine.run(Squares(tmp_path / "log"), searched[0], [1]))


def test_weights_edited_between_two_runs_of_one_job_are_refused(cluster, tiny_dir, tmp_path):
    model, job = quiet_load(str(tiny_dir("gpt2")), device="cpu"), Squares(tmp_path / "log")
    weight = next(model.original_model.parameters()).data  # edits of .data count no version
    with RayEngine(n_workers=1) as engine:
        assert dict(engine.run(job, model, [2, 3])) == {0: 4, 1: 9}
        weight.mul_(2)
        with pytest.raises(UserError, match="they were edited after they were loaded"):
            list(engine.run(job, model, [2, 3]))
        weight.div_(2)
        assert dict(engine.run(job, model, [2, 3])) == {0: 4, 1: 9}


def test_a_full_object_store_and_too_many_workers_are_one_line(searched, cluster, monkeypatch, tmp_path):
    def full(_: object) -> None:
        raise ray.exceptions.ObjectStoreFullError("Failed to put object\nmore about it")

    with RayEngine(n_workers=99) as engine, pytest.raises(UserError, match=r"Ray has 8 CPUs .* too few for 99 workers"):
        list(engine.run(Squares(tmp_path / "log"), searched[0], [1]))
    monkeypatch.setattr(ray, "put", full)
    with (
        RayEngine(n_workers=1) as engine,
        pytest.raises(UserError, match=r"Ray's object store is full: .*object-store"),
    ):
        list(engine.run(Squares(tmp_path / "log"), searched[0], [1]))


@pytest.mark.parametrize(
    "address, message",
    [
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1: "),
        ("ray://nowhere", "address is ray://HOST:PORT, not 'ray://nowhere'"),
    ],
)
def test_an_address_where_nothing_answers_is_one_line(address, message, capsys, tmp_path):
    assert exit_status(["run", f"--engine={address}", f"--output-dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
