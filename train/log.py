"""The log of a process: the logger ``lorapack`` with a child per room, and the one handler that its entry points set up.

Messages are written plainly, as people read them in a job's log. Light: standard library only.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

LOGGER = "lorapack"


class PlainHandler(logging.StreamHandler[TextIO]):
    """Writes bare messages. Slurm may take the log away, or its disk may be full: neither may end a job."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Drop the message if the stream refused it or is closed; any other error is a defect and shown as logging does."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handleError(record)


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Write the messages of this process from `level` on to `stream`, and nowhere else that was set up before."""
    logger = logging.getLogger(LOGGER)
    logger.handlers = [PlainHandler(stream)]
    logger.setLevel(level)
