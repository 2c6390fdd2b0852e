"""The entry point of a job: one process, one pack, from leases to results.

Nothing heavy is imported before the signal handlers are set: the job is started with a path, and torch is imported inside. Every way
to end is one of the causes in `train.store.causes`, and is written to every run of the pack. A job that Slurm stops asks to be queued
again once everything is saved.

The requeue fence: on Slurm the second copy of a job may start while the first still runs on a node that Slurm has lost.

    t =  0 s   the second copy replaces the first one's leases, and begins to import torch
    t = 10 s   at the latest the first copy's heartbeat finds other owners, and the process ends without another write
    t = 25 s   `FENCE_SECONDS` are over: the second copy begins to read checkpoints and to write
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.config import read_run_config
from train.errors import DamagedFile, LeaseHeld, StorageError
from train.log import log_to
from train.mirror.child import mirrored
from train.runtime.activity import Activity, ActivityPublisher
from train.runtime.attempts import (
    attempt_line,
    cause_of,
    give_up_reason,
    job_id,
    last_step,
    open_attempt,
    stop_cause,
)
from train.runtime.environment import heavy_imports, prepare_torch
from train.runtime.rendezvous import ProcessInfo, detect_process, publish_rendezvous
from train.runtime.signals import StopFlag, Stopped, StopSignalListener
from train.runtime.slurm import SlurmJob, cause_of_signal, job_facts, requeue, this_job
from train.store.causes import STOPPED_AND_REQUEUED, TERMINAL, Cause
from train.store.journal import AttemptLine
from train.store.layout import CacheDir, PackDir, RunDir
from train.store.lease import FENCE_SECONDS, STALE_SECONDS, Heartbeat, Lease, owns, read_lease, release
from train.store.line_file import append_records, read_records
from train.store.record_file import read_existing
from train.store.records import ArrayRecord, PackRecord, read_pack

log = logging.getLogger("lorapack.job")

Leases = list[tuple[RunDir, Lease]]


@dataclass(frozen=True)
class PackJob:
    """The callable that a cluster runs. It holds only the path of the pack's file, so unpickling it imports nothing heavy."""

    pack_file: str

    def __call__(self) -> str:
        """Train the pack. The cause of the end is returned for the log alone; other readers use the run folders."""
        stop = StopFlag().install()
        process = detect_process()
        folder = PackDir(Path(self.pack_file).parent)
        if process.rank > 0:
            # The main process logs the progress for all. Warnings differ from process to process.
            log_to(sys.stdout, logging.WARNING)
            return _train_along(folder, stop, process)
        log_to(sys.stdout)
        try:
            return self._train_as_main_process(folder, stop, process)
        finally:
            if process.size > 1:
                # Processes that still wait for this one would otherwise wait until their time is up.
                with suppress(StorageError):
                    publish_rendezvous(folder, None)

    def _train_as_main_process(self, folder: PackDir, stop: StopFlag, process: ProcessInfo) -> str:
        """Train the pack as the process that holds the leases of its runs and writes their files."""
        pack = read_existing(Path(self.pack_file), PackRecord)
        unfinished = [run for run in pack.run_dirs() if not run.result.exists()]
        if not unfinished:
            log.info("every run of this pack is done; nothing to train")
            return Cause.DONE
        if all(run.cancel_request.exists() for run in unfinished):
            log.info("cancel was asked for; nothing to train")
            return Cause.CANCELLED
        # None outside of Slurm: then nothing is requeued.
        job = this_job()
        wanted = [run for run in unfinished if not _is_left_alone(run)]
        taken = _take_leases(wanted, stop)
        if not taken.leases:
            return _end_without_leases(job, wanted, stop)
        with mirrored(Path(self.pack_file), pack) as mirror:
            activity = Activity()
            with (
                Heartbeat(taken.leases),
                StopSignalListener(taken.leases, functools.partial(_stop_reason, job)) as listener,
                ActivityPublisher(folder, activity, taken.leases[0][1]),
            ):
                # The listener has asked the cluster already when the loop wants to know.
                stop.explain = listener.cause
                cause = _train(folder, CacheDir(Path(pack.cache)), taken, process, stop, activity)
            # First, so that the mirror sends the rest while this process waits for the controller.
            mirror.finish()
            _requeue_if_stopped(job, cause, [run for run, _ in taken.leases])
        return cause


@dataclass(frozen=True)
class ArrayTask:
    """What every task of an array runs: task i trains pack i of the array's record."""

    record_file: str

    def __call__(self) -> str:
        """Train the pack of this task."""
        packs = read_existing(Path(self.record_file), ArrayRecord).packs
        return PackJob(packs[int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)])()


@dataclass(frozen=True)
class TakenLeases:
    """The runs that this process may train.

    `safe_at` is the time (monotonic, seconds) after which no earlier copy of this job writes to their folders.
    """

    leases: Leases
    safe_at: float


