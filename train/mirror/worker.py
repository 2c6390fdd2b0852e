"""The process that follows the journals of one pack and talks to W&B; it may block, fail and be killed at any time."""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import DamagedFile, LeaseHeld
from train.mirror.memory import recall_online
from train.mirror.reach import Reach, client_trouble, look_for_server
from train.mirror.request import MirroredRun, mirrored_runs
from train.store.layout import SweepDir

if TYPE_CHECKING:
    from train.mirror.run_mirror import RunMirror

log = logging.getLogger("lorapack.mirror")

LOOK_SECONDS = 2.0  # between looks at the journals
FINISH_SECONDS = 8.0  # a server that is there takes less than one
PARALLEL = 4


def follow(pack_file: Path, trainer: int) -> None:
    """Mirror a pack until the trainer closes our standard input. Without W&B's client nothing is done but saying so.

    Raises:
        ConnectionError: `tracking.mode` is online and W&B cannot be used now.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # the supervisor starts another that can finish
    runs = mirrored_runs(pack_file)
    trouble = client_trouble()
    if trouble is not None:  # no restart would find it
        announce(
            f"W&B: nothing is sent: {trouble}; 'python -m launcher sync {runs[0].sweep.path.name}' sends everything later"
        )
        return
    reach = choose(runs)
    mirrors = open_mirrors(runs, reach, trainer)
    ready = list(mirrors)
    while not trainer_has_ended(LOOK_SECONDS):
        ready = [mirror for mirror in ready if goes_on(mirror, reach)]
        if mirrors and not ready:
            raise ConnectionError("no run can be opened in W&B")
    with ThreadPoolExecutor(PARALLEL) as pool:
        ready_first = sorted(mirrors, key=lambda mirror: mirror not in ready)
        for closed in [pool.submit(mirror.close) for mirror in ready_first]:
            closed.result()  # a run that launcher sync has now is left to the next worker


def choose(runs: list[MirroredRun]) -> Reach | None:
    """The server, or None for offline folders; said in one line, after which standard output is the log's.

    Raises:
        ConnectionError: the user wants a server and there is none now.
    """
    first = runs[0]
    tracking, sweep = first.tracking, first.sweep.path
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
    begun = any(recall_online(run.dir) for run in runs)  # what a server has in part, ``wandb sync`` would send twice
    ways = f"python -m launcher sync {sweep.name}" + ("" if begun else f", or {wandb_sync_command(first.sweep)}")
    announce(f"W&B: offline{why}; to send it later: {ways}")
    return None


def wandb_sync_command(sweep: SweepDir) -> str:
    """What sends every offline folder of a sweep; only the pattern at its end stays open to the shell."""
    return f"wandb sync {shlex.quote(str(sweep.wandb))}/offline-*"


def announce(text: str) -> None:
    """A line for the job's log, unless the worker before said so too; what comes later belongs to ours, so that nobody waits for
    the job's."""
    said = Path(tempfile.gettempdir()) / "said"  # a supervisor's workers share this folder
    if not said.exists() or said.read_text() != text:
        log.info(text)
        said.write_text(text)
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
            print(f"{run.dir.path.name} is not mirrored: {exc}", flush=True)
    return mirrors


def goes_on(mirror: RunMirror, reach: Reach | None) -> bool:
    """Send what a run has to say. One that cannot be opened is left alone until the end: the others go on without it.

    It may have been deleted in W&B, which takes no run twice, or its folder may be gone. Not so if the server has gone, or the client.
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


def trainer_has_ended(seconds: float) -> bool:
    """Wait for the end of standard input, at most `seconds`."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])
