"""Parameters of tests that are left for the night, where the others find the same faults."""

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(values: Iterable[Any], *, every_time: Iterable[Any]) -> list[Any]:
    """Returns the values as parameters, those slow that aren't tried every time."""
    kept = list(every_time)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
