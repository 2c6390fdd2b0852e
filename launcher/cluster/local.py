"""Jobs on this machine, through submitit.

A job is a process of its own. It survives its launcher, a Ctrl-C and a closed terminal. How it ended is read from run folders, never
from submitit's pickles. Waiting jobs exist only in the launcher: if it goes away, the next command plans them again.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.commands import answer_of
from launcher.config import ClusterConfig
from launcher.installation import python_path
from train.errors import BadInput
from train.store.layout import PackDir, RunDir
from train.store.lease import process_started, read_lease
from train.store.record_file import write_record
from train.store.records import LocalJobRecord, runs_of_pack
from train.store.storage import make_folder

# No limit in practice. submitit's local default of 2 minutes is meant for tests.
TEN_YEARS_MIN = 10 * 365 * 24 * 60


@dataclass(frozen=True)
class LocalJob:
    """A started job; `handle` is submitit's."""

    pack: PackDir
    id: str
    gpus: tuple[str, ...]
    handle: Any

    @property
    def ended(self) -> bool:
        """Whether its process is gone. Asking also removes it from the process table."""
        return bool(self.handle.done())

    def runs(self) -> list[RunDir]:
        """The runs that it trains."""
        return runs_of_pack(self.pack)

    def pids(self) -> set[int]:
        """The processes of this job that hold runs, so their signal handlers are installed."""
        leases = (read_lease(run) for run in self.runs())
        return {lease.pid for lease in leases if lease is not None and lease.job == self.id and lease.alive()}


class LocalQueue:
    """Packs that train on this machine in order, `slots` at a time. If there are GPUs, each job has its own."""

    def __init__(self, packs: list[PackDir], code: Path, slots: int, gpus: list[str], gpus_per_job: int = 1) -> None:
        self.waiting = deque(packs)
        self.running: list[LocalJob] = []
        self._code = code
        self._gpus = gpus
        self._gpus_per_job = gpus_per_job
        self._slots = min(slots, len(gpus) // gpus_per_job) if gpus else slots

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self.running or self.waiting)

    def advance(self) -> list[LocalJob]:
        """Start the next jobs; those that have ended since the last call."""
        ended = [job for job in self.running if job.ended]
        self.running = [job for job in self.running if job not in ended]
        while self.waiting and len(self.running) < self._slots:
            pack = self.waiting.popleft()
            if not all(run.cancel_request.exists() for run in runs_of_pack(pack)):
                self.running.append(start_job(pack, self._code, self._free_gpus()))
        return ended

    def drop_waiting(self) -> None:
        """Forget what has not started."""
        self.waiting.clear()

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {gpu for job in self.running for gpu in job.gpus}
        return tuple(gpu for gpu in self._gpus if gpu not in taken)[: self._gpus_per_job]


def open_queue(packs: list[PackDir], code: Path, cluster: ClusterConfig) -> LocalQueue:
    """A queue whose first jobs have been started."""
    queue = LocalQueue(packs, code, cluster.jobs_at_once(slurm=False), visible_gpus(), cluster.gpus_per_job)
    queue.advance()
    return queue


def refuse_too_few_gpus(cluster: ClusterConfig) -> None:
    """Refuse a job that wants more GPUs than this machine has; one without any trains on its CPU.

    Raises:
        BadInput: naming both numbers.
    """
    gpus = len(visible_gpus())
    if 0 < gpus < cluster.gpus_per_job:
        raise BadInput(
            f"cluster.gpus_per_job={cluster.gpus_per_job}, and this machine has {gpus}; set it to at most {gpus}."
        )


def start_job(pack: PackDir, code: Path, gpus: tuple[str, ...]) -> LocalJob:
    """Start one pack as a job with a process per GPU, importing from `code`; its id goes into ``job.json``."""
    from submitit import LocalExecutor

    from train.job import PackJob

    executor = LocalExecutor(make_folder(pack.submitit), python=_job_python(code, gpus))
    executor.update_parameters(timeout_min=TEN_YEARS_MIN, tasks_per_node=max(1, len(gpus)))
    with _inherited_by_jobs():
        handle = executor.submit(PackJob(str(pack.pack)))
    # The id is the process id of submitit's controller, the parent of the process that trains.
    pid = int(handle.job_id)
    record = LocalJobRecord(
        job=handle.job_id,
        executor="local",
        pid=pid,
        pid_started=process_started(pid),
        host=socket.gethostname(),
        submitted=time.time(),
    )
    write_record(pack.job, record)
    return LocalJob(pack, handle.job_id, gpus, handle)


def log_files(pack: PackDir) -> list[Path]:
    """The logs of every attempt, the oldest first; of each attempt stdout, then stderr."""
    outputs = sorted(pack.submitit.glob("*_log.out"), key=lambda path: path.stat().st_mtime)
    return [file for output in outputs for file in (output, output.with_suffix(".err")) if file.exists()]


def visible_gpus() -> list[str]:
    """The GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them; the user's own setting is respected."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in {"", "-1"}]
    listing = answer_of("nvidia-smi", "-L") or ""
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]


def _job_python(code: Path, gpus: tuple[str, ...]) -> str:
    """The interpreter with the job's environment: the frozen code first, nothing from the working folder, its own GPUs.

    It goes through env(1) because submitit sets CUDA_VISIBLE_DEVICES itself, and only to whole numbers.
    """
    settings = {
        "PYTHONPATH": python_path(code),
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        # The log is for what the trainer writes.
        "SUBMITIT_LOG_LEVEL": "WARNING",
    }
    return shlex.join(["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable])


@contextmanager
def _inherited_by_jobs() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C and hang-up until they install handlers, and their files are private.

    submitit's controller would otherwise die of the terminal's Ctrl-C and kill its job a second later.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    umask = os.umask(0o077)
    try:
        with _without_terminal():
            yield
    finally:
        os.umask(umask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Standard streams to /dev/null: a job that outlives its launcher must not keep the reader of a pipe waiting."""
    null = os.open(os.devnull, os.O_RDWR)
    saved = [os.dup(stream) for stream in (0, 1, 2)]
    try:
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in enumerate(saved):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)
