"""What ``launcher sync`` runs: sends whole journals to W&B's server, a few runs at a time. Sending a run again does no harm.

stdin     {"runs": [{"run": folder, "pack": file}, …], "parallel": 4}
stdout    {"server": …}, then a line per run as it ends: {"run": …, "outcome": …, "rows": …, "detail": …, "url": …}
          or {"error": …, "exit_code": …}
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

# For W&B's client to send the rest of a run.
FINISH_SECONDS = 60.0


def upload(request: dict[str, Any]) -> int:
    """Send every run of `request`; the exit code is 1 if one could not be sent.

    Raises:
        BadInput: W&B's client is missing, or there is no key.
        LorapackError: the server cannot be used now.
    """
    trouble = client_trouble()
    if trouble is not None:
        raise BadInput(
            f"W&B cannot be used from here: {trouble}; journals keep everything, so run sync once it is installed."
        )
    runs, damaged = _find_all(request["runs"])
    reach = look_for_server(runs[0].tracking.key_file if runs else None)
    if reach.trouble is not None:
        advice = "try again later" if reach.key else "run 'wandb login' and try again"
        message = f"W&B cannot be used now: {reach.trouble}; journals keep everything, so {advice}."
        raise (LorapackError if reach.key else BadInput)(message)
    write_line = _claim_stdout()
    write_line({"server": reach.server})

    # Imported once it is certain that it is needed: W&B's client is slow to import.
    from train.mirror.client import Client

    client = Client(reach, finish_seconds=FINISH_SECONDS)
    for answer in damaged:
        write_line(answer)
    failed = bool(damaged)
    with ThreadPoolExecutor(request["parallel"]) as pool:
        for done in as_completed([pool.submit(_send, run, client) for run in runs]):
            failed |= done.result()["outcome"] == "failed"
            write_line(done.result())
    return int(failed)


def _find_all(wanted: list[dict[str, str]]) -> tuple[list[MirroredRun], list[dict[str, Any]]]:
    """The requested runs, and the answers for those whose pack's file is damaged."""
    runs: list[MirroredRun] = []
    damaged: list[dict[str, Any]] = []
    for item in wanted:
        try:
            runs += [run for run in mirrored_runs(Path(item["pack"])) if run.dir.path.name == item["run"]]
        except DamagedFile as exc:
            damaged.append({"run": item["run"], "rows": 0, "url": None, "outcome": "failed", "detail": str(exc)})
    return runs, damaged


def _send(run: MirroredRun, client: Client) -> dict[str, Any]:
    """Bring one run up to date. The outcome is ``sent``, ``current`` (nothing was missing), ``busy`` or ``failed``."""
    from train.mirror.run_mirror import OnlineMirror

    answer: dict[str, Any] = {"run": run.dir.path.name, "rows": 0, "detail": None, "url": client.address(run)}
    try:
        mirror = OnlineMirror(run, client, verify=True)
        mirror.close()
    except LeaseHeld:
        return answer | {"outcome": "busy", "detail": "its job, or another sync, is sending it now"}
    except Exception as exc:
        # W&B's client raises all kinds of errors. The other runs are still sent.
        return answer | {"outcome": "failed", "detail": f"{type(exc).__name__}: {exc}"}
    return answer | {"outcome": "sent" if mirror.opened else "current", "rows": mirror.sent}


def _claim_stdout() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for JSON lines, and return what writes one. Whatever W&B prints goes to standard error."""
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write_line(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=stdout, flush=True)

    return write_line


def main() -> int:
    """Answer the request on standard input. An error is a JSON line too."""
    try:
        return upload(json.load(sys.stdin))
    except LorapackError as exc:
        print(json.dumps({"error": str(exc), "exit_code": exc.exit_code}), flush=True)
        return exc.exit_code
