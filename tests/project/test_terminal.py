"""Text of models and files cannot steer a terminal: in messages, tables, bars, JSON and pipes."""

import io
import json

import pytest

from refusal_mi import progress
from refusal_mi.cli import exit_status
from refusal_mi.cli.tables import Console, Table, print_facts, print_json, print_lines
from refusal_mi.terminal import printable, say, tell

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\x9bd\u202ee\u2066f\rg\x00h\u2028i\ud800[bold]j[/bold]"
STEERING = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\x00", "\u2028")


@pytest.fixture
def safe(capsys):
    """What was shown, on both streams, has none of it."""

    def check() -> str:
        captured = capsys.readouterr()
        both = captured.out + captured.err
        assert both and not any(each in both for each in STEERING) and "\rg" not in both
        return both

    return check


def test_what_stays():
    text = "é 漢字 👩‍👩‍👧 שלום العربية\tab\nline \u200f x"
    assert printable(text) == text
    assert printable(HOSTILE) == "a�[2Jb�]0;title�c�d�e�f�g�h�i�[bold]j[/bold]"


@pytest.mark.parametrize(
    "show",
    [
        say,
        tell,
        print_lines,
        lambda text: print_facts({text: text, "other": [text, text]}),
        lambda text: Console().print(text),
        lambda text: Console(force_terminal=False).print(text, highlight=False),
        lambda text: exit_status(["model-info", text]),
        lambda text: exit_status([text]),
    ],
)
def test_every_way_to_a_stream(show, safe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    show(HOSTILE)
    assert "[bold]j[/bold]" in safe().replace("\n", "")


def test_a_table_shows_texts_as_they_are():
    stream = io.StringIO()
    table = Table("[red]head", "[/red]", title=None)
    table.add_row(HOSTILE, "[link=x]y[/link]")
    Console(file=stream, width=200, force_terminal=False).print(table)
    shown = stream.getvalue()
    assert not any(each in shown for each in STEERING)
    assert all(each in shown for each in ("[red]head", "[/red]", "[bold]j[/bold]", "[link=x]y[/link]"))


def test_on_a_terminal_only_what_rich_writes_itself_steers():
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=True, color_system="truecolor").print("x\x1b[31my")
    assert "\x1b[31m" not in stream.getvalue() and "x�[31my" in stream.getvalue()


def test_json_says_the_same_and_steers_nothing(capsys):
    text = HOSTILE.replace("\ud800", "")
    print_json({"text": text, "漢字": "é"})
    shown = capsys.readouterr().out
    assert not any(each in shown for each in STEERING) and "漢字" in shown
    assert json.loads(shown) == {"text": text, "漢字": "é"}


def test_a_bar_in_a_log(safe, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    assert list(progress.track([1, 2], HOSTILE)) == [1, 2]
    assert "[bold]j[/bold]" in safe()
