"""One process makes what all share, while the others wait for it."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from train.store.storage import storage_errors

LOCK_POLL_SECONDS = 0.2


@contextmanager
def locked(path: Path, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock; the system gives it up with the process. A file system without locks lets everybody pass.

    `stop` is called while waiting and may raise.

    Raises:
        StorageError: the lock's file cannot be made.
    """
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _wait_for_lock(handle, path, stop)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, path: Path, stop: Callable[[], None]) -> None:
    said = False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                print(f"another process is making {path.stem}; waiting for it ...", file=sys.stderr, flush=True)
            said = True
            stop()
            time.sleep(LOCK_POLL_SECONDS)
        except OSError:
            return None
