"""Text from outside in Markdown: ordinary text does not change, and whatever is markup is read back as text."""

import json
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from refusal_mi.markdown import literal, without_media
from tests.helpers.hostile import MARKUP, PICTURE, TOKENS

ORDINARY = [
    "I cannot help with that. It is dangerous and wrong.",
    "1.00 [0.94, 1.00]",
    "Sure! Here's a trick: 3 + 4 = 7, at 50% (about 1/2).",
    "0_random_0",
    "attention: system",
    "-0.36",
]
HARD = [*MARKUP, *TOKENS, "`a`", "**a** *b* _c_ __d__ ~~e~~", "a\\*b", "| a | b", "[a][b] ![c][d] [e](f)", "<!-- a -->"]


def tokens_of(markdown: str) -> list[str]:
    """The kinds of what a parser makes of a paragraph."""
    (inline,) = [token for token in MarkdownIt("commonmark").parse(markdown) if token.type == "inline"]
    return [token.type for token in inline.children or []]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_does_not_change(text):
    assert literal(text) == text and without_media(text) == text


@pytest.mark.parametrize("text", HARD)
def test_a_literal_text_is_read_back_as_it_is(text):
    def read(markdown):
        (inline,) = [token for token in MarkdownIt("commonmark").parse(markdown) if token.type == "inline"]
        return "".join(child.content for child in inline.children)

    assert read(f"a {literal(text)}") == f"a {' '.join(text.split())}"
    assert set(tokens_of(f"a {literal(text)}")) <= {"text", "text_special"}


def test_control_the_same_texts_are_markup_without_it():
    kinds = {kind for text in HARD for kind in tokens_of(f"a {text}")}
    assert {"html_inline", "image", "link_open", "code_inline", "em_open", "strong_open"} <= kinds


@pytest.mark.parametrize("text", HARD)
def test_without_media_there_is_no_picture_link_or_html(text):
    definition = "\n\n[b]: http://evil.example/b\n[d]: http://evil.example/d"
    parsed = MarkdownIt("commonmark").parse(without_media(f"a {text}{definition}"))
    kinds = {child.type for token in parsed for child in token.children or []}
    assert not kinds & {"image", "link_open", "html_inline"} and not any(token.type == "html_block" for token in parsed)


def test_emphasis_code_and_tables_stay():
    text = "**a** `b` | c |\n| --- |\n```\n<|im_start|>user\n```"
    assert without_media(text) == text
    assert without_media(PICTURE).replace("\u2060", "") == PICTURE


def test_the_committed_notebooks_hold_nothing_that_it_would_change():
    shown = [
        "".join(output["data"]["text/markdown"])
        for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert len(shown) > 20 and [text for text in shown if without_media(text) != text] == []
