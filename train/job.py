"""The entry point of a job: one process, one pack, from leases to results.

Light until the handlers stand: whoever starts the job gives it a path, and torch is imported inside. Every way to end is one of the
causes in `train.attempts`, written to every run of the pack.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from train.attempts import attempt_line, last_step, open_attempt
from train.errors import BadInput, LeaseHeld, LorapackError, StorageError
from train.lease import Heartbeat, Lease, release
from train.rundir import RunDir, append_lines, read_json
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
        with Heartbeat([run for run, _ in leases]):
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
        say("importing torch")
        from train.pack import train_pack

        train_pack(leases, cache, stop, say)
    except Stopped as exc:
        return _end(leases, "preempted", str(exc))
    except BadInput as exc:
        return _end(leases, "bad_input", str(exc), exc)
    except StorageError as exc:
        return _end(leases, "storage", str(exc), exc)
    except LorapackError as exc:
        return _end(leases, "crash", str(exc), exc)
    except Exception as exc:
        cause = "out_of_memory" if _is_out_of_memory(exc) else "crash"
        return _end(leases, cause, f"{type(exc).__name__}: {exc}", exc)
    return "done"


def _end(leases: list[tuple[RunDir, Lease]], cause: str, detail: str, error: Exception | None = None) -> str:
    """Write the cause to every run that has no ending of its own yet."""
    if error is not None:
        traceback.print_exception(error, file=sys.stderr)
    say(f"ended: {cause}: {detail}")
    for run, lease in leases:
        if not _still_ours(run, lease):
            continue
        try:
            append_lines(run.attempts, [attempt_line(lease, cause, detail, None, last_step(run))])
        except StorageError as exc:
            say(str(exc))
        release(run, lease)
    return cause


def _still_ours(run: RunDir, lease: Lease) -> bool:
    held = read_json(run.lease)
    return held is not None and held["token"] == lease.token


def _is_out_of_memory(error: Exception) -> bool:
    """torch's and Python's words for it; torch is not imported for the question."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def main() -> None:
    """``python -m train.job PACK_JSON`` trains one pack in this process."""
    say(PackJob(sys.argv[1])())


if __name__ == "__main__":
    main()
