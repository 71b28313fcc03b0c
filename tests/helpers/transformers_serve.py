"""`transformers serve` in a process of its own."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

MISSING = [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]
WHY = f"transformers serve needs {', '.join(MISSING)}: pip install 'refusal_mi[serving]'"
_COMMAND = "from transformers.cli.transformers import app; app()"


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def transformers_serve(words: Sequence[str], folder: Path, port: int) -> Iterator[str]:
    """The address of a server that has loaded its model; it ends with the block.

    Args:
        words: behind `transformers`, beginning with serve.
        folder: where it runs, and writes its log.
    """
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *words], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address, deadline = f"http://localhost:{port}", time.monotonic() + 300
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=5).read()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"transformers serve did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
