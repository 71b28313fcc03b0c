"""Figures as files: HTML by plotly itself, images by kaleido and a local Chromium."""

from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..errors import UserError
from ..files import at_home, write_text, write_whole
from .fit import laid_out

PLOTLY_FILE = "plotly.min.js"
IMAGES = (".png", ".svg", ".pdf")
_SCALE = {".png": 2.0}
_WIDTH = 1200
"""Of an image, where nobody says it (px)."""


def save_figure(figure: go.Figure, path: str | Path, *, width: int | None = None) -> None:
    """Write one figure as a self-contained .html, or as .png, .svg or .pdf.

    Examples:
        >>> save_figure(plot_scores(scores), "scores.html")  # or .png, .svg, .pdf through a local Chromium

    Args:
        width: of an image, in pixels; a PNG has twice as many. The figure is laid out for it. None is the width that
            the figure was made with, or 1200.

    Raises:
        UserError: the name ends otherwise, or kaleido or the browser that an image needs is not there.
    """
    path = at_home(path)
    if path.suffix not in (".html", *IMAGES):
        raise UserError(f"a figure is written as .html, {', '.join(IMAGES)}, not {path.name}")
    if path.suffix == ".html":
        write_text(path, _html(figure, include_plotlyjs=True))
        return
    wide = width or figure.layout.width or _WIDTH
    fitting = laid_out(go.Figure(figure), width=wide)
    picture = _picture(fitting, path.suffix.removeprefix("."), wide, _SCALE.get(path.suffix, 1.0))
    write_whole(path, lambda temporary: temporary.write_bytes(picture))


def check_images() -> None:
    """Draw an empty one, before the work whose images are asked for.

    Raises:
        UserError: kaleido or the browser that it needs is not there.
    """
    _picture(go.Figure(), "png", 100, 1.0)


def save_figures(figures: Mapping[str, go.Figure], folder: str | Path) -> list[str]:
    """Write `{name}.html` for each figure and plotly once beside them; return the names of all files."""
    folder = at_home(folder)
    write_text(folder / PLOTLY_FILE, get_plotlyjs())
    for name, figure in figures.items():
        write_text(folder / f"{name}.html", _html(figure, include_plotlyjs=PLOTLY_FILE))
    return [*(f"{name}.html" for name in figures), PLOTLY_FILE]


def _html(figure: go.Figure, *, include_plotlyjs: bool | str) -> str:
    # A fixed id: the same figure is the same file.
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(include_plotlyjs=include_plotlyjs, config=config, div_id="figure")


def _picture(figure: go.Figure, kind: str, width: int, scale: float) -> bytes:
    try:
        import kaleido  # noqa: F401
    except ImportError:
        raise UserError(
            "static images need kaleido: pip install 'refusal_mi[static]', or write .html instead"
        ) from None
    try:
        return figure.to_image(format=kind, width=width, scale=scale)
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise UserError(
            "static images need Chrome or Chromium on PATH: install it (Debian: apt-get install chromium), "
            "or write .html instead"
        ) from None
