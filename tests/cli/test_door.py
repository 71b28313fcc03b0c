"""What the command line says when something goes wrong inside: one line, and the traceback where it is asked."""

from types import SimpleNamespace

import pytest

from refusal_mi import cli
from refusal_mi.cli import exit_status, main
from refusal_mi.errors import UserError


@pytest.fixture
def breaks(monkeypatch):
    """Let `compare` raise this."""

    def break_with(error: BaseException) -> None:
        def broken(*_: object, **__: object) -> int:
            raise error

        monkeypatch.setattr(cli, "plain_command", lambda _: SimpleNamespace(main=broken))

    return break_with


@pytest.mark.parametrize(
    "error", [RuntimeError("first\nsecond"), KeyError("x"), RecursionError(), OSError(28, "No space")]
)
def test_a_defect_is_one_line_and_a_traceback_with_debug(error, breaks, capsys):
    breaks(error)
    assert exit_status(["compare", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {type(error).__name__}: ") and "--debug" in line and "second" not in line
    with pytest.raises(type(error)):
        exit_status(["compare", "a", "--debug"])


def test_a_users_mistake_has_a_traceback_only_with_debug(breaks, capsys):
    breaks(UserError("no such thing"))
    assert exit_status(["compare", "a"]) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    assert exit_status(["--debug", "compare", "a"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: no such thing\n")


def test_warnings_are_one_line(monkeypatch, capsys):
    warned = SimpleNamespace(main=lambda *_, **__: cli.warnings.warn("some\nthing\x1b[2J", stacklevel=1))
    monkeypatch.setattr(cli, "plain_command", lambda _: warned)
    with cli.warnings.catch_warnings():
        cli.warnings.simplefilter("always")
        monkeypatch.setattr(cli.warnings, "formatwarning", cli.warnings.formatwarning)
        with pytest.raises(SystemExit):
            main(["compare"])
        line = cli.warnings.formatwarning("some\nthing\x1b[2J", UserWarning, "file", 1)
    assert line == "warning: some thing�[2J\n"
