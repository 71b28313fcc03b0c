"""Stages: written whole, remembered with what they came from, not done twice."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from refusal_mi.errors import UserError
from refusal_mi.files import read_json, sha256_file, write_json
from refusal_mi.model.provenance import ModelRecord, fingerprint
from refusal_mi.run.stages import Origin, RunFolder

MODEL = ModelRecord("a", None, None, "llama", 2, 8, 16, "float32", "cpu")


@pytest.fixture
def calls():
    return []


def stage(folder: RunFolder, calls: list, inputs: dict, *, value: object = 1, name: str = "s") -> dict[str, str]:
    def compute() -> None:
        calls.append(inputs)
        write_json(folder.path / "out" / f"{name}.json", value)

    return folder.stage(name, inputs, [f"out/{name}.json"], compute, about="one file")


def test_a_stage_is_done_once_per_inputs(tmp_path, calls):
    said = []
    folder = RunFolder(tmp_path, report=said.append)
    first = stage(folder, calls, {"a": 1})
    assert first == {"out/s.json": sha256_file(tmp_path / "out/s.json")}
    assert stage(folder, calls, {"a": 1}, value=2) == first
    assert stage(RunFolder(tmp_path), calls, {"a": 1}) == first
    assert len(calls) == 1 and read_json(tmp_path / "out/s.json") == 1
    assert said == ["s: one file", "s: done before, kept"]
    stage(folder, calls, {"a": 2}, value=2)
    assert len(calls) == 2 and read_json(tmp_path / "out/s.json") == 2
    assert set(folder.seconds()) == {"s"}


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_an_output_that_was_touched_is_computed_again(tmp_path, calls, damage):
    folder = RunFolder(tmp_path)
    stage(folder, calls, {})
    output = tmp_path / "out/s.json"
    output.write_text("[]") if damage == "change" else output.unlink()
    stage(folder, calls, {})
    assert len(calls) == 2 and read_json(output) == 1


def test_fresh_computes_again(tmp_path, calls):
    stage(RunFolder(tmp_path), calls, {})
    stage(RunFolder(tmp_path, fresh=True), calls, {})
    assert len(calls) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_stage_that_fails_is_not_recorded_and_later_done(tmp_path, calls, error):
    folder = RunFolder(tmp_path)
    stage(folder, calls, {"a": 1})

    def compute() -> None:
        write_json(tmp_path / "out/s.json", "half")
        raise error

    with pytest.raises(error):
        folder.stage("s", {"a": 2}, ["out/s.json"], compute)
    assert list((tmp_path / ".stages").glob("*.json")) == []
    stage(folder, calls, {"a": 1})
    assert len(calls) == 2


def test_a_stage_that_does_not_write_its_output_is_a_defect(tmp_path):
    with pytest.raises(RuntimeError, match=r"did not write b\.json"):
        RunFolder(tmp_path).stage("s", {}, ["b.json"], lambda: None)
    assert not (tmp_path / ".stages" / "s.json").exists()


@pytest.mark.parametrize("other", [{"source": "b"}, {"revision": "1"}])
def test_a_folder_of_another_model_or_revision_is_refused(tmp_path, other):
    folder = RunFolder(tmp_path)
    folder.claim(replace(MODEL, **other))
    write_json(tmp_path / "run.json", {"model": {"source": "a", "revision": None, "dtype": "x"}})
    folder.claim(replace(MODEL, dtype="y"))
    with pytest.raises(UserError, match="choose another --output-dir"):
        folder.claim(replace(MODEL, **other))


HOLD = """
import sys, time
from pathlib import Path
from refusal_mi.run.stages import Origin, RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that has the lock of this folder, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_a_dead_ones_lock_taken_over(tmp_path, calls, other_process):
    folder = RunFolder(tmp_path)
    for use in (lambda: stage(folder, calls, {}), lambda: folder.claim(MODEL), lambda: folder.check_weights(MODEL)):
        with pytest.raises(UserError, match=r"another process is at work in .*: wait for it, or choose another"):
            use()
    assert not calls and not (tmp_path / "out").exists()
    other_process.kill()
    other_process.wait()
    folder.claim(MODEL)
    stage(folder, calls, {})
    assert len(calls) == 1


