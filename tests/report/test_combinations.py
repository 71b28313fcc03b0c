"""The report of a run lists the combinations of its directions that lie beside it."""

import re

import pytest

from refusal_mi.cli import exit_status
from refusal_mi.files import write_json
from refusal_mi.report.page import write_report
from refusal_mi.search.grid import select
from tests.helpers.runs import make_run, make_scores, write_span

pytestmark = pytest.mark.slow


def links(page: str) -> list[tuple[str, str]]:
    """Address and text of the links to the combinations of a run."""
    listed = re.findall(r'<ul id="combinations">(.*?)</ul>', page, flags=re.DOTALL)
    return re.findall(r'<li><a href="(.*?)">(.*?)</a></li>', "".join(listed))


def name_combination(run, ranks, *, multi="span", shift=0):
    """The folder of a combination of surviving candidates; of others, if their layers are shifted."""
    label = "-".join(map(str, ranks)) + ("" if multi == "span" else f"-{multi}")
    rows = [select(make_scores()).survivors[rank] for rank in ranks]
    write_span(run / label, ranks, multi, [1.0] * len(ranks))
    places = [{"pos": row.position, "layer": row.layer + shift} for row in rows]
    write_json(run / label / "directions_metadata.json", places)
    return run / label


def test_the_report_of_a_run_lists_the_combinations_beside_it(tmp_path):
    run = make_run(tmp_path, n_test=3)
    assert 'id="combinations"' not in write_report(run).read_text()
    span, single = name_combination(run, [2, 0]), name_combination(run, [1])
    sequential = name_combination(run, [0, 1], multi="sequential")
    earlier = name_combination(run, [0, 2], shift=1)  # of another search: not the directions of ranks 0 and 2
    for folder in (span, sequential, earlier):
        write_report(folder)
    page = write_report(run).read_text()
    assert links(page) == [
        ("0-1-sequential/report.html", "ranks 0 and 1, one after the other"),
        ("2-0/report.html", "ranks 2 and 0"),
    ]
    assert all((run / address).is_file() for address, _ in links(page))
    assert "rank 1, without a report of its own" in page and "combos.html" not in page
    assert 'id="combinations"' not in (span / "report.html").read_text()
    (run / "combos.html").write_text("")
    assert '<a href="combos.html">' in write_report(run).read_text() and not (single / "report.html").exists()


def test_combinations_made_later_are_listed_where_the_run_is_still_the_same(tiny_dir, tmp_path):
    arguments = [
        "run", str(tiny_dir("llama")), "--no-filter", "--refusal-tokens", "5,7", "--n-train", "8", "--n-val", "8",
        "--n-test", "3", "--n-ce", "2", "--max-new-tokens", "4", "--no-thresholds", "--output-dir", str(tmp_path),
    ]  # fmt: skip
    assert exit_status(arguments) == 0
    assert links((tmp_path / "report.html").read_text()) == []
    assert exit_status([*arguments, "--directions", "1-0"]) == 0
    assert links((tmp_path / "report.html").read_text()) == [("1-0/report.html", "ranks 1 and 0")]
    assert exit_status(["combos", arguments[1], "--ranks", "0..1", "--n-ce", "2", "--output-dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert '<a href="combos.html">' in page and "without a report of its own" in page
    assert exit_status([*arguments, "--n-random", "2", "--directions", "0-1"]) == 0
    assert (tmp_path / "report.html").read_text() == page and (tmp_path / "0-1/report.html").is_file()
