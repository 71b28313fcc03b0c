"""The one exception that means "the caller can fix this"."""

import re


class UserError(ValueError):
    """A mistake in what was asked for; the message says what was expected, what came, and what to do.

    The command line prints it as one line and exits with status 2. Every other exception is a defect: one line that
    names it, and its traceback with --debug.

    Examples:
        >>> try:
        ...     load_run("no/such/run")
        ... except UserError as error:
        ...     print(error)
        no/such/run is not a run folder: it has no run.json; give the --output-dir of refusal-mi run
    """

    def __init__(self, message: object) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", str(message)))


class NoSuchName(UserError, KeyError):
    """A name that is none of those there are; also what a mapping raises."""

    __str__ = UserError.__str__


def cause(error: BaseException) -> str:
    """The first line of what an error of foreign code says, with the next after a colon; or what it is called."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
