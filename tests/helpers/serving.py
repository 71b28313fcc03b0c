"""Runs whose held-out prompts a server answers, and servers that answer them."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from refusal_mi.files import read_json, write_json
from refusal_mi.recipes.server import Server
from tests.helpers.judge import Fake, raw
from tests.helpers.runs import ANSWER, REFUSAL, make_run

FULL = "length"


def served_run(folder: Path, *, n_test: int = 6, **changes: object) -> Path:
    """A finished run whose `prompts.json` holds the prompts that its completions answer, with a report.

    Args:
        changes: of the options in `run.json`.
    """
    make_run(folder, n_test=n_test)
    record = read_json(folder / "prompts.json")
    for side in ("harmful", "harmless"):
        rows = read_json(folder / f"completions/{side}_baseline_completions.json")
        record[side]["test"] = [{"instruction": row["prompt"], "category": row["category"]} for row in rows]
    write_json(folder / "prompts.json", record)
    run = read_json(folder / "run.json")
    run["options"] |= changes
    write_json(folder / "run.json", run)
    (folder / "report.html").write_text("of before")
    return folder


def asked_about(body: dict) -> str:
    """The user's message of a request, or its rendered prompt."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def text_for(prompt: str) -> str:
    """What these servers answer: a refusal to every odd harmful prompt; the longest is cut off."""
    return REFUSAL if prompt.startswith("harmful") and int(prompt.split()[-1]) % 2 else f"{ANSWER} {prompt}"


def reply(handler: BaseHTTPRequestHandler, text: str | None, *, reason: str = "stop", model: str = "m") -> None:
    """Of both APIs."""
    choice = {"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": reason, "index": 0}
    raw(handler, json.dumps({"object": "x", "model": model, "choices": [choice]}).encode())


def answer(fake: Fake, handler: BaseHTTPRequestHandler, number: int, body: dict) -> None:
    """Every prompt its text."""
    prompt = asked_about(body)
    reply(handler, f" {text_for(prompt)}\n", reason=FULL if prompt.endswith(" 2") else "stop")


def quick(fake: Fake, **changes: object) -> Server:
    """The server as the tests ask it, without long waits."""
    return Server(**{"url": fake.url, "first_wait_seconds": 0.01, "timeout_seconds": 5.0, **changes})  # type: ignore[arg-type]
