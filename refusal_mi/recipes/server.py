"""An OpenAI-compatible server that writes answers: where it is, what it serves, and what is wrong when it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from ..endpoint import Endpoint, Failed, Pause, Refused, check_address
from ..errors import UserError
from ..run.served import Api

KEY_VARIABLE = "REFUSAL_MI_SERVER_KEY"
PATHS: Mapping[Api, str] = {"chat": "/chat/completions", "completions": "/completions"}
_LISTING_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server and how it is asked.

    The key is read from `REFUSAL_MI_SERVER_KEY`, and is in no file and no message.
    """

    url: str
    """Such as http://localhost:8000/v1; an address without a path gets /v1."""
    model: str | None = None
    """As it is called there; None is the only one that the server lists."""
    api: Api = "chat"
    """Messages, to which the server applies its chat template; or rendered prompts, for a server that has none."""
    n_workers: int = 4
    """Requests under way at the same time."""
    n_tries: int = 5
    """Of every prompt."""
    timeout_seconds: float = 300.0
    """Of one request."""
    first_wait_seconds: float = 1.0
    """Before the second try; doubled before every further one, unless the server says how long to wait."""

    def __post_init__(self) -> None:
        check_address(self.url, "an endpoint's", KEY_VARIABLE)
        if self.n_tries < 1 or self.n_workers < 1 or self.timeout_seconds <= 0:
            raise UserError("a server needs at least one try and one worker, and a positive timeout")

    @property
    def base(self) -> str:
        """The address that requests go below."""
        url = self.url.rstrip("/")
        for path in PATHS.values():
            url = url.removesuffix(path)
        return url if urlsplit(url).path else f"{url}/v1"

    @property
    def endpoint(self) -> Endpoint:
        """How requests are made."""
        return Endpoint(self.base, (KEY_VARIABLE,), self.n_tries, self.timeout_seconds, self.first_wait_seconds)

    def listed(self) -> list[dict[str, Any]] | None:
        """The models that the server says it has; None where it does not say.

        Raises:
            UserError: nobody answers there, or the key is refused.
        """
        seconds = min(self.timeout_seconds, _LISTING_SECONDS)
        self.endpoint.check_key("the server's")
        try:
            asked = replace(self.endpoint, timeout_seconds=seconds)
            held = asked.ask("/models", None, _as_it_is, Pause(), is_patient=False)
        except Refused as error:
            if error.status in (401, 403):
                raise UserError(self._no_entry(error)) from None
            return None
        except Failed as error:
            if error.may_pass and self.model is None:
                raise UserError(
                    f"the server at {self.base} does not list its models; the last of {self.n_tries} tries ended with "
                    f"{error}: try again later, or name the model with --model-name"
                ) from None
            if error.may_pass or error.is_reached:
                return None
            raise UserError(
                f"no server answers at {self.base} ({error}): start one, or correct --endpoint (docs/serving.md)"
            ) from None
        return _models(held)

    def named(self, listed: Sequence[Mapping[str, Any]] | None) -> str:
        """The model to ask for.

        Raises:
            UserError: none was named, and the server does not list exactly one.
        """
        if self.model is not None:
            return self.model
        names = _names(listed)
        if listed is None:
            raise UserError(
                f"{self.base}/models does not list models as OpenAI-compatible servers do: correct --endpoint, whose "
                "path usually is /v1, or name the model with --model-name"
            )
        if len(names) != 1:
            has = f"has {_shown(names)}" if names else "lists no model"
            raise UserError(f"the server at {self.base} {has}: say which with --model-name")
        return names[0]

    def fault(self, problem: "Refused | Failed | Ended", model: str, listed: Sequence[Mapping[str, Any]] | None) -> str:
        """What is wrong with a server that answers no prompt, in a line."""
        names = _names(listed)
        has = f"; it lists {_shown(names)}" if names and model not in names else ""
        if isinstance(problem, Failed):
            return f"the server at {self.base} does not answer; the last of {self.n_tries} tries ended with {problem}"
        if isinstance(problem, Ended):
            return f"the server at {self.base} ends every answer for the model {model!r} with {problem}"
        if problem.status in (401, 403):
            return self._no_entry(problem)
        if problem.status == 402:
            return f"the server at {self.base} wants to be paid ({problem})"
        if problem.status in (404, 405) or problem.status < 400:
            where = f"{self.base}{PATHS[self.api]}"
            return f"{where} is not there, or has no model {model!r} ({problem}){has}: see --endpoint and --model-name"
        return f"the server at {self.base} refuses the prompts for the model {model!r} ({problem}){has}"

    def _no_entry(self, problem: Refused) -> str:
        return f"the server at {self.base} refuses the key ({problem}); put a valid one into {KEY_VARIABLE}"


class Ended(Exception):
    """An answer that something else than the model or the limit of tokens ended, such as a filter."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"finish reason {' '.join(reason.split())[:80]}")


@dataclass(frozen=True)
class Answer:
    """What a server wrote after one prompt."""

    text: str
    finish_reason: str | None
    """stop, or length where the limit of tokens cut it off; None where the server does not say."""
    model: str | None
    """What the server calls the model that wrote it."""


def _models(held: Any) -> list[dict[str, Any]] | None:
    """The entries of /models; None where it is no list of models."""
    listed = held.get("data") if isinstance(held, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "id" in each for each in listed):
        return None
    return listed


def _as_it_is(held: Any) -> Any:
    return held


def _names(listed: Sequence[Mapping[str, Any]] | None) -> list[str]:
    return [str(each["id"]) for each in listed or ()]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
