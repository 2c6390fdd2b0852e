"""Keeps a worker running next to the trainer: one that dies, however it dies, is followed by another.

Slurm's SIGTERM goes to every process of a job and kills wandb-core, which no mask can prevent. The supervisor is deaf to the
signals, so that the worker after the killed one can still send what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from train.mirror.worker import trainer_has_ended
from train.runtime.backoff import backoff

# From the trainer's end to ours; Slurm's KillWait is 30 s.
END_SECONDS = 20.0
POLL_SECONDS = 0.2
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
LAST_TRIES = 3


def supervise(pack_file: str) -> int:
    """Run workers until one ends well, or the trainer has been gone for `END_SECONDS`; the exit code.

    Their temporary files are removed here: W&B's processes leave folders and sockets wherever they are killed.
    """
    work = [sys.executable, "-m", "train.mirror", "work", pack_file, str(os.getppid())]
    with tempfile.TemporaryDirectory(prefix="lorapack-", ignore_cleanup_errors=True) as scratch:
        return _supervise(work, os.environ | {"TMPDIR": scratch})


def _supervise(work: list[str], environment: dict[str, str]) -> int:
    pauses = backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
    deadline: float | None = None
    tries = 0
    while tries < LAST_TRIES:
        worker = subprocess.Popen(work, env=environment)
        deadline = _wait(worker, deadline)
        if worker.returncode == 0:
            return 0
        if deadline is None and not trainer_has_ended(next(pauses)):
            continue
        deadline = deadline or time.monotonic() + END_SECONDS
        if time.monotonic() >= deadline:
            break
        tries += 1
    return 1


def _wait(worker: subprocess.Popen[bytes], deadline: float | None) -> float | None:
    """Wait for the worker to end, by force after the deadline, which begins to run when the trainer ends."""
    while worker.poll() is None:
        if deadline is None:
            deadline = time.monotonic() + END_SECONDS if trainer_has_ended(POLL_SECONDS) else None
        elif time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        else:
            worker.kill()
            worker.wait()
    return deadline
