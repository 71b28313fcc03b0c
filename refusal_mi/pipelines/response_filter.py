"""Which sampled responses a response-averaged vector is made of."""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..judges import Judge

MIN_KEPT = 0.5
"""Below this fraction of one side, the filter's result carries a warning."""


class NothingSurvives(UserError):
    """No response of one side passed the filter; the responses are on disk."""


def passes(rows: Sequence[dict[str, str]], tokens: Sequence[Any], side: str, judge: Judge) -> list[bool]:
    complied = judge.complied([row["instruction"] for row in rows], [row["response"] for row in rows])
    wanted = side == "compliant"
    return [flag == wanted and bool(entry["token_ids"]) for flag, entry in zip(complied, tokens, strict=True)]


def warn_of_few(
    side: str, rows: Sequence[dict[str, str]], kept: Sequence[dict[str, str]], max_new_tokens: int
) -> str | None:
    """A warning where few responses of a side passed; none is an error."""
    if len(kept) >= MIN_KEPT * len(rows):
        return None
    lost = [row for row in rows if row not in kept][:2]
    shown = "; ".join(repr(row["response"][:160]) for row in lost)
    way_out = (
        "try another --refusal-instruction, or a higher --n-samples or --n-completions"
        if side == "refusing"
        else "this model refuses harmless queries: try another --dataset or --system, or a higher --n-samples"
    )
    message = (
        f"only {len(kept)} of {len(rows)} {side} responses pass the filter (left out, for example: {shown}); "
        f"{way_out}, a longer --max-new-tokens (now {max_new_tokens}) or another --judge"
    )
    if kept:
        return message
    raise NothingSurvives(
        f"no {side} response passes the filter, so there is no vector; the responses are kept: {message}"
    )
