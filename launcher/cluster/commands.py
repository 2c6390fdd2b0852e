"""The cluster's commands: each with a time-out, and every way not to answer told apart.

ClusterError            launcher/errors.py
├── CommandRefused      the command answered no; `said` is what it wrote
└── NoAnswer            it is not there, hung, or did not reach the controller: nobody knows what happened, or whether
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess

from launcher.errors import ClusterError
from train.runtime.slurm import NO_CONTACT

COMMAND_TIMEOUT_SECONDS = 10.0

# Variables with which users shape what these commands ask and show; ours mean what their arguments say.
HABITS = ("SINFO_", "SQUEUE_", "SACCT_", "SCANCEL_")


class CommandRefused(ClusterError):
    """A command that answered no."""

    def __init__(self, command: str, said: str) -> None:
        super().__init__(f"{command} refused: {said}")
        self.said = said


class NoAnswer(ClusterError):
    """A command from which nothing can be learnt."""


def run_command(*command: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str:
    """What a command prints.

    Raises:
        CommandRefused: it answered no.
        NoAnswer: it is not there, hung, or could not reach the controller.
    """
    if shutil.which(command[0]) is None:
        raise NoAnswer(f"{command[0]} is not there")
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


def user_name() -> str:
    """The name that Slurm has this process's user by. Not that of ``$USER``, which outlives a change of user."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # as in some containers
        return str(number)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HABITS)}
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


def answer_of(*command: str, timeout: float = COMMAND_TIMEOUT_SECONDS) -> str | None:
    """What a command prints, None if it gives no answer that can be used."""
    try:
        return run_command(*command, timeout=timeout)
    except ClusterError:
        return None


def refusal(command: str, stderr: str) -> ClusterError:
    """What a failed command's stderr means."""
    said = " ".join(line.strip().removeprefix(f"{command}: ").removeprefix("error: ") for line in stderr.splitlines())
    if any(words in said for words in NO_CONTACT):
        return NoAnswer(f"{command}: {said}")
    return CommandRefused(command, said or "it failed without a word")
