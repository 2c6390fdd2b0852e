"""Programs on a terminal that only tests look at: a pseudo-terminal, and what is drawn on it as plain text."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

LINES, COLUMNS = 50, 160
# Escape sequences of ECMA-48: control sequences, operating system commands, and single shifts.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[]P^_].*?(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]", re.DOTALL)


class Terminal:
    """A program that believes it runs on a terminal; a context manager that ends it."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self._screen, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._drawn = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            # W&B's dashboard is a child of its command.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._screen)

    def see(self, *texts: str, seconds: float = 60.0) -> str:
        """Look on until every one of `texts` was drawn; all that was drawn so far."""
        deadline = time.monotonic() + seconds
        while not all(text in self.drawn for text in texts):
            assert time.monotonic() < deadline, (
                f"never drawn: {[t for t in texts if t not in self.drawn]}\n{self.drawn}"
            )
            if select.select([self._screen], [], [], 0.2)[0]:
                try:
                    self._drawn += os.read(self._screen, 65536)
                # The program has ended, and with it the terminal.
                except OSError:
                    assert all(text in self.drawn for text in texts), self.drawn
        return self.drawn

    def end(self) -> int:
        """Look on until the program ends by itself; its exit code."""
        while True:
            try:
                if not (read := os.read(self._screen, 65536)):
                    break
            except OSError:
                break
            self._drawn += read
        return self.process.wait(timeout=60)

    @property
    def drawn(self) -> str:
        """Everything that was drawn, without its escape sequences."""
        return ESCAPES.sub("", self._drawn.decode(errors="replace"))
