"""The mirror as the trainer's child process: it is started, kept alive, and ended within a bounded time.

Light, and all that a trainer ever does for W&B. The child is a supervisor, which runs a worker (`train.mirror.worker`) and replaces
one that dies. Why two processes: Slurm's SIGTERM goes to every process of a job, and it kills wandb-core, W&B's own process, which
blocks no signal. The supervisor ignores the job's signals, so it can start another worker that sends what is missing.

    the trainer ends          0 s      the child's standard input ends
    END_SECONDS              20 s      the supervisor kills its worker and ends
    PATIENCE_SECONDS         25 s      the trainer kills the supervisor and all that it started
    Slurm's KillWait         30 s      by default: everything is killed
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.runtime.backoff import backoff
from train.runtime.signals import STOP_SIGNALS
from train.store.layout import PackDir
from train.store.records import PackRecord

log = logging.getLogger("lorapack.mirror")

# From the trainer's end to the supervisor's, and to the end by force.
END_SECONDS = 20.0
PATIENCE_SECONDS = 25.0
POLL_SECONDS = 0.2
# Before the next worker, doubled each time while the trainer runs.
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
# Workers that may fail once the trainer has ended.
LAST_TRIES = 3


class Mirror:
    """The mirror of a job. Without a process (tracking is off, or it could not be started) it does nothing."""

    def __init__(self, process: subprocess.Popen[bytes] | None, sweep: str) -> None:
        self._process = process
        self._sweep = sweep

    def finish(self) -> None:
        """Tell the mirror that nothing more will be written. It finishes on its own while this process does other things."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait for its end, which is forced after `PATIENCE_SECONDS`."""
        if self._process is None:
            return
        try:
            code = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            # The child leads a session of its own, so its process group is everything that it started.
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        if code != 0:
            log.warning(f"W&B lacks the end of these runs; 'python -m launcher sync {self._sweep}' sends it")


@contextmanager
def mirrored(pack_file: Path, pack: PackRecord) -> Iterator[Mirror]:
    """Mirror the pack to W&B inside the block, if its `tracking` wants that. The mirror's errors go to its own log."""
    mode = pack.tracking.get("mode", "off")
    off = mode == "off" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled")
    mirror = Mirror(None if off else _start(pack_file), Path(pack.sweep_dir).name)
    try:
        yield mirror
    finally:
        mirror.finish()
        mirror.wait()


def _start(pack_file: Path) -> subprocess.Popen[bytes] | None:
    """Start the supervisor in a session of its own.

    Its standard input is a pipe that the kernel closes when this process ends, even by SIGKILL.
    """
    # A child inherits the mask, so the signals are blocked for it from its first instruction on. Ours is restored below.
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGHUP])
    try:
        log_file = os.open(PackDir(pack_file.parent).mirror_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(log_file, "ab") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "train.mirror", "follow", str(pack_file)],
                stdin=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
    except OSError as exc:
        log.warning(f"W&B: the mirror could not be started ({exc})")
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def supervise(pack_file: str) -> int:
    """Run workers until one ends well, or the trainer has been gone for `END_SECONDS`; the exit code.

    Their temporary files are removed here: W&B's processes leave folders and sockets wherever they are killed.
    """
    work = [sys.executable, "-m", "train.mirror", "work", pack_file, str(os.getppid())]
    with tempfile.TemporaryDirectory(prefix="lorapack-", ignore_cleanup_errors=True) as scratch:
        return _supervise(work, os.environ | {"TMPDIR": scratch})


def trainer_has_ended(seconds: float) -> bool:
    """Wait at most `seconds` for the end of standard input, which is the trainer's end or its `Mirror.finish`."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _supervise(work: list[str], environment: dict[str, str]) -> int:
    pauses = backoff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
    deadline: float | None = None
    tries = 0
    while tries < LAST_TRIES:
        worker = subprocess.Popen(work, env=environment)
        deadline = _wait(worker, deadline)
        if worker.returncode == 0:
            return 0
        # While the trainer runs, workers may fail forever: the server may come back.
        if deadline is None and not trainer_has_ended(next(pauses)):
            continue
        deadline = deadline or time.monotonic() + END_SECONDS
        if time.monotonic() >= deadline:
            break
        tries += 1
    return 1


def _wait(worker: subprocess.Popen[bytes], deadline: float | None) -> float | None:
    """Wait for the worker to end, and kill it after the deadline; the deadline, which is set once the trainer has ended."""
    while worker.poll() is None:
        if deadline is None:
            deadline = time.monotonic() + END_SECONDS if trainer_has_ended(POLL_SECONDS) else None
        elif time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        else:
            worker.kill()
            worker.wait()
    return deadline
