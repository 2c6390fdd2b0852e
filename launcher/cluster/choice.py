"""Slurm or this machine: decided once per command, and said."""

from __future__ import annotations

from launcher.cluster.commands import answer_of
from launcher.records import ClusterConfig


def explain_choice(cluster: ClusterConfig) -> str:
    """A line that says where the jobs will run, and why."""
    if cluster.kind == "local":
        return "cluster=local: training on this machine"
    if slurm_answers():
        return "cluster=auto: Slurm answers here, but this version trains on this machine only"
    return "cluster=auto: no Slurm here, training on this machine"


def slurm_answers() -> bool:
    """Whether a Slurm controller answers ``sinfo`` in time."""
    return answer_of("sinfo", "--noheader", "--format=%P") is not None
