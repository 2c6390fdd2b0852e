"""``launcher sync``'s side in this package: whole journals to W&B's server, a few runs at a time, each as often as one likes.

Standard input is one JSON document, ``{"runs": [{"run": folder, "pack": file}], "parallel": 4}``; standard output is a JSON line
per run as it ends, after one that says where it goes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import BadInput, DamagedFile, LeaseHeld, LorapackError
from train.mirror.reach import client_trouble, look_for_server
from train.mirror.request import MirroredRun, mirrored_runs

if TYPE_CHECKING:
    from train.mirror.client import Client

FINISH_SECONDS = 60.0


def upload(request: dict[str, Any]) -> int:
    """Send every run of `request`; the exit code is 1 if one could not be sent.

    Raises:
        BadInput, LorapackError: there is no client, or no key; the server cannot be used now.
    """
    trouble = client_trouble()
    if trouble is not None:
        raise BadInput(f"W&B cannot be used from here: {trouble}; journals keep everything, so sync once it is there.")
    runs, lost = _find_all(request["runs"])
    reach = look_for_server(runs[0].tracking.key_file if runs else None)
    if reach.trouble is not None:
        advice = "W&B cannot be used now: {}; journals keep everything, so try again later."
        raise (BadInput if reach.key is None else LorapackError)(advice.format(reach.trouble))
    say = _answers_only_to_us()
    say({"server": reach.server})

    from train.mirror.client import Client

    client = Client(reach, finish_seconds=FINISH_SECONDS)
    for answer in lost:
        say(answer)
    failed = bool(lost)
    with ThreadPoolExecutor(request["parallel"]) as pool:
        for done in as_completed([pool.submit(_send, run, client) for run in runs]):
            failed |= done.result()["outcome"] == "failed"
            say(done.result())
    return int(failed)


def _find_all(wanted: list[dict[str, str]]) -> tuple[list[MirroredRun], list[dict[str, Any]]]:
    """The runs that were asked for, and the answers for those whose pack's file is damaged."""
    found: list[MirroredRun] = []
    lost: list[dict[str, Any]] = []
    for item in wanted:
        try:
            found += [run for run in mirrored_runs(Path(item["pack"])) if run.dir.path.name == item["run"]]
        except DamagedFile as exc:
            lost.append({"run": item["run"], "rows": 0, "url": None, "outcome": "failed", "detail": str(exc)})
    return found, lost


def _send(run: MirroredRun, client: Client) -> dict[str, Any]:
    """Bring one run up to date: ``sent``, ``current`` (nothing was missing), ``busy`` (another process is at it) or ``failed``."""
    from train.mirror.run_mirror import OnlineMirror

    answer: dict[str, Any] = {"run": run.dir.path.name, "rows": 0, "detail": None, "url": client.address(run)}
    try:
        mirror = OnlineMirror(run, client, verify=True)
        mirror.close()
    except LeaseHeld:
        return answer | {"outcome": "busy", "detail": "its job, or another sync, sends it now"}
    except Exception as exc:  # W&B's client raises of all kinds; the other runs go on
        return answer | {"outcome": "failed", "detail": f"{type(exc).__name__}: {exc}"}
    return answer | {"outcome": "sent" if mirror.opened else "current", "rows": mirror.sent}


def _answers_only_to_us() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for our lines: whatever W&B prints goes to standard error."""
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=ours, flush=True)

    return say


def main() -> int:
    """Answer the request on standard input; its errors are a JSON line too."""
    try:
        return upload(json.load(sys.stdin))
    except LorapackError as exc:
        print(json.dumps({"error": str(exc), "exit_code": exc.exit_code}), flush=True)
        return exc.exit_code
