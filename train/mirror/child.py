"""The trainer's side: start the mirror, and end it within a bounded time. Light, and all that a trainer ever does for W&B."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.runtime.signals import STOP_SIGNALS
from train.store.layout import PackDir
from train.store.records import PackRecord

log = logging.getLogger("lorapack.mirror")

PATIENCE_SECONDS = 25.0  # above the supervisor's own END_SECONDS


class Mirror:
    """The mirror of a job, or none: an object that does nothing."""

    def __init__(self, process: subprocess.Popen[bytes] | None, sweep: str) -> None:
        self._process = process
        self._sweep = sweep

    def finish(self) -> None:
        """Let the mirror know that nothing more will be written. It finishes by itself, while this process does other things."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait for its end, which comes by force after `PATIENCE_SECONDS`."""
        if self._process is None:
            return
        try:
            code = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        if code != 0:
            log.warning(f"W&B lacks the end of these runs; 'python -m launcher sync {self._sweep}' sends it")


@contextmanager
def mirrored(pack_file: Path, pack: PackRecord) -> Iterator[Mirror]:
    """Have the pack mirrored to W&B meanwhile, as its `tracking` says; errors of the mirror stay in its log."""
    mode = pack.tracking.get("mode", "off")
    off = mode == "off" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled")
    mirror = Mirror(None if off else _start(pack_file), Path(pack.sweep_dir).name)
    try:
        yield mirror
    finally:
        mirror.finish()
        mirror.wait()


def _start(pack_file: Path) -> subprocess.Popen[bytes] | None:
    """A session of its own, deaf to the job's signals from its first instruction. Its standard input ends when we end, however."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGHUP])
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
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
