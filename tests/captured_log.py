"""The lines that lorapack logs, as a list: for tests of what a job's log says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from train.log import LOGGER


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def captured_log(level: int = logging.INFO) -> Iterator[list[str]]:
    """What is logged in here from `level` on, line by line."""
    logger = logging.getLogger(LOGGER)
    lines: list[str] = []
    handler, before = _Lines(lines), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
