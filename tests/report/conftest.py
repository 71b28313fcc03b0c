"""A browser for all pages of a file; tests that need one skip where there is none."""

import pytest

from tests.helpers.browser import find_chromium, open_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium on PATH")
    with open_browser(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page
