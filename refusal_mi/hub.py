"""The hub, asked once: where it does not answer, its cache is read instead of trying again and again."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

PATIENCE = 2.0
"""Seconds that the hub has for its first answer."""


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, the hub's cache alone is read where the hub does not answer; its client would try for half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or not answers(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    """Whether anything at all comes back; in a thread, because looking up a name has no time limit of its own."""
    from huggingface_hub import get_session

    statuses: list[int] = []

    def ask() -> None:
        try:
            statuses.append(get_session().head(url, timeout=PATIENCE).status_code)
        except Exception:  # foreign code: the transports have classes of their own, which differ between versions
            return

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(statuses)
