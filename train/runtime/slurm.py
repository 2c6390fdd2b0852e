"""What a job asks the Slurm that runs it: why it was stopped, and to be queued again.

Measured on 22.05: ``scontrol requeue`` also requeues a job that its user has just cancelled, and a job that exits while it is being
preempted is not requeued. So a job first asks what is happening to it, and ends only once its requeue was granted.

Light on purpose: it runs before torch is imported. Everything here tolerates a controller that does not answer.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from train.runtime.backoff import backoff
from train.store.causes import Cause

log = logging.getLogger("lorapack.runtime")

COMMAND_TIMEOUT_SECONDS = 10.0
# At most this long before its time limit a job is warned: time to end an evaluation step and to save.
MOST_WARNING_SECONDS = 120
LIVE_STATES = {"RUNNING", "SIGNALING"}
# Slurm's warning comes up to half a minute early or late.
NEAR_THE_LIMIT_SECONDS = MOST_WARNING_SECONDS + 60
# How far apart the clocks of controller and node may be.
CLOCKS_APART_SECONDS = 5.0
# Between tries to reach a controller that does not answer.
LONGEST_PAUSE_SECONDS = 16.0
# The longest that a job waits to be ended if the controller never answers.
END_WAIT_SECONDS = 600.0

# What Slurm's commands write on a machine without a cluster.
NOT_CONFIGURED = "Could not establish a configuration source"
# What Slurm's clients write if the answer was lost or the controller is away. The command may have been carried out nevertheless.
NO_CONTACT = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "Zero Bytes were transmitted",
    "Transport endpoint is not connected",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Communication connection failure",
    "Problem talking to the database",
    "in standby mode",
    NOT_CONFIGURED,
    # From ``scontrol requeue`` if the controller is dead.
    "Unexpected message received",
)


@dataclass(frozen=True)
class SlurmJob:
    """The job or array task that this process belongs to; `restarts` counts how often it was requeued before."""

    id: str
    restarts: int


@dataclass(frozen=True)
class JobFacts:
    """What the controller knows of a job: its state, how often it was requeued, and times in Unix seconds.

    `limit_at` is when its time limit ends it (None without a limit); `preempted` says that a job of higher priority takes its place.
    """

    state: str
    restarts: int
    preempted: bool
    limit_at: float | None


def warning_seconds(limit_minutes: int) -> int:
    """How long before its time limit a job is warned (``--signal=USR2@…``): 100 s of 5 minutes, 120 s of 6 minutes or more."""
    return min(MOST_WARNING_SECONDS, 20 * limit_minutes)


def this_job() -> SlurmJob | None:
    """The Slurm job of this process; None outside of one. A job of `cluster=local` inside an allocation is not a Slurm job."""
    if "SUBMITIT_LOCAL_JOB_ID" in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    # Slurm gives an array's task a job id of its own too. Users and ``squeue`` know it as 4711_3.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    return SlurmJob(name, int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def job_facts(job: SlurmJob) -> JobFacts | None:
    """What the controller knows of the job; None if it does not answer."""
    answer = _scontrol("show", "job", "--oneliner", job.id)
    return parse_job(answer.stdout) if answer is not None and answer.returncode == 0 else None


def parse_job(line: str) -> JobFacts | None:
    """The facts in a line of ``scontrol show job --oneliner``; None if it has no job."""
    # "JobId=17 JobState=RUNNING Restarts=0 TimeLimit=01:00:00 …": names up to the first "=", values up to the next space.
    values = dict(re.findall(r"(\S+?)=(\S*)", line))
    if "JobState" not in values:
        return None
    start = _unix_time(values.get("StartTime", ""))
    limit = _seconds(values.get("TimeLimit", ""))
    return JobFacts(
        state=values["JobState"],
        restarts=int(values.get("Restarts") or 0),
        preempted=_unix_time(values.get("PreemptTime", "")) is not None,
        limit_at=start + limit if start is not None and limit is not None else None,
    )


def cause_of_signal(signal_name: str, job: SlurmJob, facts: JobFacts | None, now: float) -> tuple[Cause, str]:
    """Why Slurm asks a job to stop: the cause of the attempt's end, and the detail for its line.

    For example, with a limit at 12:00:00:

        SIGUSR2 at 11:58:05, RUNNING      115 s before the limit, less than 180 s: timeout
        SIGTERM at 11:30:00, RUNNING      far from the limit, and not preempted: preempted, since Slurm gives no reason
        SIGTERM at 11:59:58, COMPLETING   ended 2 s before the limit, less than 5 s: timeout
        SIGTERM at 11:58:05, COMPLETING   ended 115 s before the limit, so by scancel: cancelled
    """
    # No answer. On most clusters only our own warning is sent as USR2.
    if facts is None:
        return (Cause.TIMEOUT if signal_name == "SIGUSR2" else Cause.PREEMPTED), signal_name
    if facts.preempted:
        return Cause.PREEMPTED, f"{signal_name}: a job of higher priority takes its place"
    if facts.restarts > job.restarts:
        return Cause.PREEMPTED, f"{signal_name}: Slurm puts it back into the queue"
    # A warning comes well before the limit, while the job runs. A job that has ended did so at the limit, or by scancel before it.
    ended = facts.state not in LIVE_STATES
    near = CLOCKS_APART_SECONDS if ended else NEAR_THE_LIMIT_SECONDS
    if facts.limit_at is not None and facts.limit_at - now < near:
        return Cause.TIMEOUT, f"{signal_name}: the time limit"
    if ended:
        return Cause.CANCELLED, f"{signal_name}: scancel"
    return Cause.PREEMPTED, signal_name


def requeue(job: SlurmJob) -> None:
    """Put the job back into the queue, so that it may end now. If that is refused, the log says what the user can do.

    While the controller does not answer, the job waits to be ended: Slurm requeues a job that it kills for one of higher priority, but
    not a job that ended by itself.
    """
    facts = job_facts(job)
    # Slurm has counted a restart that this process does not know of, so the job is in the queue already.
    if facts is not None and facts.restarts > job.restarts:
        log.info("Slurm puts this job back into the queue by itself")
        return
    answer = _ask_for_requeue(job)
    if answer is None:
        log.warning(
            "Slurm did not answer, so this job is not requeued; 'python -m launcher resume' continues from the checkpoint"
        )
    elif answer.returncode == 0:
        log.info("put back into the queue")
    else:
        refused = " ".join(answer.stderr.split())
        log.warning(
            f"Slurm does not requeue this job ({refused}); 'python -m launcher resume' continues from the checkpoint"
        )


@functools.cache
def killed_for_memory(job: str) -> bool:
    """Whether Slurm's accounting says that it killed a job for using more memory than requested; False if it does not answer."""
    answer = _ask("sacct", "--noheader", "--parsable2", "--format=State", f"--jobs={job}")
    if answer is None or answer.returncode != 0:
        return False
    # The first line is the job, the others are its steps. If a step is killed, the job itself is FAILED.
    whole, *steps = answer.stdout.splitlines() or [""]
    return whole == "OUT_OF_MEMORY" or (whole == "FAILED" and "OUT_OF_MEMORY" in steps)


