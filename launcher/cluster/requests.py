"""What sbatch is asked for, as values: the parameters that submitit renders. Nothing here runs a command.

A new setting of a job (`launcher.config.ClusterConfig`) is passed on in `sbatch_parameters`.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.arrays import ArrayRequest
from launcher.config import ClusterConfig
from launcher.installation import python_path
from train.errors import BadInput
from train.runtime.slurm import warning_seconds
from train.store.layout import ArrayDir

# Any limit that does not count as short: how early a job without a limit is warned.
LONG_MINUTES = 60
# Writing a report takes seconds to a few minutes.
REPORT_MINUTES = 30

# Slurm sends SIGTERM to a job's shell too. A shell that ignores it keeps waiting for srun, so the log also gets what the job
# writes in its last seconds.
KEEP_THE_SHELL = "trap '' TERM"
# Since Slurm 22.05 srun does not inherit --cpus-per-task from the job, so a step could be bound to one CPU (srun(1)).
STEP_HAS_ALL_CPUS = '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
# ``123_4`` for a task of an array, ``123`` for a plain job.
TASK_ID = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"


@dataclass(frozen=True)
class Placement:
    """Where a job goes: a partition, a time limit that it allows (None for no limit), and the GPUs to ask for there."""

    partition: str
    minutes: int | None
    gres: str | None = None


def refuse_pattern(folder: Path) -> None:
    """Refuse a sweep's folder whose name Slurm would read as a pattern: logs would go elsewhere, or nowhere.

    Raises:
        BadInput: naming the character.
    """
    for character in "%\\":
        if character in str(folder):
            raise BadInput(
                f"root={folder.parent}: Slurm reads a {character} in the path of a log as a pattern (sbatch --output). Choose a root "
                "without one."
            )


def sbatch_parameters(
    request: ArrayRequest, cluster: ClusterConfig, array: ArrayDir, before: Sequence[str]
) -> dict[str, Any]:
    """The parameters of submitit's executor for an array that starts when the arrays with the numbers `before` have ended."""
    return _for_submitit(
        _common(cluster)
        | {
            "job_name": request.name,
            "partition": request.partition,
            "gres": _for_all_tasks(request.gres, cluster.gpus_per_job) or None,
            # One process per GPU.
            "ntasks_per_node": cluster.gpus_per_job,
            "time": request.minutes,
            "cpus_per_task": math.ceil(cluster.cpus / cluster.gpus_per_job),
            # Slurm takes whole MiB.
            "mem": None if cluster.ram_gib is None else f"{math.ceil(1024 * cluster.ram_gib)}M",
            "constraint": cluster.constraint,
            "signal_delay_s": warning_seconds(request.minutes or LONG_MINUTES),
            "array_parallelism": request.parallel,
            "setup": setup_lines(cluster, array),
            "dependency": _afterany(before),
        }
    )


def afterwards_parameters(
    name: str, cluster: ClusterConfig, placement: Placement, jobs: Sequence[str]
) -> dict[str, Any]:
    """The parameters of submitit's executor for the small job called `name` that runs when `jobs` have ended."""
    return _for_submitit(
        _common(cluster)
        | {
            "job_name": name,
            "partition": placement.partition,
            "gres": placement.gres or None,
            "time": min(REPORT_MINUTES, placement.minutes or REPORT_MINUTES),
            "cpus_per_task": 1,
            "setup": [KEEP_THE_SHELL, *_user_setup(cluster)],
            "dependency": _afterany(jobs),
        }
    )


def setup_lines(cluster: ClusterConfig, array: ArrayDir) -> list[str]:
    """The shell lines before srun: the user's own, and a link that lets a task start whose launcher died too early.

    submitit renames its pickle to ``<task id>_submitted.pkl`` after sbatch has answered. If the launcher is killed in between, the
    task makes that name itself.
    """
    pickle = f'{shlex.quote(str(array.submitit))}/"{TASK_ID}"_submitted.pkl'
    return [
        KEEP_THE_SHELL,
        *_user_setup(cluster),
        STEP_HAS_ALL_CPUS,
        f"[ -e {pickle} ] || ln -s {shlex.quote(array.callable.name)} {pickle}",
    ]


def job_python(code: Path, container: str | None) -> str:
    """The command before submitit's module: Python with the frozen code first and nothing from the working folder.

    The shell around it ignores signals until Python has installed its handlers. A signal before that would end the job, and Slurm
    does not requeue a job that has ended while it was being preempted.
    """
    settings = {"PYTHONPATH": python_path(code), "PYTHONSAFEPATH": "1", "SUBMITIT_LOG_LEVEL": "WARNING"}
    ignoring = ["sh", "-c", "trap '' TERM USR1 USR2; exec \"$@\"", "job"]
    command = shlex.join([*ignoring, "env", *(f"{name}={value}" for name, value in settings.items()), sys.executable])
    return f"{container} {command}" if container else command


def _common(cluster: ClusterConfig) -> dict[str, Any]:
    return {
        "nodes": 1,
        "ntasks_per_node": 1,
        "account": cluster.account,
        "qos": cluster.qos,
        # By default srun would empty the log of the previous attempt.
        "srun_args": ["--open-mode=append"],
        "additional_parameters": _without_none({"requeue": True, "reservation": cluster.reservation}),
    }


def _afterany(jobs: Sequence[str]) -> str | None:
    """``sbatch --dependency`` for jobs that have to end first, successfully or not: ``afterany:12:13``."""
    return f"afterany:{':'.join(jobs)}" if jobs else None


def _for_all_tasks(gres: str, tasks: int) -> str:
    """``gpu:a100:1`` becomes ``gpu:a100:4`` for 4 tasks. A request that names more already is the user's own and stays."""
    return re.sub(r":1$", f":{tasks}", gres)


def _without_none(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None}


def _for_submitit(parameters: dict[str, Any]) -> dict[str, Any]:
    """What is set, and no wckey: submitit's own default is refused by clusters that check these keys."""
    return _without_none(parameters) | {"wckey": None}


def _user_setup(cluster: ClusterConfig) -> list[str]:
    return [*(f"module load {shlex.quote(module)}" for module in cluster.modules), *cluster.setup]
