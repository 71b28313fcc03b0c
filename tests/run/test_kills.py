"""Processes that are killed at random times and started again end with the files of one that was not, byte for byte.

REFUSAL_MI_KILLS kills; `make long` has many.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

N_KILLS = int(os.environ.get("REFUSAL_MI_KILLS", "6"))
RUN = "--n-train=6 --n-val=4 --n-test=3 --n-ce=3 --max-new-tokens=6 --kl-max=inf --induce-min=-inf --no-filter"
COMMANDS = {
    "run": f"run MODEL {RUN} --refusal-tokens=40 --harmful=harmful.json --harmless=harmless.json --output-dir=out",
    "caa vectors": "caa vectors MODEL --device cpu --pairs pairs.json --output-dir out",
    "export": "export MODEL --direction direction.pt --output-dir out --verify none",
    "compare-methods": "compare-methods MODEL --run searched --methods mean,median,peel:2 --n-prompts 3 --n-places 2 "
    "--max-new-tokens 4 --n-random 1 --seeds 2 --output-dir out",
    "variants": "variants MODEL --run searched --variants variants.json --n-prompts 3 --max-new-tokens 4 "
    "--output-dir out",
}
MEASURED = ("seconds", "peak_mib", "created", "opened.json")
"""What differs between two runs that do the same."""


@pytest.fixture(scope="module")
def place(tiny_dir, tmp_path_factory):
    """Files that the commands read, and how to start one of them in a copy of this folder."""
    from tests.helpers.directions import random_direction

    folder = tmp_path_factory.mktemp("kills")
    for side in ("harmful", "harmless"):
        (folder / f"{side}.json").write_text(json.dumps([f"{side} {n}" for n in range(24)]))
    question = "Is {} a word?\n\nChoices:\n(A) I cannot say.\n(B) Yes."
    keys = ("answer_matching_behavior", "answer_not_matching_behavior")
    pairs = [
        {"question": question.format("x" * n), **dict(zip(keys, "AB"[:: (-1) ** n], strict=True))} for n in range(8)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    wordings = [{"name": "after", "template": "{instruction} now"}, {"name": "system", "system": "Be kind."}]
    (folder / "variants.json").write_text(json.dumps(wordings))
    random_direction().save(folder / "direction.pt")
    words = f"{COMMANDS['run'].removesuffix('--output-dir=out')} --steps=directions,selection --output-dir=searched"
    line = [sys.executable, "-m", "refusal_mi", *words.replace("MODEL", str(tiny_dir("gpt2"))).split()]
    subprocess.run(line, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def start(place, tiny_dir, tmp_path_factory):
    """Start a command in a folder, with the inputs linked into it."""

    def started(command: str, folder: Path) -> subprocess.Popen:
        for path in place.iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
        words = COMMANDS[command].replace("MODEL", str(tiny_dir("gpt2"))).split()
        command_line = [sys.executable, "-m", "refusal_mi", *words]
        return subprocess.Popen(command_line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return started


def content(folder: Path) -> dict[str, object]:
    """What every file under `out` says, without what was measured of the process; pages are made from the files."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items() if key not in MEASURED}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    files = [path for path in (folder / "out").rglob("*") if path.is_file() and path.suffix != ".html"]
    return {
        str(path.relative_to(folder)): plain(json.loads(path.read_text()))
        if path.suffix == ".json"
        else path.read_bytes()
        for path in files
    }


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Command -> what it leaves when nobody kills it, and how long it takes."""
    made = {}

    def done(command: str) -> tuple[dict[str, object], float]:
        if command not in made:
            folder, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
            process = start(command, folder)
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
            made[command] = content(folder), time.monotonic() - begun
        return made[command]

    return done


@pytest.mark.slow
@pytest.mark.parametrize("number", range(N_KILLS))
def test_a_killed_process_is_taken_up_where_it_was(number, start, whole, tmp_path):
    command = ("run", "caa vectors", "run", "export", "run", "compare-methods", "variants")[number % 7]
    expected, seconds = whole(command)
    rng = random.Random(number)
    for _ in range(rng.choice((1, 2))):
        process = start(command, tmp_path)
        try:
            process.wait(timeout=seconds * rng.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    process = start(command, tmp_path)
    _, said = process.communicate(timeout=300)
    is_there = command == "export" and "exists; choose another" in said
    assert (process.returncode == 0 or is_there) and "Traceback" not in said, said
    assert content(tmp_path) == expected
    assert not [path for path in tmp_path.rglob(".*.tmp")]
