"""A thread that does something small at intervals. Light: standard library only."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class PeriodicThread(ABC):
    """Calls `act` at once and then every `seconds` in a daemon thread, from ``__enter__`` to ``__exit__``."""

    def __init__(self, name: str, seconds: float) -> None:
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def act(self) -> None:
        """What is done each time; it must not raise."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.act()
            # The wait ends early once `__exit__` is called.
            if self._stop.wait(self._seconds):
                return
