"""The entry point of a job: one process, one pack, from leases to results.

Light until the handlers stand: whoever starts the job gives it a path, and torch is imported inside. Every way to end is one of the
causes in `train.runtime.attempts`, written to every run of the pack. A job that Slurm stops asks to be queued again once all is saved.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.errors import LeaseHeld, StorageError
from train.mirror.child import mirrored
from train.runtime.activity import Activity, Bulletin
from train.runtime.attempts import (
    attempt_line,
    cause_of,
    device_in_use,
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
from train.store.layout import CacheDir, PackDir, RunDir
from train.store.lease import FENCE_SECONDS, STALE_SECONDS, Heartbeat, Lease, owns, read_lease, release
from train.store.storage import append_lines, read_json, read_lines

Leases = list[tuple[RunDir, Lease]]


@dataclass(frozen=True)
class PackJob:
    """The callable that a cluster runs. It holds only the path of the pack's file, so that unpickling it imports nothing heavy."""

    pack_file: str

    def __call__(self) -> str:
        """Train the pack; the cause of the end is returned for the log, what counts is in the run folders."""
        stop, place, folder = StopFlag().install(), detect_process(), PackDir(Path(self.pack_file).parent)
        if place.rank > 0:
            prepare_torch(CacheDir(Path(read_json(folder.pack)["cache"])).compiled)
            with heavy_imports():
                from train.trainer.pack import follow

            return follow(folder, stop, place)
        try:
            return self._lead(stop, place, folder)
        finally:
            if place.size > 1:
                with suppress(StorageError):
                    publish_rendezvous(folder, None)  # whoever still waits for the leader need not

    def _lead(self, stop: StopFlag, place: ProcessInfo, folder: PackDir) -> str:
        """Train the pack as the process that answers for its runs."""
        pack = read_json(Path(self.pack_file))
        todo = [run for run in _runs(pack) if not run.result.exists()]
        if not todo:
            say("every run of this pack is done; nothing to train")
            return Cause.DONE
        if all(run.cancel_request.exists() for run in todo):
            say("cancel was asked for; nothing to train")
            return Cause.CANCELLED
        job, wanted = this_job(), [run for run in todo if not _is_held(run)]
        leases, superseded = _take(wanted, stop)
        if not leases:
            return _end_empty_handed(job, wanted, stop)
        with mirrored(Path(self.pack_file), pack, say) as mirror:
            why, activity = functools.partial(_why_stopped, job), Activity(say)
            with (
                Heartbeat(leases),
                StopSignalListener(leases, why) as witness,
                Bulletin(folder, activity, leases[0][1]),
            ):
                stop.explain = witness.cause
                fence = _fence(stop) if superseded else _no_fence
                cause = _train(leases, folder, Path(pack["cache"]), stop, place, fence, activity)
            mirror.finish()
            _go_on_later(job, cause, [run for run, _ in leases])
        return cause


@dataclass(frozen=True)
class ArrayTask:
    """What every task of an array runs: it finds its pack by its place in the array's record."""

    record_file: str

    def __call__(self) -> str:
        """Train the pack of this task."""
        packs = read_json(Path(self.record_file))["packs"]
        return PackJob(packs[int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)])()


def say(text: str) -> None:
    """A line for the job's log. Slurm may take the log away before the job ends, which must not end the job."""
    with suppress(OSError):
        print(text, flush=True)


def _runs(pack: dict[str, object]) -> list[RunDir]:
    sweep = Path(str(pack["sweep_dir"]))
    names = pack["runs"]
    return [RunDir(sweep / str(name)) for name in names] if isinstance(names, list) else []


def _is_held(run: RunDir) -> bool:
    """Whether this job has ended with the run, or tried it often enough; says so."""
    attempts = read_lines(run.attempts)
    reason = give_up_reason(attempts, job_id())
    if attempts and attempts[-1]["job"] == job_id() and attempts[-1]["cause"] in TERMINAL:
        reason = f"it ended with {attempts[-1]['cause']}"
    if reason is not None:
        say(f"{run.path.name} is left alone: {reason}")
    return reason is not None


