"""combos, compare-methods and localize leave the same files here, in any order, and on two workers of Ray."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.files import read_json
from tests.helpers.engines import Poisoned, Shuffled

pytestmark = pytest.mark.slow

RUN = "--n-train=6 --n-val=18 --n-test=5 --n-ce=3 --max-new-tokens=4 --no-thresholds --no-filter --refusal-tokens=40,41"
SMALL = "--n-prompts=18 --max-new-tokens=3 --n-random=1 --kl-tokens=2"
COMMANDS = {
    "combos": "combos MODEL --ranks=0..2 --kl-max=9 --n-random=1 --n-ce=3 --val-new-tokens=3 --output-dir=run",
    "compare-methods": "compare-methods MODEL --run=run --methods=mean,median,peel:2,category:2 --n-places=2 --seeds=2 "
    f"--over-refusal=harmless.json {SMALL}",
    "localize": f"localize MODEL --run=run --n-directions=1 {SMALL}",
}
MEASURED = ("seconds", "peak_mib", "created", "opened.json")
"""What differs between two runs that do the same; `opened.json` also by its hash, which a stage keeps."""


def content(folder: Path) -> dict[str, object]:
    """What every file says, without what was measured of the process; pages are made from the files."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items() if key not in MEASURED}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return {
        str(path.relative_to(folder)): plain(read_json(path)) if path.suffix == ".json" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".pt")
    }


@pytest.fixture(scope="module")
def searched(tiny_dir, tmp_path_factory):
    """A folder with a run in it."""
    folder = tmp_path_factory.mktemp("searched")
    for side in ("harmful", "harmless"):
        texts = [f"{side} {'and so on ' * (n % 5)}{n}" for n in range(40)]
        (folder / f"{side}.json").write_text(json.dumps(texts))
    sets = [f"--{side}={folder / side}.json" for side in ("harmful", "harmless")]
    line = ["run", str(tiny_dir("gpt2")), *RUN.split(), *sets, "--steps=directions,selection", "--device=cpu"]
    assert exit_status([*line, f"--output-dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def done(searched, tiny_dir, tmp_path_factory):
    """Do a command in a copy of that folder: the copy, and the exit status."""

    def do(command: str, monkeypatch, engine=None, place: Path | None = None) -> tuple[Path, int]:
        folder = place or tmp_path_factory.mktemp("copy") / "copy"
        if place is None:
            shutil.copytree(searched, folder)
        words = COMMANDS[command].replace("MODEL", str(tiny_dir("gpt2"))).split()
        with monkeypatch.context() as patched:
            patched.chdir(folder)
            if engine is not None:
                patched.setattr("refusal_mi.engine.named.engine_named", lambda *_: nullcontext(engine))
            return folder, exit_status([*words, "--device=cpu"])

    return do


@pytest.fixture(scope="module")
def here(done):
    """Command -> what it leaves in this process."""
    made = {}

    def leaves(command: str, monkeypatch) -> dict[str, object]:
        if command not in made:
            folder, status = done(command, monkeypatch)
            assert status == 0
            made[command] = content(folder)
        return made[command]

    return leaves


@pytest.fixture(scope="module")
def two_workers():
    """Two workers of a cluster that starts and ends here."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'refusal_mi[ray]'")
    from refusal_mi.engine.cluster import RayEngine

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with RayEngine(n_workers=2) as engine:
        yield engine
    ray.shutdown()


@pytest.mark.parametrize("command", COMMANDS)
def test_any_order_leaves_the_files_of_this_process(command, done, here, monkeypatch):
    folder, status = done(command, monkeypatch, Shuffled(1, times=2))
    assert status == 0 and content(folder) == here(command, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_workers_leave_the_files_of_this_process(command, done, here, two_workers, monkeypatch):
    folder, status = done(command, monkeypatch, two_workers)
    assert status == 0 and content(folder) == here(command, monkeypatch)


@pytest.mark.parametrize(
    "command, poison, missing",
    [("combos", "0-2", "combos/0-2.json"), ("compare-methods", "median:1 (curve)", "methods/median-1/held_out.json")],
)
def test_what_fails_is_named_and_all_else_is_kept(command, poison, missing, done, here, monkeypatch, capsys):
    folder, status = done(command, monkeypatch, Poisoned(poison))
    said = capsys.readouterr().err
    assert status == 2 and f"1 of 1 items failed: {poison}" in said.splitlines()[-1]
    assert not (folder / "run" / missing).exists()
    kept = {path: path.read_bytes() for path in (folder / "run").rglob(".stages/*.json")}
    assert done(command, monkeypatch, place=folder)[1] == 0
    assert content(folder) == here(command, monkeypatch)
    assert len(kept) > 6 and all(path.read_bytes() == before for path, before in kept.items())
