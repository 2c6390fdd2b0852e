"""One launcher at a time submits to a sweep and keeps its queue."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.records import verb_command
from train.errors import BadInput, LeaseHeld, StorageError
from train.store.layout import SweepDir
from train.store.lease import Heartbeat, acquire, read_lease, release
from train.store.storage import make_folder


@contextmanager
def sole_launcher(sweep: SweepDir) -> Iterator[None]:
    """Own the sweep's folder, made if need be; a dead launcher's place is taken over.

    If no plan was accepted, a folder that was made here disappears again: whatever refused the sweep leaves nothing behind.

    Raises:
        LeaseHeld: another live launcher has it.
        BadInput: the folder cannot be made.
    """
    fresh = not sweep.path.exists()
    try:
        make_folder(sweep.path)
        lease = acquire(sweep, job="launcher", attempt=0)
    except LeaseHeld as exc:
        raise LeaseHeld(_who_has(sweep)) from exc
    except StorageError as exc:  # before anything is started a full disk is for the user to mend, like any other input
        if fresh:
            shutil.rmtree(sweep.path, ignore_errors=True)
        raise BadInput(str(exc)) from exc
    try:
        with Heartbeat([(sweep, lease)]):
            yield
    finally:
        release(sweep, lease)
        if fresh and not any(sweep.plans.glob("*.json")):
            shutil.rmtree(sweep.path, ignore_errors=True)


def _who_has(sweep: SweepDir) -> str:
    held = read_lease(sweep)
    who = f"process {held.pid} on {held.host}" if held else "a process that just ended"
    return (
        f"Another launcher ({who}) is at work on the sweep {sweep.path.name}; wait until it is done, or watch it: "
        f"{verb_command('status', sweep)}"
    )
