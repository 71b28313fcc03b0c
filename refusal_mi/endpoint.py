"""An OpenAI-compatible endpoint: how it is asked, when again, how many at a time, and what is hidden."""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.client import HTTPException
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .errors import UserError
from .progress import track

Item = TypeVar("Item")
_MAX_ANSWER_BYTES, _MAX_SAID = 2**20, 4096
_MAX_WAIT_SECONDS = 60.0
_SHORTEST_KEY = 12
"""Characters; a shorter one is a placeholder, which answers may well hold as a word."""
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a character, which no file can hold."""
_PASSING = frozenset({408, 409, 425, 429})
"""HTTP statuses that may be gone at the next try, beside 500 and above."""


class Refused(Exception):
    """A request that would be refused again."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP status {status}{f': {said}' if said else ''}")
        self.status = status
        self.said = said
        """What the endpoint says of it, in a line."""


class Failed(Exception):
    """A request that failed at every try; the message says how the last time."""

    def __init__(self, problem: str, last: Exception | None) -> None:
        super().__init__(problem)
        self.last = last
        """What was raised the last time."""

    @property
    def may_pass(self) -> bool:
        """Whether it looks like a server that is busy, rather than none, or another kind of server."""
        last = getattr(self.last, "reason", self.last)
        return isinstance(last, (_Status, TimeoutError, ConnectionResetError))

    @property
    def is_reached(self) -> bool:
        """Whether something answered, the last time."""
        return not isinstance(self.last, OSError)


class NotAnAnswer(ValueError):
    """An answer that is to be asked for again; the message says what is wrong with it."""


class Pause:
    """What the workers of one call share: how long all of them wait, and the end of waiting."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._until, self._lock = 0.0, threading.Lock()

    def hold(self, seconds: float) -> None:
        """Let nobody ask for this long."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def is_over(self, seconds: float) -> bool:
        """Wait this long, and until all may ask again; True once nobody shall ask any more."""
        own = time.monotonic() + seconds
        while not self.stop.wait(max(own, self._until) - time.monotonic()):
            if time.monotonic() >= max(own, self._until):  # nobody was told to wait longer meanwhile
                return False
        return True


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how they are tried.

    The key is read from the environment when a request is made; it is in no message and no representation of this.
    """

    url: str
    """Base address, without a slash at its end."""
    key_variables: tuple[str, ...]
    """Environment variables of the key; the first that is there."""
    n_tries: int = 5
    timeout_seconds: float = 60.0
    """Of one request, from connecting to the last byte."""
    first_wait_seconds: float = 1.0
    """Before the second try; doubled before every further one."""

    def ask(self, path: str, body: Any, read: Callable[[Any], Item], pause: Pause, *, is_patient: bool = True) -> Item:
        """What `read` makes of the answer to a request, made again while it fails in a way that may pass.

        An answer with `Retry-After` lets all who share `pause` wait.

        Args:
            path: after the address, such as /chat/completions.
            body: of a POST, as JSON; None is a GET.
            read: from the answer's JSON value; a ValueError asks again.
            is_patient: otherwise only what a busy server does is asked again.

        Raises:
            Refused: the endpoint will not have the request.
            Failed: it failed at every try.
        """
        wait, problem = 0.0, "no try"
        last: Exception | None = None
        for _ in range(self.n_tries):
            if pause.is_over(wait):
                break
            wait = min(max(2 * wait, self.first_wait_seconds), _MAX_WAIT_SECONDS)
            try:
                return read(self._clean(self._in_time(path, body)))
            except _Status as error:
                last = error
                problem = f"HTTP status {error.code}"
                if error.code < 500 and error.code not in _PASSING:
                    raise Refused(error.code, self.hidden(error.said)[:200]) from None
                if error.wait is not None:
                    wait = error.wait
                    pause.hold(wait)
            except NotAnAnswer as error:
                last = error
                problem = str(error)
            except (OSError, HTTPException, ValueError, RecursionError) as error:  # the last: nested too deep
                last = error
                problem = self.hidden(f"{type(error).__name__}: {getattr(error, 'reason', error)}")
            if not is_patient and not Failed(problem, last).may_pass:
                break
        raise Failed(problem, last)

    def hidden(self, text: str) -> str:
        """A text of the endpoint without the key in it, if that is long enough to be one."""
        key = self._key
        return text.replace(key, "[key]") if key and len(key) >= _SHORTEST_KEY else text

    def check_key(self, whose: str) -> None:
        """Refuse a key that no request can carry, before anything could repeat it.

        Raises:
            UserError: it has a character that is not printable ASCII.
        """
        if not (self._key or "").isascii() or not (self._key or "").isprintable():
            raise UserError(
                f"{whose} key holds a character that is not printable ASCII; correct {self.key_variables[0]}"
            )

    def _clean(self, held: Any) -> Any:
        """A JSON value without the key, and without halves of characters."""
        if isinstance(held, str):
            return _HALF.sub("\N{REPLACEMENT CHARACTER}", self.hidden(held))
        if isinstance(held, list):
            return [self._clean(each) for each in held]
        if isinstance(held, dict):
            return {self._clean(name): self._clean(each) for name, each in held.items()}
        return held

    @property
    def _key(self) -> str | None:
        key = next((key for name in self.key_variables if (key := os.environ.get(name))), None)
        return key.strip() if key and key.strip() else None

    def _in_time(self, path: str, body: Any) -> Any:
        """The endpoint's answer, within the time of one request, however slowly its bytes come."""
        answer: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        request = lambda: answer.put(_outcome(lambda: self._request(path, body)))  # noqa: E731
        threading.Thread(target=request, daemon=True).start()
        try:
            outcome = answer.get(timeout=self.timeout_seconds)
        except Empty:
            raise TimeoutError("the answer took too long") from None
        return outcome()

    def _request(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, kind)
        request.add_unredirected_header("User-Agent", "refusal-mi")
        key = self._key
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            opener = _DIRECT if _is_here(urlsplit(self.url).hostname or "") else _OPENER
            end = time.monotonic() + self.timeout_seconds
            with opener.open(request, timeout=self.timeout_seconds) as response:
                received = b""
                while chunk := response.read1(2**16):
                    received += chunk
                    if time.monotonic() > end:  # nobody waits any more: leaving ends the connection
                        raise TimeoutError("the answer took too long")
                    if len(received) > _MAX_ANSWER_BYTES:
                        raise ValueError("the answer is longer than 1 MiB")
        except urllib.error.HTTPError as error:
            raise _Status(error) from None
        return json.loads(received)


