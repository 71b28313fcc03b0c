"""The summary page of a study: how every cell ended, the small multiples, where everything lies."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from ..errors import UserError
from ..figures.save import PLOTLY_FILE, save_figure
from ..figures.study import plot_study
from ..files import write_text
from ..terminal import printable
from .study import CellState
from .table import TABLE, TableRow

PAGE, IMAGES = "study.html", ("study.png", "study.pdf")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
th, td { border-bottom: 1px solid #e4e4e4; } .bad { color: #8c1c13; } .wide { overflow-x: auto; }
"""


def write_page(
    path: Path, name: str, cells: Sequence[CellState], rows: Sequence[TableRow], *, images: bool = False
) -> Path:
    """Write `study.html` with its figure, and it as images where they are asked for; returns the page.

    Raises:
        UserError: kaleido or the browser that an image needs is not there.
    """
    try:
        figure = plot_study(rows, name=name)
    except UserError:
        figure = None
    write_text(path / PLOTLY_FILE, get_plotlyjs())
    shown = "<p>There are no numbers to draw yet.</p>"
    if figure is not None:
        config = {"displaylogo": False, "responsive": True}
        shown = figure.to_html(full_html=False, include_plotlyjs=PLOTLY_FILE, config=config, div_id="study")
        for each in IMAGES if images else ():
            save_figure(figure, path / each)
    head = "".join(f"<th>{each}</th>" for each in ("model", "prompts", "seed", "status", "refuses, plain", "run"))
    body = "\n".join(_line(each, rows, path) for each in cells)
    n_done = sum(each.state == "done" for each in cells)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study {_text(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Study {_text(name)}</h1>
<p>{n_done} of {len(cells)} cells are done. All numbers, with intervals and what they were computed from, are in
<a href="{TABLE}">{TABLE}</a>, a row for each.</p>
<div class="wide">{shown}</div>
<h2>Cells</h2>
<div class="wide"><table><tr>{head}</tr>
{body}
</table></div>
</body>
</html>
"""
    write_text(path / PAGE, text)
    return path / PAGE


def _line(each: CellState, rows: Sequence[TableRow], path: Path) -> str:
    cell = each.cell
    plain = next((row for row in rows if row.folder == cell.folder and _is_plain(row)), None)
    rate = "" if plain is None else f"{plain.value:.2f} [{plain.low:.2f}, {plain.high:.2f}], n = {plain.n}"
    report = f"{cell.folder}/report.html"
    link = f'<a href="{_text(report)}">report</a>' if (path / report).is_file() else ""
    status = f'<span class="bad">failed: {_text(each.says)}</span>' if each.state == "failed" else _text(each.says)
    cells = (_text(cell.model.name), _text(cell.data), str(cell.seed), status, rate, link)
    return "<tr>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>"


def _is_plain(row: TableRow) -> bool:
    return (row.stage, row.method, row.metric) == ("run", "plain", "refused") and (row.set or "").startswith("harmful")


def _text(text: str) -> str:
    return escape(printable(text))
