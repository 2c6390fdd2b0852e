"""What will be submitted, as values: packs -> arrays -> the parameters that submitit renders. Nothing here runs a command."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.cluster.lanes import deal
from launcher.cluster.names import JobNames
from launcher.installation import python_path
from launcher.records import ClusterConfig, Lanes, Pack
from train.errors import BadInput
from train.runtime.slurm import warning_seconds
from train.store.layout import ArrayDir

LONG_MINUTES = 60  # any limit that is no short one
REPORT_MINUTES = 30  # plenty

# Slurm ends a job's shell with it. A shell that waits keeps srun alive, and with it the log of what the job does in its last seconds.
KEEP_THE_SHELL = "trap '' TERM"
# From 22.05 on srun no longer takes this from the job, and a step may be bound to one CPU (srun(1), --cpus-per-task).
STEP_HAS_ALL_CPUS = '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
TASK_ID = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"


@dataclass(frozen=True)
class ArrayRequest:
    """Jobs that differ in nothing but their packs. `token` is in their name, by which they are found if sbatch's answer is lost.

    parallel: how many of them run at once. They start after the arrays in the queue with the numbers `after` have ended, and
    those requests with the tokens `follows`, which are submitted before.
    """

    token: str
    name: str
    partition: str
    gres: str
    packs: tuple[str, ...]
    minutes: int | None
    parallel: int
    after: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()


def array_requests(names: JobNames, packs: Sequence[Pack], lanes: Lanes, largest: int) -> list[ArrayRequest]:
    """One array per partition and GPU, cut at `largest` tasks; all together run as many jobs at once as there are lanes."""
    by_shape: dict[tuple[str, str], list[Pack]] = {}
    for pack in packs:
        by_shape.setdefault((pack.partition, pack.gres), []).append(pack)
    parts = [group[start : start + largest] for group in by_shape.values() for start in range(0, len(group), largest)]
    shares = deal([len(part) for part in parts], lanes.count)
    requests = [_request(names, part, share, lanes.after) for part, share in zip(parts, shares, strict=True)]
    for place in range(lanes.count, len(requests)):
        requests[place] = replace(requests[place], follows=(requests[place - lanes.count].token,))
    return requests


def refuse_pattern(folder: Path) -> None:
    """Refuse a sweep's folder in whose name Slurm would see a pattern: logs would go to another one, or nowhere.

    Raises:
        BadInput: naming the character.
    """
    for character in "%\\":
        if character in str(folder):
            raise BadInput(
                f"root={folder.parent}: Slurm takes a {character} in the path of a log for a pattern (sbatch --output); choose a root "
                "without one."
            )


def split(requests: Sequence[ArrayRequest], names: JobNames) -> list[ArrayRequest]:
    """The same jobs with the first request in two halves, for a queue that takes no more in one go; they share its lanes."""
    whole, rest = requests[0], requests[1:]
    middle = math.ceil(len(whole.packs) / 2)
    parts = whole.packs[:middle], whole.packs[middle:]
    shares = deal([len(part) for part in parts], whole.parallel)
    first, second = (_part(whole, names, part, share) for part, share in zip(parts, shares, strict=True))
    if whole.parallel == 1:
        second = replace(second, follows=(first.token,))
    halves = (first.token, second.token)
    return [first, second, *(_following(request, whole.token, halves) for request in rest)]


def _following(request: ArrayRequest, token: str, others: tuple[str, ...]) -> ArrayRequest:
    """`request`, which now waits for `others` where it waited for `token`."""
    follows = (others if followed == token else (followed,) for followed in request.follows)
    return replace(request, follows=tuple(followed for group in follows for followed in group))


def sbatch_parameters(
    request: ArrayRequest, cluster: ClusterConfig, array: ArrayDir, before: Sequence[str]
) -> dict[str, Any]:
    """What submitit's executor is told for an array that starts when the arrays with the numbers `before` have ended."""
    return _for_submitit(
        _common(cluster)
        | {
            "job_name": request.name,
            "partition": request.partition,
            "gres": _for_all_tasks(request.gres, cluster.gpus_per_job) or None,
            "ntasks_per_node": cluster.gpus_per_job,
            "time": request.minutes,
            "cpus_per_task": math.ceil(cluster.cpus / cluster.gpus_per_job),
            "mem": None if cluster.ram_gib is None else f"{math.ceil(1024 * cluster.ram_gib)}M",
            "constraint": cluster.constraint,
            "signal_delay_s": warning_seconds(request.minutes or LONG_MINUTES),
            "array_parallelism": request.parallel,
            "setup": setup_lines(cluster, array),
            "dependency": _afterany(before),
        }
    )


