"""The process that follows the journals of one pack and talks to W&B. It may block, fail or be killed at any time."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import DamagedFile, LeaseHeld
from train.mirror.child import trainer_has_ended
from train.mirror.memory import recall_online
from train.mirror.reach import Reach, client_trouble, look_for_server
from train.mirror.request import MirroredRun, mirrored_runs
from train.store.layout import SweepDir

if TYPE_CHECKING:
    from train.mirror.run_mirror import RunMirror

log = logging.getLogger("lorapack.mirror")

# Between looks at the journals.
LOOK_SECONDS = 2.0
# For W&B's client to send the rest of a run. A server that can be reached takes less than one.
FINISH_SECONDS = 8.0
# Runs that are closed at the same time.
PARALLEL = 4


def follow(pack_file: Path, trainer: int) -> None:
    """Mirror a pack until the trainer closes standard input. `trainer` is its process id. Without W&B's client only say so.

    Raises:
        ConnectionError: `tracking.mode` is online and W&B cannot be used now.
    """
    # The mask is inherited from the supervisor. A worker may end by SIGTERM, since the supervisor starts another that can finish.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    runs = mirrored_runs(pack_file)
    trouble = client_trouble()
    if trouble is not None:
        # Returning ends the supervisor too: no other worker would find the package.
        announce(
            f"W&B: nothing is sent: {trouble}; 'python -m launcher sync {runs[0].sweep.path.name}' sends everything later"
        )
        return
    reach = choose(runs)
    mirrors = open_mirrors(runs, reach, trainer)
    ready = list(mirrors)
    while not trainer_has_ended(LOOK_SECONDS):
        ready = [mirror for mirror in ready if advance(mirror, reach)]
        if mirrors and not ready:
            raise ConnectionError("no run can be opened in W&B")
    with ThreadPoolExecutor(PARALLEL) as pool:
        ready_first = sorted(mirrors, key=lambda mirror: mirror not in ready)
        for closed in [pool.submit(mirror.close) for mirror in ready_first]:
            # Raises for a run that launcher sync has at the moment: the next worker gets it.
            closed.result()


def choose(runs: list[MirroredRun]) -> Reach | None:
    """The server, or None for offline folders. The choice is announced in one line.

    Raises:
        ConnectionError: the user wants a server, and none can be used now.
    """
    first = runs[0]
    tracking = first.tracking
    sweep = first.sweep.path
    # "dryrun" is W&B's older word for offline.
    mode = {"dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", ""))
    wanted = mode if tracking.mode == "auto" and mode in ("online", "offline") else tracking.mode
    reach = look_for_server(tracking.key_file) if wanted != "offline" else None
    if reach is not None and reach.trouble is None:
        announce(f"W&B: online at {reach.server}, project {first.project}")
        return reach
    why = "" if reach is None else f" ({reach.trouble})"
    if wanted == "online":
        announce(f"W&B: waiting for the server{why}; 'python -m launcher sync {sweep.name}' can send everything later")
        raise ConnectionError(why)
    # `wandb sync` would send again what the server has already, so it is only offered for runs that never were online.
    begun = any(recall_online(run.dir) for run in runs)
    ways = f"python -m launcher sync {sweep.name}" + ("" if begun else f", or {wandb_sync_command(first.sweep)}")
    announce(f"W&B: offline{why}; to send it later: {ways}")
    return None


def wandb_sync_command(sweep: SweepDir) -> str:
    """The command that sends every offline folder of a sweep. Only the pattern at its end is left to the shell."""
    return f"wandb sync {shlex.quote(str(sweep.wandb))}/offline-*"


def announce(text: str) -> None:
    """Write a line to the job's log, unless an earlier worker wrote the same. From then on standard output is the mirror's log."""
    # In the folder that a supervisor's workers share.
    announced = Path(tempfile.gettempdir()) / "said"
    if not announced.exists() or announced.read_text() != text:
        log.info(text)
        announced.write_text(text)
    # A reader that waits for the end of the job's output must not wait for this process too.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def open_mirrors(runs: list[MirroredRun], reach: Reach | None, trainer: int) -> list[RunMirror]:
    """A mirror per run, of the kind that `reach` allows, but for those whose folder is gone or damaged.

    W&B's client is imported here.
    """
    from train.mirror.client import Client
    from train.mirror.run_mirror import OfflineMirror, OnlineMirror

    client = Client(reach, finish_seconds=FINISH_SECONDS, trainer=trainer)
    kind = OfflineMirror if reach is None else OnlineMirror
    mirrors: list[RunMirror] = []
    for run in runs:
        try:
            if run.dir.config.exists():
                mirrors.append(kind(run, client))
        except DamagedFile as exc:
            log.warning(f"{run.dir.path.name} is not mirrored: {exc}")
    return mirrors


def advance(mirror: RunMirror, reach: Reach | None) -> bool:
    """Send what a run has new; False if it cannot be opened, so that it is left alone until the end and the others continue.

    It may have been deleted in W&B, which does not accept the same id again, or its folder may be gone.

    Raises:
        Exception: W&B's client failed while the run was open, or because the server is gone. Another worker has to try again.
    """
    try:
        mirror.advance()
    except LeaseHeld:
        log.info("launcher sync has this run now")
    except Exception:
        if mirror.opened or (reach is not None and look_for_server(mirror.run.tracking.key_file).trouble is not None):
            raise
        traceback.print_exc()
        return False
    return True