def test_a_folder_that_may_not_be_written_is_read_and_not_worked_in(tmp_path, calls, monkeypatch):
    stage(RunFolder(tmp_path), calls, {})
    opened = Path.open

    def refusing(self, mode="r", *arguments, **options):
        if "r" not in mode:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    RunFolder(tmp_path).claim(MODEL)
    RunFolder(tmp_path).check_weights(MODEL)
    with pytest.raises(UserError, match=r"cannot write .*lock: Permission denied"):
        stage(RunFolder(tmp_path), calls, {"a": 2})
    assert len(calls) == 1


def test_one_process_may_open_its_folder_again_inside_a_stage(tmp_path, calls):
    outer = RunFolder(tmp_path)

    def compute() -> None:
        stage(RunFolder(tmp_path / "." / "x" / ".."), calls, {}, name="inner")
        write_json(tmp_path / "outer.json", 1)

    (tmp_path / "x").mkdir()
    outer.stage("outer", {}, ["outer.json"], compute)
    assert len(calls) == 1
    with outer.locked():
        pass


def test_what_dead_processes_left_goes_and_what_living_ones_write_stays(tmp_path, calls):
    folder = RunFolder(tmp_path)
    stage(folder, calls, {})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = platform.node()
    left = [tmp_path / f"deep/.scores.pt.{node}-{dead.pid}.tmp", tmp_path / f".a.json.{node}-{dead.pid}.0123abcd.tmp"]
    others = [
        tmp_path / f"deep/.b.json.{node}-{os.getpid()}.tmp",
        tmp_path / f"deep/.b.json.elsewhere-{dead.pid}.tmp",
        tmp_path / ".mine.tmp",
    ]
    (tmp_path / "deep").mkdir()
    for path in (*left, *others):
        path.write_text("part")
    folder.claim(MODEL)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_file_is_written_over_what_a_killed_write_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".{name}.{platform.node()}-{dead.pid}.tmp" for name in ("a.json", "b.json", "[a].json")]
    for path in left:
        path.write_text("part")
    write_json(tmp_path / "a.json", 1)
    assert [path.exists() for path in left] == [False, True, True]
    write_json(tmp_path / "[a].json", 1)
    assert [path.exists() for path in left] == [False, True, False]


def model_at(place: Path) -> ModelRecord:
    return replace(MODEL, source=str(place), fingerprint=fingerprint(place))


def test_a_model_that_was_moved_is_the_same_one(tiny_dir, tmp_path, calls):
    first = shutil.copytree(tiny_dir("gpt2"), tmp_path / "a")
    folder, here = RunFolder(tmp_path / "run"), model_at(first)
    origin = Origin(here.source, fingerprint=here.fingerprint)
    folder.sign(here)
    stage(folder, calls, {"model": here})
    second = first.rename(tmp_path / "b")
    there = model_at(second)
    assert origin.is_at(str(second)) and origin.is_at(str(first)) and not origin.is_at(str(tmp_path / "c"))
    folder.check_weights(there)
    stage(folder, calls, {"model": there})
    assert len(calls) == 1 and folder.is_done("s", {"model": there}, ["out/s.json"])
    stage(folder, calls, {"model": replace(there, dtype="bfloat16")})
    assert len(calls) == 2
    (second / "vocab.txt").write_text("another")
    assert not origin.is_at(str(second))
    with pytest.raises(UserError, match="holds a run of "):
        folder.check_weights(model_at(second))


def test_what_its_fingerprint_does_not_hold_whole_is_told_by_its_place(tiny_dir, tmp_path, calls):
    first = shutil.copytree(tiny_dir("gpt2"), tmp_path / "a")
    with (first / "more.safetensors").open("wb") as file:
        file.truncate(65 * 2**20)
    held = replace(model_at(first), fingerprint="held:f")
    for name, here in (("large", model_at(first)), ("held", held)):
        folder = RunFolder(tmp_path / name)
        folder.sign(here)
        stage(folder, calls, {"model": here})
        second = shutil.copytree(first, tmp_path / f"{name}-copy")  # with its times
        there = replace(here, source=str(second))
        assert not Origin(here.source, fingerprint=here.fingerprint).is_at(str(second))
        with pytest.raises(UserError, match="holds a run of "):
            folder.check_weights(there)
        before = len(calls)
        stage(folder, calls, {"model": there})
        assert len(calls) == before + 1
