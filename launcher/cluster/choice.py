"""Slurm or this machine: decided once per command, and said."""

from __future__ import annotations

import shutil

from launcher.cluster.commands import CommandRefused, NoAnswer, run_command
from launcher.errors import ClusterError
from launcher.records import ClusterConfig
from train.runtime.slurm import NOT_CONFIGURED


def explain_choice(cluster: ClusterConfig, *, slurm: bool) -> str:
    """A line that says where the jobs will run, and why."""
    if cluster.kind != "auto":
        return f"cluster={cluster.kind}: {'submitting to Slurm' if slurm else 'training on this machine'}"
    return f"cluster=auto: {'Slurm answers here, submitting to it' if slurm else 'no Slurm here, training on this machine'}"


def on_slurm(cluster: ClusterConfig) -> bool:
    """Whether jobs go to Slurm: asked for by name, or answering here."""
    return cluster.kind == "slurm" or (cluster.kind == "auto" and slurm_answers())


def slurm_answers() -> bool:
    """Whether this machine belongs to a Slurm cluster.

    Raises:
        ClusterError: it does, and the controller is away.
    """
    try:
        run_command("sinfo", "--noheader", "--format=%P")
    except NoAnswer as exc:
        if shutil.which("sinfo") is None or NOT_CONFIGURED in str(exc):
            return False
        raise ClusterError(
            f"{exc}. This machine belongs to a Slurm cluster whose controller is away: try again when sinfo answers, or train "
            "here with cluster=local."
        ) from exc
    except CommandRefused:
        return False
    return True
