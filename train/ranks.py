"""A job of several processes: the leader brings the leases, and the others train along until it is done."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from train.activity import Activity
from train.attempts import cause_of
from train.lease import Lease
from train.pack import train_pack
from train.parallel import ALONE, open_team
from train.place import CalledOff, Place
from train.rundir import PackDir, RunDir
from train.signals import StopFlag, Stopped
from train.storage import read_json

Leases = list[tuple[RunDir, Lease]]


def lead(
    leases: Leases,
    pack: PackDir,
    cache: Path,
    stop: StopFlag,
    say: Callable[[str], None],
    activity: Activity,
    place: Place,
) -> None:
    """Train the runs whose leases this process holds, together with the other processes of its job.

    Raises:
        Stopped, LorapackError: see `train_pack`; the others end too.
    """
    with open_team(place, pack, stop) as team:
        team.from_leader(_announcement(leases))
        train_pack(leases, cache, stop, say, activity, team)


def follow(pack: PackDir, stop: StopFlag, place: Place) -> str:
    """Train along with the leader; the cause of the end is for the log, what counts is what the leader writes."""
    team = ALONE
    try:
        with open_team(place, pack, stop) as team:
            facts = read_json(pack.pack)
            leases = _announced(team.from_leader(b""), Path(facts["sweep_dir"]))
            train_pack(leases, Path(facts["cache"]), stop, _silent, Activity(), team)
    except CalledOff:
        return "nothing to train"
    except Exception as exc:
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        team.tell(cause, detail)
        return f"{cause}: {detail}"
    return "done"


def _silent(_text: str) -> None:
    """What the leader says is enough."""


def _announcement(leases: Leases) -> bytes:
    return json.dumps([[run.path.name, asdict(lease)] for run, lease in leases]).encode()


def _announced(message: bytes, sweep: Path) -> Leases:
    return [(RunDir(sweep / name), Lease(**lease)) for name, lease in json.loads(message)]
