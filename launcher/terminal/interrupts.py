"""Ctrl-C in the terminal, counted instead of raised."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """How often the user pressed Ctrl-C."""

    count: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count instead of raising KeyboardInterrupt in the middle of whatever the launcher does."""
        before = signal.signal(signal.SIGINT, self._count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