def _take(runs: list[RunDir], stop: StopFlag) -> tuple[Leases, bool]:
    """Take every run folder that no other live process trains; whether an earlier copy of this job may still be running.

    On Slurm a job waits for leases from other nodes: what a lost node held grows stale in `STALE_SECONDS`.
    """
    taken: Leases = []
    job, superseded, told = this_job(), False, set[str]()
    give_up_at = time.monotonic() + (STALE_SECONDS + 10 if job else 0)
    while runs:
        busy = []
        for run in runs:
            before = read_lease(run)
            try:
                taken.append((run, open_attempt(run)))
                superseded |= before is not None and before.alive()
            except LeaseHeld as exc:
                if str(exc) not in told:
                    say(str(exc))
                told.add(str(exc))
                busy.append(run)
            except StorageError as exc:  # its folder is gone or full: the others train without it
                say(str(exc))
        if taken or time.monotonic() > give_up_at or stop.signal_name:
            break
        runs = busy
        time.sleep(1)
    return taken, superseded


def _end_empty_handed(job: SlurmJob | None, runs: list[RunDir], stop: StopFlag) -> str:
    """The end of a job that came to no run; one that was stopped while it waited for them goes on later like any other."""
    if stop.signal_name is None:
        return "nothing to train"
    cause, _ = _why_stopped(job, stop.signal_name)
    _go_on_later(job, cause, runs)
    return cause


def _go_on_later(job: SlurmJob | None, cause: str, runs: list[RunDir]) -> None:
    """On Slurm: have a job that was stopped queued again, if any of its runs is to go on."""
    if job and cause in STOPPED_AND_REQUEUED and any(map(_goes_on, runs)):
        requeue(job, say)


def _no_fence() -> None:
    """Nothing else can be writing."""


def _fence(stop: StopFlag) -> Callable[[], None]:
    """What waits until a copy of this job that lost its leases has surely noticed, counted from now."""
    until = time.monotonic() + FENCE_SECONDS

    def wait() -> None:
        while (left := until - time.monotonic()) > 0:
            stop.check()
            time.sleep(min(0.5, left))

    return wait


def _train(
    leases: Leases,
    folder: PackDir,
    cache: Path,
    stop: StopFlag,
    place: ProcessInfo,
    fence: Callable[[], None],
    activity: Activity,
) -> str:
    """Run the pack and turn every ending into its cause."""
    try:
        stop.check()
        prepare_torch(CacheDir(cache).compiled)
        say("importing torch")
        if place.size > 1:
            with heavy_imports():
                from train.trainer.pack import lead

            fence()
            lead(leases, folder, cache, stop, say, activity, place)
        else:
            with heavy_imports():
                from train.trainer.pack import train_pack

            fence()
            train_pack(leases, cache, stop, say, activity)
    except Exception as exc:
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        say(f"ended: {cause}: {detail}")
        for run, lease in leases:
            _end_unseated(run, lease, cause, detail)
        return cause
    return Cause.DONE


def _end_unseated(run: RunDir, lease: Lease, cause: Cause, detail: str) -> None:
    """Write the cause to a run that never came to train, or whose session could not write its own."""
    if not owns(run, lease):
        return
    try:
        step, why = last_step(run), stop_cause(run, cause, detail)
        append_lines(run.attempts, [attempt_line(run, lease, *why, step, step, device=device_in_use())])
    except StorageError as exc:
        say(str(exc))
    release(run, lease)


def _why_stopped(job: SlurmJob | None, signal_name: str) -> tuple[Cause, str]:
    """The cause of an end by a signal."""
    if job is None:
        return Cause.PREEMPTED, signal_name
    return cause_of_signal(signal_name, job, job_facts(job), time.time())


def _goes_on(run: RunDir) -> bool:
    return not run.result.exists() and not run.cancel_request.exists()


def main() -> None:
    """``python -m train.job PACK_JSON`` trains one pack in this process."""
    say(PackJob(sys.argv[1])())


if __name__ == "__main__":
    main()
