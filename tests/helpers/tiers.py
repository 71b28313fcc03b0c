"""What `make test-fast` leaves out of a test that runs on many things."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_is_fast(values: Iterable[str]) -> list[Any]:
    """Parameters of which all but the first are slow."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
