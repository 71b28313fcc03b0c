"""One name, one meaning: an option has the same meaning, default and type in every command that has it.

`options.tsv` says them all: name, type, default, meaning. `python -m tests.cli.test_option_names` writes it again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refusal_mi.cli import app, exit_status
from refusal_mi.cli.shown import plain_command
from refusal_mi.cli.spelling import COMMANDS_OF_BEFORE, DEFAULT_COMMANDS, GROUPS, RENAMED, own_spelling

TABLE = Path(__file__).with_name("options.tsv")


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that is no group, with the words that name it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, each in (inner or {}).items():
        yield from leaves(each, (*path, name))


ROOT = plain_command(app)
COMMANDS = dict(leaves(ROOT))


def said_by(command: Any) -> dict[str, tuple[str, str, str]]:
    """Option -> type, default, meaning."""
    said = {}
    for each in command.params:
        if each.param_type_name == "option" and each.name != "help":
            kind = "flag" if each.is_flag else each.metavar + (", repeatable" if each.multiple else "")
            meaning = (kind, str(getattr(each.default, "value", each.default)), " ".join(each.help.split()))
            said |= {name: meaning for name in (*each.opts, *each.secondary_opts)}
    return said


def table() -> list[str]:
    """The lines of `options.tsv`, one for every different meaning of a name."""
    rows = {(name, *meaning) for command in COMMANDS.values() for name, meaning in said_by(command).items()}
    return sorted("\t".join(row) for row in rows)


def test_a_name_means_one_thing_and_the_table_says_what():
    rows = TABLE.read_text().splitlines()
    assert table() == rows
    names = [row.split("\t")[0] for row in rows]
    assert len(names) == len(set(names)) >= 90
    shared = [name for name in names if sum(name in said_by(command) for command in COMMANDS.values()) > 1]
    assert {"--seed", "--batch-size", "--n-random", "--layers", "--layer", "--output-dir", "--json"} <= set(shared)


def test_two_meanings_of_one_name_would_be_two_rows(monkeypatch):
    """The control: the table would not be what it is."""
    (option,) = (each for each in COMMANDS["analyze",].params if each.name == "seed")
    for change in ({"help": "Of every control."}, {"default": 0}, {"metavar": "X"}):
        with monkeypatch.context() as patched:
            for name, value in change.items():
                patched.setattr(option, name, value)
            assert len([row for row in table() if row.startswith("--seed\t")]) == 2
    assert len([row for row in table() if row.startswith("--seed\t")]) == 1


@pytest.mark.parametrize("words", [(), *COMMANDS, ("caa",), ("export",), ("responses",)], ids=" ".join)
def test_help_fits_80_columns_and_names_no_types_of_python(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_status([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: {' '.join(['refusal-mi', *words])} ")
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(leak in shown for leak in ("<", ">", "{A", "{G", "list[", "x>=", "None"))


def test_names_of_before_are_the_commands_and_options_of_now():
    for before, now in COMMANDS_OF_BEFORE.items():
        assert own_spelling([before, "MODEL", "--top=1"]) == [*now, "MODEL", "--top=1"] and now in COMMANDS
    for command, renamed in RENAMED.items():
        for before, now in renamed.items():
            assert own_spelling([*command, before, "x"]) == [*command, now, "x"]
            assert own_spelling([*command, before.replace("-", "_").replace("__", "--", 1) + "=x"])[-1] == f"{now}=x"
            assert now in said_by(COMMANDS[command]) and before not in said_by(COMMANDS[command])
    assert own_spelling(["run", "--what", "x"]) == ["run", "--what", "x"]  # no command has another's names


def test_a_group_without_a_command_is_its_usual_one():
    assert own_spelling(["export", "MODEL", "--add", "1"]) == ["export", "checkpoint", "MODEL", "--add", "1"]
    assert own_spelling(["export"]) == ["export", "checkpoint"]
    assert own_spelling(["export", "--help"]) == ["export", "--help"]
    assert own_spelling(["export", "vector", "MODEL"]) == ["export", "vector", "MODEL"]
    assert own_spelling(["caa", "ab", "--layers", "1", "2:4"]) == ["caa", "ab", "--layers=1,2:4"]
    assert {words[0] for words in COMMANDS if len(words) > 1} == {*GROUPS, *DEFAULT_COMMANDS}


if __name__ == "__main__":
    TABLE.write_text("\n".join(table()) + "\n")
