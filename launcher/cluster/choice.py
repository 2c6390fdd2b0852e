"""Slurm or this machine: decided once per command, and said."""

from __future__ import annotations

from launcher.cluster.commands import answer_of
from launcher.records import ClusterConfig


def explain_choice(cluster: ClusterConfig, *, slurm: bool) -> str:
    """A line that says where the jobs will run, and why."""
    if cluster.kind != "auto":
        return f"cluster={cluster.kind}: {'submitting to Slurm' if slurm else 'training on this machine'}"
    return f"cluster=auto: {'Slurm answers here, submitting to it' if slurm else 'no Slurm here, training on this machine'}"


def on_slurm(cluster: ClusterConfig) -> bool:
    """Whether jobs go to Slurm: asked for by name, or answering here."""
    return cluster.kind == "slurm" or (cluster.kind == "auto" and slurm_answers())


def slurm_answers() -> bool:
    """Whether a Slurm controller answers ``sinfo`` in time."""
    return answer_of("sinfo", "--noheader", "--format=%P") is not None
