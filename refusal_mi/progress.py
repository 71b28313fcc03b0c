"""Progress with an estimate of the time left: a bar where somebody is looking, a line now and then in a log."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar

from rich.console import Console

from .terminal import printable

Item = TypeVar("Item")
LOG_SECONDS = 30.0
QUIET_SECONDS, REFRESH_SECONDS = 5.0, 1.0
"""In a notebook: how long work must last before it says anything, and how often it does then."""
NOTEBOOK_METADATA = {"refusal_mi": "progress"}
"""What marks the output of a notebook as progress."""


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, work: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """Yield the items behind a bar on stderr, or a line in a notebook; in a log a line every half minute.

    Args:
        total: how much work there is; as many as there are items, where that is known.
        work: how much of it is done with an item.
    """
    console, description = Console(stderr=True), printable(description)
    if total is None and isinstance(items, Sized):
        total = len(items)
    if console.is_jupyter:
        return _in_notebook(items, description, total, work)
    return (_in_terminal if console.is_terminal else _in_log)(items, description, total, work, console)


def _in_terminal(
    items: Iterable[Item], description: str, total: int | None, work: Callable[[Item], int], console: Console
) -> Iterator[Item]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task, work(item))


def _in_log(
    items: Iterable[Item], description: str, total: int | None, work: Callable[[Item], int], console: Console
) -> Iterator[Item]:
    """A line every `LOG_SECONDS`, after the item that is done by then."""
    start = shown = time.monotonic()
    n_done = 0
    for item in items:
        yield item
        now, n_done = time.monotonic(), n_done + work(item)
        if now - shown >= LOG_SECONDS and n_done != total:
            shown = now
            console.print(f"  {_line(description, n_done, total, now - start)}", highlight=False, markup=False)


def _in_notebook(
    items: Iterable[Item], description: str, total: int | None, work: Callable[[Item], int]
) -> Iterator[Item]:
    """One bar for each cell, which the next one of that cell writes over.

    A display cannot be taken back, only changed: a bar that vanished would leave an empty output in the notebook.
    """
    start = shown = time.monotonic()
    n_done = 0
    for item in items:
        yield item
        now, n_done = time.monotonic(), n_done + work(item)
        is_last = n_done == total
        if now - start >= QUIET_SECONDS and (is_last or now - shown >= REFRESH_SECONDS or shown == start):
            shown = now
            _show(_line(description, n_done, total, now - start), n_done, total)


def _line(description: str, n_done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{description}: {n_done} in {_clock(seconds)}"
    left = "" if n_done >= total else f", {_clock(seconds / n_done * (total - n_done))} left"
    return f"{description}: {n_done} of {total} in {_clock(seconds)}{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


_handles: dict[int, Any] = {}
"""Number of the cell that runs -> its bar."""


@contextmanager
def alone() -> Iterator[None]:
    """In a notebook, no bars of transformers and huggingface_hub meanwhile."""
    if not Console(stderr=True).is_jupyter:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's bars, which are not shown
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging

    were_shown, were_off = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
        if not were_off:
            enable_progress_bars()


def _show(text: str, n_done: int, total: int | None) -> None:
    from IPython import get_ipython
    from IPython.display import display

    cell = get_ipython().execution_count  # type: ignore[no-untyped-call, union-attr]
    data = {"text/plain": text}
    if total:
        data["text/html"] = f'<progress max="{total}" value="{n_done}"></progress> {escape(text)}'
    if cell in _handles:
        _handles[cell].update(data, raw=True, metadata=NOTEBOOK_METADATA)
    else:
        _handles.clear()
        _handles[cell] = display(data, raw=True, display_id=True, metadata=NOTEBOOK_METADATA)  # type: ignore[no-untyped-call]
