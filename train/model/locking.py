"""A lock between processes: one makes what all share, while the others wait for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from train.store.storage import storage_errors

log = logging.getLogger("lorapack.model")

LOCK_POLL_SECONDS = 0.2
PRIVATE = 0o600


@contextmanager
def locked(path: Path, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases when the process ends. A file system without locks lets everybody pass.

    `stop` is called while waiting and may raise.

    Raises:
        StorageError: the lock's file cannot be made or opened.
    """
    with storage_errors(path):
        path.touch(PRIVATE)
    # fallback_to_soft: filelock's substitute for missing locks is a file that outlives a killed process.
    lock = FileLock(path, mode=PRIVATE, fallback_to_soft=False)
    _wait_for(lock, path, stop)
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: BaseFileLock, path: Path, stop: Callable[[], None]) -> None:
    said = False
    while True:
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            return
        except Timeout:
            if not said:
                log.info(f"another process is making {path.stem}; waiting for it ...")
            said = True
            stop()
        # The file is there, so what fails is the lock itself: the file system has none (ENOLCK, ENOSYS, EOPNOTSUPP).
        except OSError:
            return