def afterwards_parameters(
    names: JobNames,
    cluster: ClusterConfig,
    partition: str,
    allowed_minutes: int | None,
    jobs: Sequence[str],
    gres: str | None = None,
) -> dict[str, Any]:
    """What submitit's executor is told for the job that runs when `jobs` have ended. The partition allows `allowed_minutes`.

    gres: what it asks for although it needs none, where nothing else is let in.
    """
    return _for_submitit(
        _common(cluster)
        | {
            "job_name": names.report,
            "partition": partition,
            "gres": gres or None,
            "time": min(REPORT_MINUTES, allowed_minutes or REPORT_MINUTES),
            "cpus_per_task": 1,
            "setup": [KEEP_THE_SHELL, *_user_setup(cluster)],
            "dependency": _afterany(jobs),
        }
    )


def _common(cluster: ClusterConfig) -> dict[str, Any]:
    return {
        "nodes": 1,
        "ntasks_per_node": 1,
        "account": cluster.account,
        "qos": cluster.qos,
        "srun_args": ["--open-mode=append"],  # srun would empty the log of the attempt before
        "additional_parameters": _filled({"requeue": True, "reservation": cluster.reservation}),
    }


def _afterany(jobs: Sequence[str]) -> str | None:
    """What ``sbatch --dependency`` takes for jobs that have to end first, however they do."""
    return f"afterany:{':'.join(jobs)}" if jobs else None


def _for_all_tasks(gres: str, tasks: int) -> str:
    """One GPU becomes one for each task of the job; a request that already names more is the user's own."""
    return re.sub(r":1$", f":{tasks}", gres)


def _filled(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None}


def _for_submitit(parameters: dict[str, Any]) -> dict[str, Any]:
    """What is set, and no word of submitit's own: its wckey is refused where such keys are checked."""
    return _filled(parameters) | {"wckey": None}


def _user_setup(cluster: ClusterConfig) -> list[str]:
    return [*(f"module load {shlex.quote(module)}" for module in cluster.modules), *cluster.setup]


def setup_lines(cluster: ClusterConfig, array: ArrayDir) -> list[str]:
    """The shell lines before srun: the user's, and what lets a task start whose launcher died before naming its pickle."""
    pickle = f'{shlex.quote(str(array.submitit))}/"{TASK_ID}"_submitted.pkl'
    return [
        KEEP_THE_SHELL,
        *_user_setup(cluster),
        STEP_HAS_ALL_CPUS,
        f"[ -e {pickle} ] || ln -s {shlex.quote(array.callable.name)} {pickle}",
    ]


def job_python(code: Path, container: str | None) -> str:
    """The words before submitit's module: the frozen code first, nothing from the working folder.

    Until Python's handlers stand, a signal would end the job, and one that ends while it is preempted is not queued again.
    """
    settings = {"PYTHONPATH": python_path(code), "PYTHONSAFEPATH": "1", "SUBMITIT_LOG_LEVEL": "WARNING"}
    deaf = ["sh", "-c", "trap '' TERM USR1 USR2; exec \"$@\"", "job"]
    words = shlex.join([*deaf, "env", *(f"{name}={value}" for name, value in settings.items()), sys.executable])
    return f"{container} {words}" if container else words


def _request(names: JobNames, packs: list[Pack], share: int, after: tuple[str, ...]) -> ArrayRequest:
    """The array of these packs; its time limit is that of the longest."""
    limits = [pack.minutes for pack in packs if pack.minutes is not None]
    minutes = max(limits) if len(limits) == len(packs) else None
    ids, first = tuple(pack.id for pack in packs), packs[0]
    return ArrayRequest(names.token(ids), names.array(ids), first.partition, first.gres, ids, minutes, share, after)


def _part(request: ArrayRequest, names: JobNames, packs: tuple[str, ...], share: int) -> ArrayRequest:
    return replace(request, token=names.token(packs), name=names.array(packs), packs=packs, parallel=share)