def as_they_come(
    items: Sequence[Item], work: Callable[[Item, Pause], Any], *, n_workers: int, description: str
) -> Generator[tuple[Item, Any], None, None]:
    """Every item and what `work` makes of it, in the order in which they are done; at most `n_workers` at a time.

    The workers are threads that nobody waits for: an interrupt, whatever `work` raises first, and closing this end it
    at once.
    """
    waiting: SimpleQueue[Item] = SimpleQueue()
    done: SimpleQueue[tuple[Item, Callable[[], Any]]] = SimpleQueue()
    pause = Pause()
    for each in items:
        waiting.put(each)

    def go() -> None:
        while not pause.stop.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            done.put((item, _outcome(lambda: work(item, pause))))

    for _ in range(min(n_workers, len(items))):
        threading.Thread(target=go, daemon=True).start()
    try:
        for _ in track(items, description):
            item, outcome = done.get()
            yield item, outcome()
    finally:
        pause.stop.set()


def check_address(url: str, whose: str, key_variable: str) -> None:
    """Make sure that an address is one, and holds no secret.

    Args:
        whose: such as "a judge's".

    Raises:
        UserError: it does not begin with http(s)://, names no host, or carries a user name, key or query.
    """
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 host that is none
        is_one = False
    if not is_one or any(each.isspace() or not each.isprintable() for each in url):
        raise UserError(f"{whose} address begins with http:// or https:// and names a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(f"{whose} address must not carry a user name, key or query; put the key into {key_variable}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the prompts, if not the key, to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
_DIRECT = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))


def _is_here(host: str) -> bool:
    """Whether an address is this machine's own, which is no business of a proxy."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _outcome(work: Callable[[], Item]) -> Callable[[], Item]:
    """What gives, in another thread, what it returns or raises."""
    try:
        result = work()
    except BaseException as error:
        return partial(_raise, error)
    return lambda: result


def _raise(error: BaseException) -> Any:
    raise error


class _Status(Exception):
    """An answer whose status is an error."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        super().__init__(error.code)
        self.code = error.code
        self.wait = _retry_after(error.headers)
        """Seconds that the endpoint asks for."""
        said = b""
        with suppress(OSError, HTTPException):
            said = error.read(_MAX_SAID)
        self.said = _message(said.decode(errors="replace"))


def _message(text: str) -> str:
    """What the body of an error says, in a line: the fields that servers use, else the text unless it is a page."""
    with suppress(ValueError):
        held = json.loads(text)
        for key in ("error", "message", "detail"):
            held = held[key] if isinstance(held, dict) and key in held else held
        text = held if isinstance(held, str) else json.dumps(held)
    return "" if text.lstrip().startswith("<") else " ".join(text.split())


def _retry_after(headers: Message) -> float | None:
    """Seconds of `Retry-After`, up to a minute; None where there is none, or a date."""
    try:
        return min(max(0.0, float(headers.get("Retry-After", ""))), _MAX_WAIT_SECONDS)
    except ValueError:
        return None
