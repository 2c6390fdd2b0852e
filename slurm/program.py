"""The command line of `slurm/cluster`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from slurm.box import down, missing_daemons, restart, up
from slurm.daemons import DaemonFailed
from slurm.packages import CannotInstall
from slurm.settings import Folder, Record, Settings, read_record

DEFAULT_FOLDER = "/var/lib/lorapack-slurm"
CANNOT_INSTALL = 3


def main(words: list[str]) -> int:
    """Run one command; 0 if it worked, 3 if this machine cannot have a cluster, 1 if anything else failed."""
    options = vars(arguments_of(words))
    verb = options.pop("verb")
    folder = Folder(Path(options.pop("folder")).absolute())
    try:
        if verb == "up":
            _print_record(folder, up(folder, Settings(**options)))
        elif verb == "down":
            down(folder)
        elif verb == "restart":
            restart(folder, options["daemon"])
        else:
            return _print_status(folder)
    except (CannotInstall, DaemonFailed) as problem:
        print(f"slurm/cluster {verb}: {problem}", file=sys.stderr)
        return CANNOT_INSTALL if isinstance(problem, CannotInstall) else 1
    return 0


def arguments_of(words: list[str]) -> argparse.Namespace:
    """The verb, its settings and the run folder."""
    parser = argparse.ArgumentParser(prog="slurm/cluster", description="A real small Slurm on this machine.")
    _add_folder(parser, os.environ.get("SLURM_BOX", DEFAULT_FOLDER))
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_settings(verbs.add_parser("up", help="start it, or bring a running one to these settings"))
    verbs.add_parser("down", help="end its jobs and daemons")
    verbs.add_parser("status", help="say what runs; exit code 1 if something is missing")
    verbs.add_parser("restart", help="start one daemon again").add_argument("daemon")
    for verb in verbs.choices.values():
        # Without a default here, a --folder before the verb stays in effect.
        _add_folder(verb, argparse.SUPPRESS)
    return parser.parse_args(words)


def _add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--folder", default=default, help="the run folder (or $SLURM_BOX), before or after the verb")


def _add_settings(up_parser: argparse.ArgumentParser) -> None:
    usual = Settings()
    flag = argparse.BooleanOptionalAction
    numbers = {
        "grace": "seconds between a preemption's first SIGTERM and its end",
        "kill-wait": "seconds between SIGTERM and SIGKILL",
        "max-array-size": "an array's indices stay below it",
        "max-time": "the longest job of a partition, in minutes",
        "default-time": "the limit of a job that asks for none, in minutes",
        "submit-limit": "jobs that the user may have in the queue, 0 for any number",
    }
    for name, text in numbers.items():
        default = getattr(usual, name.replace("-", "_"))
        up_parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    up_parser.add_argument(
        "--preempt-mode",
        choices=["REQUEUE", "CANCEL"],
        default=usual.preempt_mode,
        help="what happens to a preempted job",
    )
    up_parser.add_argument("--requeue", action=flag, default=usual.requeue, help="JobRequeue")
    up_parser.add_argument("--accounting", action=flag, default=usual.accounting, help="slurmdbd and sacct")
    up_parser.add_argument(
        "--send-user-signal", action=flag, default=usual.send_user_signal, help="a preemption sends the job's --signal"
    )
    up_parser.add_argument("--epilog", default=usual.epilog, metavar="PROGRAM", help="what nodes run after each job")
    up_parser.add_argument("--user", default=usual.user, help=f"the user that submits jobs ({usual.user})")


def _print_record(folder: Folder, record: Record) -> None:
    """Print a line for ``eval``. The hint goes to stderr, which eval does not read."""
    print(f"export SLURM_CONF={shlex.quote(str(folder.conf))}")
    print(f"# submit as: runuser -u {record.settings.user} -- sbatch ...", file=sys.stderr)


def _print_status(folder: Folder) -> int:
    record = read_record(folder)
    if record is None:
        print(f"no cluster in {folder.path}")
        return 1
    missing = missing_daemons(record)
    print(f"cluster in {folder.path}: {'up' if not missing else 'missing ' + ', '.join(missing)}")
    for name, value in asdict(record.settings).items():
        print(f"  {name} = {value}")
    return 1 if missing else 0
