"""The entry point of a job: one process, one pack, from leases to results.

Light until the handlers stand: whoever starts the job gives it a path, and torch is imported inside. Every way to end is one of the
causes in `train.attempts`, written to every run of the pack.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from train.attempts import attempt_line, cause_of, device_in_use, last_step, open_attempt
from train.environment import prepare_torch
from train.errors import LeaseHeld, StorageError
from train.lease import Heartbeat, Lease, release
from train.rundir import CacheDir, RunDir, append_lines, read_json
from train.signals import StopFlag, Stopped


@dataclass(frozen=True)
class PackJob:
    """The callable that a cluster runs. It holds only the path of the pack's file, so that unpickling it imports nothing heavy."""

    pack_file: str

    def __call__(self) -> str:
        """Train the pack; the cause of the end is returned for the log, what counts is in the run folders."""
        stop = StopFlag().install()
        pack = read_json(Path(self.pack_file))
        todo = [run for run in _runs(pack) if not run.result.exists()]
        if not todo:
            say("every run of this pack is done; nothing to train")
            return "done"
        leases = _take(todo)
        if not leases:
            return "nothing to train"
        with Heartbeat(leases):
            return _train(leases, Path(pack["cache"]), stop)


def say(text: str) -> None:
    """A line for the job's log."""
    print(text, flush=True)


def _runs(pack: dict[str, object]) -> list[RunDir]:
    sweep = Path(str(pack["sweep_dir"]))
    names = pack["runs"]
    return [RunDir(sweep / str(name)) for name in names] if isinstance(names, list) else []


def _take(runs: list[RunDir]) -> list[tuple[RunDir, Lease]]:
    """Take every run folder that no other live process trains."""
    taken = []
    for run in runs:
        try:
            taken.append((run, open_attempt(run)))
        except LeaseHeld as exc:
            say(str(exc))
    return taken


def _train(leases: list[tuple[RunDir, Lease]], cache: Path, stop: StopFlag) -> str:
    """Run the pack and turn every ending into its cause."""
    try:
        stop.check()
        prepare_torch(CacheDir(cache).compiled)
        say("importing torch")
        from train.pack import train_pack

        train_pack(leases, cache, stop, say)
    except Exception as exc:
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        say(f"ended: {cause}: {detail}")
        for run, lease in leases:
            _end_unseated(run, lease, cause, detail)
        return cause
    return "done"


def _end_unseated(run: RunDir, lease: Lease, cause: str, detail: str) -> None:
    """Write the cause to a run that never came to train, or whose session could not write its own."""
    if not _still_ours(run, lease):
        return
    try:
        step = last_step(run)
        append_lines(run.attempts, [attempt_line(lease, cause, detail, step, step, device=device_in_use())])
    except StorageError as exc:
        say(str(exc))
    release(run, lease)


def _still_ours(run: RunDir, lease: Lease) -> bool:
    held = read_json(run.lease)
    return held is not None and held["token"] == lease.token


def main() -> None:
    """``python -m train.job PACK_JSON`` trains one pack in this process."""
    say(PackJob(sys.argv[1])())


if __name__ == "__main__":
    main()
