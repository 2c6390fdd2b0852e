"""A thread that does something small again and again. Light: standard library only."""

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
        """What is done every time; it may not raise."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.act()
            if self._stop.wait(self._seconds):
                return
