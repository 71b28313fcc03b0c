"""The table of bad input: `bad_input.tsv` holds a command and what its one line of error says, `MODEL` a tiny model.

The line tells what was wrong; the status is 2, nothing is written and nothing of a stranger's runs.
"""

from pathlib import Path

import pytest

from refusal_mi.cli import exit_status
from tests.helpers.bad_files import make_bad_files

ROWS = [line.split("\t") for line in Path(__file__).with_name("bad_input.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dir):
    """A folder of bad files."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        make_bad_files(folder, tiny_dir("gpt2"))
        yield folder


def contents(place):
    """What lies in a folder: a file that was written again is another one."""
    return {path: None if path.is_dir() else path.stat().st_mtime_ns for path in place.rglob("*")}


def test_the_table_is_long_and_names_nothing_twice():
    assert len({line for line, _ in ROWS}) == len(ROWS) >= 150


@pytest.mark.slow
@pytest.mark.parametrize(("line", "message"), ROWS, ids=[line for line, _ in ROWS])
def test_it_is_one_line(line, message, place, tiny_dir, capsys):
    there = contents(place)
    assert exit_status([str(tiny_dir("gpt2")) if word == "MODEL" else word for word in line.split()]) == 2
    captured = capsys.readouterr()
    errors = [text for text in captured.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and captured.out == "" and "Traceback" not in captured.err and "a defect" not in errors[0]
    assert message in errors[0]
    assert contents(place) == there
