"""What Slurm says of a sweep's jobs: one squeue, and one sacct for those that are no longer in the queue."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from launcher.cluster.commands import answer_of, user_name
from launcher.cluster.states import FAILED, OUT_OF_MEMORY, SlurmState, slurm_state

ACCOUNTING_TIMEOUT_SECONDS = 20.0
NAMES_PER_CALL = 200  # a command line has an end


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
        """The job's number, which an array's tasks share. Of two jobs the older has the smaller one."""
        return int(self.id.partition("_")[0])

    @property
    def place(self) -> int:
        """Its place in the array, 0 of a job that is no array."""
        return int(self.id.partition("_")[2] or 0)


JobKey = tuple[str, str]  # a job's name, and its id: a lost answer can leave two jobs of one name


@dataclass(frozen=True)
class Queue:
    """The views of all jobs that were asked for. `answered` is False if squeue did not: then nothing is known of what is missing."""

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
    """The lines of ``squeue --array --format=%j|%i|%T|%r|%N``."""
    views = {}
    for line in text.splitlines():
        name, number, raw_state, reason, nodes = (part.strip() for part in line.rsplit("|", 4))
        waits = None if reason in {"None", ""} else reason
        for job in _jobs(number):
            views[name, job] = JobView(job, slurm_state(raw_state), raw_state, waits, nodes or None)
    return views


def parse_sacct(text: str) -> dict[JobKey, JobView]:
    """The lines of ``sacct --duplicates --parsable2 --format=JobName,JobID,State,Start,NodeList``: a row per attempt, and per step.

    A step that is killed for its memory leaves a job that FAILED, for its script ends with srun's exit code.
    """
    newest: dict[JobKey, tuple[str, JobView]] = {}
    killed: dict[str, str] = {}  # when the last step began that was killed for its memory, by job
    for line in text.splitlines():
        name, number, raw_state, started, nodes = (part.strip() for part in line.rsplit("|", 4))
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
    return {
        key: replace(view, state=OUT_OF_MEMORY) if view.state == FAILED and killed.get(view.id, "") >= begun else view
        for key, (begun, view) in newest.items()
    }


def _jobs(number: str) -> list[str]:
    """The id of every job that a line is about; ``123_[0-2,5%4]`` is about four that never started."""
    job, _, tasks = number.partition("_")
    if not tasks:
        return [job]
    ranges = [part.partition("-") for part in tasks.strip("[]").partition("%")[0].split(",")]
    places = [
        place for first, _, last in ranges if first.isdigit() for place in range(int(first), int(last or first) + 1)
    ]
    return [f"{job}_{place}" for place in places]
