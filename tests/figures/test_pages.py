"""A page of a view is text that shows itself in a notebook, in a frame that reaches nothing outside of it."""

from html.parser import HTMLParser

import pytest

from refusal_mi.analysis import attend_by_region
from refusal_mi.analysis.result import figures
from refusal_mi.figures.views import Page
from refusal_mi.text.chat import ChatFormat
from tests.helpers.directions import random_direction
from tests.helpers.naive import ASKS


class Frame(HTMLParser):
    """The attributes of the only element."""

    def handle_starttag(self, tag, attrs):
        assert tag == "iframe" and not hasattr(self, "found")
        self.found = dict(attrs)


@pytest.fixture(scope="module")
def page(tiny_model):
    model = tiny_model("llama")
    result = attend_by_region(model, ChatFormat(model.tokenizer), random_direction(layer=2), ASKS[:2])
    (made,) = [each for each in figures(result).values() if isinstance(each, str)]
    return made


def test_a_page_is_shown_in_a_frame_of_its_own(page, tmp_path):
    assert isinstance(page, Page) and len(page) > 100_000 and len(repr(page)) < 200 and "MB of HTML" in repr(page)
    frame = Frame()
    frame.feed(page._repr_html_())
    assert frame.found["srcdoc"] == str(page) and frame.found["sandbox"] == "allow-scripts"
    page.save(tmp_path / "heads.html")
    assert (tmp_path / "heads.html").read_text("utf-8") == page


def test_nothing_in_a_page_ends_its_frame():
    text = Page("\"></iframe><script>alert(1)</script>&amp;'", "hostile")
    frame = Frame()
    frame.feed(text._repr_html_())
    assert frame.found["srcdoc"] == str(text)
