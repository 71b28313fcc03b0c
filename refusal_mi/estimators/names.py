"""What the estimators are called on the command line; no torch, so that help is printed at once."""

import re
from difflib import get_close_matches

from ..errors import UserError

NAMES = ("mean", "median", "winsorised", "clipped", "projected", "pca", "logistic", "lda")
NUMBERED = ("kmeans", "peel")
"""One of several directions of each position and layer: kmeans-2 is the second largest cluster's."""
N_CLUSTERS = 4
MOST = {"kmeans": N_CLUSTERS, "peel": 16}
"""How many there are of each."""
CATEGORY = "category"
"""Directions of the prompts' own categories: category-drugs is that of one."""
POOLS = ("ranks", *NUMBERED, CATEGORY, "cone")
"""Methods of several directions that are removed together; "ranks" are the best survivors of the search."""
FITTED = ("rdo", "cone")
"""Methods that take the model itself."""
HELP = (
    f"{', '.join(NAMES)}, kmeans-1 to kmeans-{N_CLUSTERS}, peel-1 to peel-{MOST['peel']}, {CATEGORY}-NAME (of prompts "
    "that have one)"
)


def parse_name(name: str) -> tuple[str, int]:
    """The estimator's name and its number, 0 where it has none: "peel-2" is peel and 2; category-drugs has 0.

    Raises:
        UserError: there is no such estimator; the message names a near one.
    """
    stem, _, number = name.partition("-")
    if name in NAMES:
        return name, 0
    if stem in NUMBERED and number.isdecimal() and number.isascii() and 1 <= int(number) <= MOST[stem]:
        return stem, int(number)
    if stem == CATEGORY and number.strip():
        return stem, 0
    numbered = [f"{each}-{index}" for each in NUMBERED for index in range(1, MOST[each] + 1)]
    near = get_close_matches(name.lower(), [*NAMES, *numbered], n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"no estimator is called {name!r}{meant}: choose {HELP}, or name a function of your own as module:function"
    )


def parse_methods(text: str, most: int) -> tuple[tuple[str, int], ...]:
    """Methods and how many directions of each are removed together: "mean,peel:3" is mean 1 and peel 3.

    A pool without a number is taken at every one from 1 to `most`; dim is another name of mean.

    Raises:
        UserError: there is no such method, or no such number of directions.
    """
    found: list[tuple[str, int]] = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = each.partition(":")
        name = "mean" if name == "dim" else name
        if name in POOLS:
            limit = MOST.get(name, 16)
            if number and not (number.isdecimal() and number.isascii() and 1 <= int(number) <= limit):
                raise UserError(f"--methods {each}: {name} has 1 to {limit} directions, such as {name}:2")
            counts = [int(number)] if number else range(1, min(most, limit) + 1)
            found += [(name, count) for count in counts]
        elif re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", each) and name not in (*NAMES, *FITTED):
            found.append((each, 1))  # module:function
        else:
            if number not in ("", "1"):
                raise UserError(f"--methods {each}: {name} has one direction; several have {', '.join(POOLS)}")
            if name not in FITTED:
                parse_name(name)
            found.append((name, 1))
    if not found:
        raise UserError("--methods names no method, such as mean,peel,kmeans:2")
    return tuple(dict.fromkeys(found))
