"""The process that follows the journals of one pack and talks to W&B; it may block, fail and be killed at any time."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import LeaseHeld
from train.mirror.reach import Reach, client_trouble, look_for_server
from train.mirror.request import MirroredRun, runs_of_pack

if TYPE_CHECKING:
    from train.mirror.run_mirror import RunMirror

LOOK_SECONDS = 2.0  # between looks at the journals
FINISH_SECONDS = 8.0  # a server that is there takes less than one
PARALLEL = 4


def follow(pack_file: Path, trainer: int) -> None:
    """Mirror a pack until the trainer closes our standard input. Without W&B's client nothing is done but saying so.

    Raises:
        ConnectionError: `tracking.mode` is online and W&B cannot be used now.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # the supervisor starts another that can finish
    runs = runs_of_pack(pack_file)
    trouble = client_trouble()
    if trouble is not None:  # no restart would find it
        say(
            f"W&B: nothing is sent: {trouble}; 'python -m launcher sync {runs[0].sweep.path.name}' sends everything later"
        )
        return
    reach = choose(runs[0])
    mirrors = open_mirrors(runs, reach, trainer)
    while not trainer_has_ended(LOOK_SECONDS):
        for mirror in mirrors:
            unless_held(mirror.advance)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(unless_held, [mirror.close for mirror in mirrors]))


def choose(run: MirroredRun) -> Reach | None:
    """The server, or None for offline folders; said in one line, after which standard output is the log's.

    Raises:
        ConnectionError: the user wants a server and there is none now.
    """
    tracking, sweep = run.tracking, run.sweep.path
    mode = {"dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", ""))
    wanted = mode if tracking.mode == "auto" and mode in ("online", "offline") else tracking.mode
    reach = look_for_server(tracking.key_file) if wanted != "offline" else None
    if reach is not None and reach.trouble is None:
        say(f"W&B: online at {reach.server}, project {run.project}")
        return reach
    why = "" if reach is None else f" ({reach.trouble})"
    if wanted == "online":
        say(f"W&B: waiting for the server{why}; 'python -m launcher sync {sweep.name}' can send everything later")
        raise ConnectionError(why)
    say(
        f"W&B: offline{why}; 'python -m launcher sync {sweep.name}' or 'wandb sync {sweep}/wandb/offline-*' sends it later"
    )
    return None


def say(text: str) -> None:
    """A line for the job's log; what comes later belongs to ours, so that nobody waits for the job's."""
    print(text, flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def open_mirrors(runs: list[MirroredRun], reach: Reach | None, trainer: int) -> list[RunMirror]:
    """A mirror per run, of the kind that `reach` allows. W&B's client is imported here."""
    from train.mirror.client import Client
    from train.mirror.run_mirror import OfflineMirror, OnlineMirror

    client = Client(reach, finish_seconds=FINISH_SECONDS, trainer=trainer)
    kind = OfflineMirror if reach is None else OnlineMirror
    return [kind(run, client) for run in runs]


def unless_held(act: Callable[[], None]) -> None:
    """Do it, unless ``launcher sync`` is at work on the run: the next look finds it free."""
    try:
        act()
    except LeaseHeld:
        print("launcher sync has this run now", flush=True)


def trainer_has_ended(seconds: float) -> bool:
    """Wait for the end of standard input, at most `seconds`."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])
