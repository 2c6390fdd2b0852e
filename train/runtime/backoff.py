"""Pauses between tries to reach something that is away. Light: the launcher uses it too."""

from __future__ import annotations

import math
from collections.abc import Iterator


def backoff(first: float, longest: float, *, factor: float = 2.0, total: float = math.inf) -> Iterator[float]:
    """Pauses in seconds: each `factor` times the one before, at most `longest`, until they add up to `total`.

    ``backoff(1, 16, total=60)`` is 1, 2, 4, 8, 16, 16, 16.
    """
    pause = first
    waited = 0.0
    while waited < total:
        yield pause
        waited += pause
        pause = min(longest, factor * pause)