def _train_along(folder: PackDir, stop: StopFlag, process: ProcessInfo) -> str:
    """Train together with the main process, which writes the files of the runs."""
    prepare_torch(CacheDir(Path(read_pack(folder).cache)).compiled)
    with heavy_imports():
        from train.trainer.pack import train_as_worker_process

    return train_as_worker_process(folder, stop, process)


def _is_left_alone(run: RunDir) -> bool:
    """Whether this job is not to train the run: it ended the run for good, tried it often enough, or cannot read its files.

    The reason is logged.
    """
    try:
        attempts = read_records(run.attempts, AttemptLine)
        # A folder that is gone is reported when its lease is taken.
        if run.path.exists():
            read_run_config(run.config)
    except DamagedFile as exc:
        log.warning(f"{run.path.name} is left alone: {exc}")
        return True
    reason = give_up_reason(attempts, job_id())
    if attempts and attempts[-1].job == job_id() and attempts[-1].cause in TERMINAL:
        reason = f"it ended with {attempts[-1].cause}"
    if reason is not None:
        log.info(f"{run.path.name} is left alone: {reason}")
    return reason is not None


def _take_leases(runs: list[RunDir], stop: StopFlag) -> TakenLeases:
    """Take every run folder that no other live process trains.

    On Slurm a job waits for leases from other nodes: those of a lost node become stale after `STALE_SECONDS`.
    """
    leases: Leases = []
    superseded = False
    logged: set[str] = set()
    # A node that is lost right before its job is requeued leaves leases that look alive for `STALE_SECONDS` more.
    give_up_at = time.monotonic() + (STALE_SECONDS + 10 if this_job() else 0)
    while runs:
        busy = []
        for run in runs:
            before = read_lease(run)
            try:
                leases.append((run, open_attempt(run)))
                # It was alive and gave way nevertheless, so it is that of an earlier copy of this job.
                superseded |= before is not None and before.alive()
            except LeaseHeld as exc:
                # Once, although it is tried every second.
                if str(exc) not in logged:
                    log.warning(exc)
                logged.add(str(exc))
                busy.append(run)
            # The folder is gone or full: the others train without it.
            except StorageError as exc:
                log.warning(exc)
        # With some runs in hand it does not wait for the others: the jobs that train them will end them.
        if leases or time.monotonic() > give_up_at or stop.signal_name:
            break
        runs = busy
        time.sleep(1)
    # See the fence in the module's docstring. The time that importing torch takes counts.
    return TakenLeases(leases, time.monotonic() + (FENCE_SECONDS if superseded else 0))


def _end_without_leases(job: SlurmJob | None, runs: list[RunDir], stop: StopFlag) -> str:
    """The end of a job that got no run. If it was stopped while it waited for them, it is queued again like any other job."""
    if stop.signal_name is None:
        return "nothing to train"
    cause, _ = _stop_reason(job, stop.signal_name)
    _requeue_if_stopped(job, cause, runs)
    return cause


def _requeue_if_stopped(job: SlurmJob | None, cause: str, runs: list[RunDir]) -> None:
    """On Slurm: queue a stopped job again, if any of its runs still has something to train."""
    unfinished = any(not run.result.exists() and not run.cancel_request.exists() for run in runs)
    if job and cause in STOPPED_AND_REQUEUED and unfinished:
        requeue(job)


def _train(
    folder: PackDir, cache: CacheDir, taken: TakenLeases, process: ProcessInfo, stop: StopFlag, activity: Activity
) -> str:
    """Train the pack and turn every ending into its cause."""
    try:
        stop.check()
        prepare_torch(cache.compiled)
        log.info("importing torch")
        with heavy_imports():
            from train.trainer.pack import train_as_main_process

        # The fence.
        while time.monotonic() < taken.safe_at:
            stop.check()
            time.sleep(0.5)
        train_as_main_process(taken.leases, folder, cache, process, stop, activity)
    except Exception as exc:
        # A stop is an ordinary end, without anything to trace.
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        log.error(f"ended: {cause}: {detail}")
        for run, lease in taken.leases:
            _write_end(run, lease, cause, detail)
        return cause
    return Cause.DONE


def _write_end(run: RunDir, lease: Lease, cause: Cause, detail: str) -> None:
    """Write the cause to a run whose session has not done so: it did not begin to train, or could not write."""
    # A session that wrote its end has released the lease.
    if not owns(run, lease):
        return
    try:
        step = last_step(run)
        line = attempt_line(run, lease, stop_cause(run, cause, detail), step, step)
        append_records(run.attempts, [line])
    except StorageError as exc:
        log.warning(exc)
    release(run, lease)


def _stop_reason(job: SlurmJob | None, signal_name: str) -> tuple[Cause, str]:
    """The cause of an end by a signal, and its detail."""
    if job is None:
        return Cause.PREEMPTED, signal_name
    return cause_of_signal(signal_name, job, job_facts(job), time.time())


def main() -> None:
    """``python -m train.job PACK_JSON`` trains one pack in this process."""
    cause = PackJob(sys.argv[1])()
    # Every process logs how it ended, also those that leave other messages to the main process.
    log_to(sys.stdout)
    log.info(cause)


if __name__ == "__main__":
    main()
