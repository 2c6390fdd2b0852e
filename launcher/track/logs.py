"""What jobs wrote to stdout and stderr: all of it, as it is written, or the last lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.cluster.local import log_files
from launcher.cluster.slurm import task_logs
from launcher.track.jobs import JobRecord, jobs_of, look_up
from train.store.layout import PackDir, RunDir, SweepDir

POLL_SECONDS = 0.5
# Between questions to a Slurm controller, which serves many users.
SLURM_POLL_SECONDS = 10.0
TAIL_BYTES = 8192


def jobs_of_run(run: RunDir) -> list[JobRecord]:
    """The jobs that were given the run, the oldest first."""
    return [job for job in jobs_of(SweepDir(run.path.parent)) if run.path.name in job.runs]


def logs_of(job: JobRecord) -> list[Path]:
    """The logs of a job, the oldest first, for each attempt stdout and then stderr. On Slurm all attempts append to one pair."""
    if job.slurm is None:
        return log_files(job.pack)
    return task_logs(job.slurm.array, job.slurm.task)


def read_logs(run: RunDir, *, follow: bool) -> Iterator[str]:
    """The logs of every job that trained the run, each file after a line with its name.

    follow: yield what is appended, until no job has the run any more.
    """
    seen: dict[Path, int] = {}
    waiting = follow
    asked_at = float("-inf")
    while True:
        jobs = jobs_of_run(run)
        pause = SLURM_POLL_SECONDS if any(job.slurm for job in jobs) else POLL_SECONDS
        if waiting and time.monotonic() - asked_at >= pause:
            asked_at = time.monotonic()
            waiting = any(job.alive is not False for job in look_up(jobs))
        for job in jobs:
            for file in logs_of(job):
                yield from _appended(file, seen)
        if not waiting:
            return
        time.sleep(POLL_SECONDS)


def logs_json(run: RunDir) -> dict[str, Any]:
    """The same as one JSON document: each log with its lines, the job that wrote it, and the last node of that job.

    Job and node are None if they are unknown.
    """
    logs = [
        {"path": str(file), "job": job.id, "node": job.host, "lines": file.read_text(errors="replace").splitlines()}
        for job in look_up(jobs_of_run(run))
        for file in logs_of(job)
    ]
    return {"sweep": run.path.parent.name, "run": run.path.name, "logs": logs}


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a log, read from its last `TAIL_BYTES` only."""
    with file.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
        return log.read().decode(errors="replace").splitlines()[-count:]


class LogTailer:
    """Follows the stdout of jobs, line by line."""

    def __init__(self) -> None:
        self._read_bytes: dict[Path, int] = {}

    def new_lines(self, pack: PackDir) -> list[str]:
        """The complete lines of the pack's newest attempt that were not returned before."""
        outputs = [file for file in log_files(pack) if file.suffix == ".out"]
        if not outputs:
            return []
        start = self._read_bytes.get(outputs[-1], 0)
        with outputs[-1].open("rb") as log:
            log.seek(start)
            whole = log.read().rpartition(b"\n")[0]
        # The newline behind the last complete line is read too; an incomplete line is left for the next call.
        self._read_bytes[outputs[-1]] = start + len(whole) + (1 if whole else 0)
        return whole.decode(errors="replace").splitlines()


def last_stderr(pack: PackDir, count: int = 12) -> tuple[list[str], Path | None]:
    """The last lines of the newest stderr and its path; ``([], None)`` if no job has begun."""
    errors = [file for file in log_files(pack) if file.suffix == ".err"]
    return (last_lines(errors[-1], count), errors[-1]) if errors else ([], None)


def _appended(file: Path, seen: dict[Path, int]) -> Iterator[str]:
    """What was appended to `file` since the last call, after a line with its name the first time."""
    start = seen.get(file, 0)
    with file.open("rb") as log:
        log.seek(start)
        text = log.read()
    if text and start == 0:
        yield f"==> {file}\n"
    if text:
        seen[file] = start + len(text)
        yield text.decode(errors="replace")
