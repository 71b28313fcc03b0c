"""What the estimators are called on the command line; no torch, so that help is printed at once."""

from difflib import get_close_matches

from ..errors import UserError

NAMES = ("mean", "median", "winsorised", "clipped", "projected", "pca", "logistic", "lda")
NUMBERED = ("kmeans", "peel")
"""One of several directions of each position and layer: kmeans-2 is the second largest cluster's."""
N_CLUSTERS = 4
MOST = {"kmeans": N_CLUSTERS, "peel": 16}
"""How many there are of each."""
HELP = f"{', '.join(NAMES)}, kmeans-1 to kmeans-{N_CLUSTERS}, peel-1 to peel-{MOST['peel']}"


def parse_name(name: str) -> tuple[str, int]:
    """The estimator's name and its number, 0 where it has none: "peel-2" is peel and 2.

    Raises:
        UserError: there is no such estimator; the message names a near one.
    """
    stem, _, number = name.partition("-")
    if name in NAMES:
        return name, 0
    if stem in NUMBERED and number.isdecimal() and number.isascii() and 1 <= int(number) <= MOST[stem]:
        return stem, int(number)
    numbered = [f"{each}-{index}" for each in NUMBERED for index in range(1, MOST[each] + 1)]
    near = get_close_matches(name.lower(), [*NAMES, *numbered], n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"no estimator is called {name!r}{meant}: choose {HELP}, or name a function of your own as module:function"
    )
