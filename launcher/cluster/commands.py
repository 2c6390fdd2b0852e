"""Run the cluster's commands with a time-out, and tell apart the ways in which they fail.

ClusterError            launcher/errors.py
├── CommandRefused      the command failed; `said` is what it wrote
└── NoAnswer            it is missing, hung, or did not reach the controller: whether anything happened is unknown
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess

from launcher.errors import ClusterError
from train.runtime.slurm import NO_CONTACT

COMMAND_TIMEOUT_SECONDS = 10.0

# Variables with which users change what these commands ask and print. We say everything in arguments, so they are removed.
HABITS = ("SINFO_", "SQUEUE_", "SACCT_", "SCANCEL_")


class CommandRefused(ClusterError):
    """A command that failed."""

    def __init__(self, command: str, said: str) -> None:
        super().__init__(f"{command} refused: {said}")
        self.said = said


class NoAnswer(ClusterError):
    """A command that did not answer, so its effect is unknown."""


def run_command(*command: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str:
    """What a command prints.

    Raises:
        CommandRefused: it failed.
        NoAnswer: it is missing, hung, or could not reach the controller.
    """
    if shutil.which(command[0]) is None:
        raise NoAnswer(f"{command[0]} is not installed here")
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=_environment()
        )
    except subprocess.TimeoutExpired as exc:
        raise NoAnswer(f"{command[0]} did not answer in {timeout:.0f} s") from exc
    except OSError as exc:
        raise NoAnswer(f"{command[0]} could not be started: {exc}") from exc
    if answer.returncode == 0:
        return answer.stdout
    raise refusal(command[0], answer.stderr or answer.stdout)


def answer_of(*command: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str | None:
    """What a command prints, None if it fails or does not answer."""
    try:
        return run_command(*command, timeout=timeout)
    except ClusterError:
        return None


def refusal(command: str, stderr: str) -> ClusterError:
    """The error that a failed command's stderr means."""
    said = " ".join(line.strip().removeprefix(f"{command}: ").removeprefix("error: ") for line in stderr.splitlines())
    if any(phrase in said for phrase in NO_CONTACT):
        return NoAnswer(f"{command}: {said}")
    return CommandRefused(command, said or "it failed without a message")


def user_name() -> str:
    """The name by which Slurm knows this process's user. ``$USER`` is not used: it may name the user of an outer shell."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        # In some containers the user has no name.
        return str(number)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HABITS)}
    # English messages and ISO times, which the parsers expect.
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
