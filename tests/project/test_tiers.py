"""Which command runs which tests: those of real models run by `make test-real` alone, and are skipped nowhere."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE, MODELS = "REFUSAL_MI_REAL_MODELS", ("qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def printed_by_make(target: str, models: Path | None = None) -> subprocess.CompletedProcess:
    """What make would run, or why it does not."""
    others = {key: value for key, value in os.environ.items() if key != VARIABLE and not key.startswith("MAKE")}
    named = {} if models is None else {VARIABLE: str(models)}
    command = ["make", "--dry-run", "--assume-old=.venv/.ready", "--assume-old=.venv-hooked/.ready", target]
    return subprocess.run(command, cwd=ROOT, env=others | named, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "has_real"), [("test", False), ("test-fast", False), ("test-real", True)])
def test_real_models_run_only_where_they_are_asked_for(target, has_real, tmp_path):
    for name in MODELS:
        (tmp_path / name).mkdir()
    words = shlex.split(printed_by_make(target, tmp_path).stdout.splitlines()[-1])
    chosen = words[words.index("pytest") + 1 :]
    markers = chosen[chosen.index("-m") : chosen.index("-m") + 2] if "-m" in chosen else []
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n0", "tests/real", *markers]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ("test_run.py" in found.stdout, "deselected" in found.stdout) == (has_real, not has_real)
    assert "skip" not in found.stdout.lower()


def test_what_is_missing_is_one_line_and_status_2(tmp_path):
    (tmp_path / MODELS[1]).mkdir()
    for folder, missing in ((None, MODELS), (tmp_path, MODELS[:1])):
        said = printed_by_make("test-real", folder)
        assert said.returncode == 2 and said.stdout == ""
        (line,) = said.stderr.splitlines()
        assert VARIABLE in line and f"no folder with {' '.join(missing)}." in line
