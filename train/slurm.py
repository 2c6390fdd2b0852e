"""What a job knows of the Slurm that runs it, and the one thing that it asks for: to be queued again.

Measured on 22.05: ``scontrol requeue`` takes up a job that its user has just cancelled, and a job that exits while it is being
preempted is not requeued. So a job first asks what is happening to it, and ends only once its requeue was granted.

Light on purpose: it runs before torch is imported. Everything here tolerates a controller that does not answer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

COMMAND_TIMEOUT_SECONDS = 10.0
MOST_WARNING_SECONDS = 120  # how long before the time limit a job is warned: time to end an evaluation step and to save
LIVE_STATES = {"RUNNING", "SIGNALING"}
NEAR_THE_LIMIT_SECONDS = MOST_WARNING_SECONDS + 60  # Slurm's warning comes up to half a minute early or late
REQUEUE_WAITS_SECONDS = (0, 1, 2, 4, 8, 16)  # between tries while the controller is away


@dataclass(frozen=True)
class SlurmJob:
    """The job or array task that this process belongs to; `restarts` counts how often it was requeued before."""

    id: str
    restarts: int


@dataclass(frozen=True)
class JobFacts:
    """What the controller says of a job: its state, how often it was started anew, and the clock times in Unix seconds.

    `limit_at` is when the time limit ends it (None without a limit); `preempted` that a job of higher priority wants its place.
    """

    state: str
    restarts: int
    preempted: bool
    limit_at: float | None


def warning_seconds(limit_minutes: int) -> int:
    """How long before its time limit a job shall be warned (``--signal=USR2@…``)."""
    return min(MOST_WARNING_SECONDS, 20 * limit_minutes)


def this_job() -> SlurmJob | None:
    """The Slurm job of this process, None outside of one. A job of `cluster=local` inside an allocation is no Slurm job."""
    if "SUBMITIT_LOCAL_JOB_ID" in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    return SlurmJob(name, int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def job_facts(job: SlurmJob) -> JobFacts | None:
    """What the controller says of the job, None if it says nothing."""
    answer = _scontrol("show", "job", "--oneliner", job.id)
    return parse_job(answer.stdout) if answer is not None and answer.returncode == 0 else None


def parse_job(line: str) -> JobFacts | None:
    """The facts in a line of ``scontrol show job --oneliner``."""
    values = dict(re.findall(r"(\S+?)=(\S*)", line))
    if "JobState" not in values:
        return None
    start, limit = _unix_time(values.get("StartTime", "")), _seconds(values.get("TimeLimit", ""))
    return JobFacts(
        state=values["JobState"],
        restarts=int(values.get("Restarts") or 0),
        preempted=_unix_time(values.get("PreemptTime", "")) is not None,
        limit_at=start + limit if start is not None and limit is not None else None,
    )


def cause_of_signal(signal_name: str, job: SlurmJob, facts: JobFacts | None, now: float) -> tuple[str, str]:
    """Why Slurm asks a job to stop: the cause of the attempt's end, and the detail for its line."""
    if facts is None:  # our own warning is the only USR2 on most clusters
        return ("timeout" if signal_name == "SIGUSR2" else "preempted"), signal_name
    if facts.preempted:
        return "preempted", f"{signal_name}: a job of higher priority takes its place"
    if facts.restarts > job.restarts:
        return "preempted", f"{signal_name}: Slurm puts it back into the queue"
    if facts.limit_at is not None and facts.limit_at - now < NEAR_THE_LIMIT_SECONDS:
        return "timeout", f"{signal_name}: the time limit"
    if facts.state not in LIVE_STATES:
        return "cancelled", f"{signal_name}: scancel"
    return "preempted", signal_name


def requeue(job: SlurmJob, say: Callable[[str], None]) -> None:
    """See to it that the job is in the queue again, so that it may end now; if that is refused, say what the user can do."""
    facts = job_facts(job)
    if facts is not None and facts.restarts > job.restarts:
        say("Slurm puts this job back into the queue by itself")
        return
    refused = _ask_for_requeue(job, say)
    if refused is None:
        say("put back into the queue")
    else:
        say(f"Slurm does not requeue this job ({refused}); 'python -m launcher resume' goes on from the checkpoint")


def _ask_for_requeue(job: SlurmJob, say: Callable[[str], None]) -> str | None:
    """Why the job was not requeued, None if it was."""
    refused = "no answer"
    for wait in REQUEUE_WAITS_SECONDS:
        time.sleep(wait)
        answer = _scontrol("requeue", job.id)
        if answer is not None and answer.returncode == 0:
            return None
        refused = "no answer" if answer is None else " ".join(answer.stderr.split())
        if answer is not None and "contact" not in refused and "timed out" not in refused:
            return refused
        say(f"the controller does not answer ({refused}); trying again")
    return refused


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    """A finished scontrol; None if there is none (in a container, say) or it hangs."""
    if shutil.which("scontrol") is None:
        return None
    try:
        return subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _unix_time(stamp: str) -> float | None:
    """Slurm's local time stamp, None for ``None`` and ``Unknown``."""
    try:
        return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _seconds(limit: str) -> float | None:
    """``[days-]hours:minutes:seconds`` in seconds, None for ``UNLIMITED``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
