"""An endpoint on localhost that answers as it is told, and remembers what it was sent."""

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-never-in-a-file-123"
LONG = "word " * 14 + "word"
"""Fifteen words: just long enough to be asked about."""


class Fake:
    """What an endpoint does with the n-th request, and what it was sent."""

    def __init__(self, answer: Callable[["Fake", BaseHTTPRequestHandler, int, dict], None]) -> None:
        self.answer, self.seen, self.headers = answer, [], []
        self.models: object = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1}]}
        """What GET gets: JSON, or a status."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "Fake":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.seen.append((self.path, body))
                    fake.headers.append(dict(self.headers))
                    number = len(fake.seen)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    fake.answer(fake, self, number, body)

            def do_GET(self) -> None:
                status = fake.models if isinstance(fake.models, int) else 200
                raw(self, b"<html>" if status != 200 else json.dumps(fake.models).encode(), status)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def send(handler: BaseHTTPRequestHandler, content: str, status: int = 200, headers: dict | None = None) -> None:
    """Reply with a chat completion, or with `content` itself where the status is an error."""
    text = json.dumps({"choices": [{"message": {"content": content}}]}) if status == 200 else content
    raw(handler, text.encode(), status, headers)


def raw(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: dict | None = None) -> None:
    """Reply with these bytes."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def verdict(fake: Fake, handler: BaseHTTPRequestHandler, number: int, body: dict) -> None:
    """Unsafe where the response says so."""
    send(handler, "unsafe\nS2" if "HARM" in body["messages"][0]["content"] else "\n\nsafe")
