"""What Slurm says of a sweep's jobs: one squeue for all, and one sacct for those that have left the queue."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from launcher.cluster.commands import answer_of, user_name
from launcher.cluster.states import FAILED, OUT_OF_MEMORY, SlurmState, slurm_state

ACCOUNTING_TIMEOUT_SECONDS = 20.0
# The length of a command line is limited.
NAMES_PER_CALL = 200


@dataclass(frozen=True)
class JobView:
    """One job or task as Slurm sees it. `reason` is why it waits; `raw_state` is what Slurm calls it."""

    id: str
    state: SlurmState
    raw_state: str
    reason: str | None
    node: str | None

    @property
    def number(self) -> int:
        """The job's number, which an array's tasks share. Older jobs have smaller numbers."""
        return int(self.id.partition("_")[0])

    @property
    def task_index(self) -> int:
        """Its task index in the array, 0 for a plain job."""
        return int(self.id.partition("_")[2] or 0)


# A job's name and its id. The name alone is not enough: a lost answer of sbatch can leave two jobs of one name.
JobKey = tuple[str, str]


@dataclass(frozen=True)
class Queue:
    """The views of the jobs that were asked for. If squeue did not answer, `answered` is False, and a missing job may still exist."""

    views: dict[JobKey, JobView]
    answered: bool


def read_queue(names: Collection[str]) -> Queue:
    """Every job in the queue, or lately in it, that has one of these names."""
    views: dict[JobKey, JobView] = {}
    listed = sorted(names)
    for start in range(0, len(listed), NAMES_PER_CALL):
        chosen = ",".join(listed[start : start + NAMES_PER_CALL])
        command = ("squeue", "--noheader", "--array", "--states=all", f"--user={user_name()}", f"--name={chosen}")
        answer = answer_of(*command, "--format=%j|%i|%T|%r|%N")
        if answer is None:
            return Queue(views, answered=False)
        views |= parse_squeue(answer)
    return Queue(views, answered=True)


def read_accounting(names: Collection[str], since: float) -> dict[JobKey, JobView]:
    """How jobs with these names that were submitted after `since` (Unix time) ended, by the last of their attempts."""
    if not names:
        return {}
    # A minute earlier, because the clocks of two machines may differ.
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
    command = ("sacct", "--noheader", "--parsable2", "--duplicates", f"--starttime={start}")
    answer = answer_of(
        *command,
        f"--name={','.join(sorted(names))}",
        "--format=JobName,JobID,State,Start,NodeList",
        timeout=ACCOUNTING_TIMEOUT_SECONDS,
    )
    return parse_sacct(answer or "")


def parse_squeue(text: str) -> dict[JobKey, JobView]:
    """The lines of ``squeue --array --format=%j|%i|%T|%r|%N``: ``rank.1a2b3c4d|12_0|PENDING|Priority|``."""
    views = {}
    for line in text.splitlines():
        name, number, raw_state, reason, nodes = (part.strip() for part in line.rsplit("|", 4))
        waits = None if reason in {"None", ""} else reason
        for job in _jobs(number):
            views[name, job] = JobView(job, slurm_state(raw_state), raw_state, waits, nodes or None)
    return views


def parse_sacct(text: str) -> dict[JobKey, JobView]:
    """The lines of ``sacct --duplicates --parsable2 --format=JobName,JobID,State,Start,NodeList``, by the last attempt of each job.

    There is a row per attempt, and one per step of it, such as srun's ``12_0.0``::

        rank.1a2b3c4d|12_0|FAILED|2026-03-01T10:00:00|t4-2
        python|12_0.0|OUT_OF_MEMORY|2026-03-01T10:00:03|t4-2

    This job ran out of memory. Its own row says FAILED, because its script ends with srun's exit code, so the step decides.
    """
    newest: dict[JobKey, tuple[str, JobView]] = {}
    # By job, the start of its last step that was killed for using too much memory.
    killed: dict[str, str] = {}
    for line in text.splitlines():
        name, number, raw_state, started, nodes = (part.strip() for part in line.rsplit("|", 4))
        # A job that never started has "Unknown" or "None". ISO times compare as text, and the empty one comes first.
        begun = started if started[:1].isdigit() else ""
        job, _, step = number.partition(".")
        if step:
            if slurm_state(raw_state) == OUT_OF_MEMORY:
                killed[job] = max(begun, killed.get(job, ""))
            continue
        node = None if nodes in {"", "None assigned"} else nodes
        for job in _jobs(number):
            if (name, job) not in newest or begun >= newest[name, job][0]:
                newest[name, job] = begun, JobView(job, slurm_state(raw_state), raw_state, None, node)
    # A step that was killed in an earlier attempt began before the last one, and does not count.
    return {
        key: replace(view, state=OUT_OF_MEMORY) if view.state == FAILED and killed.get(view.id, "") >= begun else view
        for key, (begun, view) in newest.items()
    }


def _jobs(number: str) -> list[str]:
    """The ids of the jobs in one line. ``123_[0-2,5%4]`` means the tasks 0, 1, 2 and 5, none of which has started."""
    job, _, tasks = number.partition("_")
    if not tasks:
        return [job]
    ranges = [part.partition("-") for part in tasks.strip("[]").partition("%")[0].split(",")]
    indices = [
        index for first, _, last in ranges if first.isdigit() for index in range(int(first), int(last or first) + 1)
    ]
    return [f"{job}_{index}" for index in indices]