def _ask_for_requeue(job: SlurmJob) -> subprocess.CompletedProcess[str] | None:
    """The controller's answer; None if it did not answer within `END_WAIT_SECONDS`."""
    # Pauses of 0, 1, 2, 4, 8, 16, 16, … seconds.
    for pause in (0.0, *backoff(1.0, LONGEST_PAUSE_SECONDS, total=END_WAIT_SECONDS)):
        time.sleep(pause)
        # There is no scontrol in a container, for example.
        answer = _scontrol("requeue", job.id)
        if answer is not None and (answer.returncode == 0 or not any(words in answer.stderr for words in NO_CONTACT)):
            return answer
        if not pause:
            log.info("the controller does not answer yet; this job keeps asking, and waits to be ended")
    return None


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    return _ask("scontrol", *words)


def _ask(command: str, *words: str) -> subprocess.CompletedProcess[str] | None:
    """A finished command of Slurm's; None if it does not exist (in a container, say) or does not end in time."""
    if shutil.which(command) is None:
        return None
    try:
        return subprocess.run(
            [command, *words],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
            check=False,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _unix_time(stamp: str) -> float | None:
    """Slurm's local time stamp in Unix seconds; None for ``None`` and ``Unknown``."""
    try:
        return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _seconds(limit: str) -> float | None:
    """``[days-]hours:minutes:seconds`` in seconds: 1-02:00:00 is 93,600; None for ``UNLIMITED``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
