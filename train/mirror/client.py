"""The only file that knows W&B's client. Only a process that mirrors imports it, never a trainer or the launcher.

W&B gets no more of the machine than its system metrics (GPU, CPU, memory, disk, network): no command line, no environment, no git
remote, no code, no list of packages, no console output.

What is used of the client (0.31):

- `wandb.init(id=…, resume="allow")` creates the run, or resumes it where the server has it already.
- `run.starting_step` is then one more than the last step that the server has, so it says where to continue; 0 for a new run.
- `run.log(values, step=…, commit=True)` takes each step once and in ascending order. A lower step is dropped with a warning.
- `x_update_finish_state` says whether `finish` reports the exit code. Without it `finish` only waits until everything is sent, and the
  run stays open on the server. Only the last session of a run reports its end.
- `mark_preempting` tells the server that a run may be silent for a while, so that it is not shown as crashed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import wandb

from train.mirror.reach import Reach
from train.mirror.request import MirroredRun, config, tags
from train.mirror.rows import SAMPLES, Row

JOB_TYPE = "train"
SAMPLE_COLUMNS = ("prompt", "expected", "base", "answer")
INIT_SECONDS = 30.0
# How often offline folders are flushed. `wandb sync` fails as a whole if the writer of one folder was killed before its first flush.
FLUSH_SECONDS = 1.0
# Environment variables (WANDB_…) that say which run a process is, or whose client it shares. A W&B sweep's agent and notebooks leave
# them to their children, and these runs would be taken for theirs.
NOT_OURS = ("RUN_ID", "SWEEP_ID", "SWEEP_PARAM_PATH", "SERVICE", "RESUME", "RESUME_FROM", "FORK_FROM")


class Client:
    """Opens W&B runs.

    Args:
        reach: the server; None writes offline folders.
        finish_seconds: how long `finish` waits until everything is sent, before it raises.
        trainer: the id of the process whose CPU and memory W&B shows; None shows no system metrics.
    """

    def __init__(self, reach: Reach | None, *, finish_seconds: float, trainer: int | None = None) -> None:
        self.reach = reach
        self._trainer = trainer
        self._finish_seconds = finish_seconds
        logging.getLogger("wandb").setLevel(logging.WARNING)
        self._scratch = tempfile.TemporaryDirectory(prefix="lorapack-wandb-", ignore_cleanup_errors=True)
        # Not the home folder, which often has a small quota.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = self._scratch.name
        for name in NOT_OURS:
            os.environ.pop(f"WANDB_{name}", None)
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_SILENT"] = "true"
        if reach is not None and reach.key is not None:
            os.environ["WANDB_API_KEY"] = reach.key
            os.environ["WANDB_BASE_URL"] = reach.server

    @property
    def online(self) -> bool:
        """Whether rows go to a server; otherwise they go to folders in the sweep."""
        return self.reach is not None

    def destination(self, run: MirroredRun) -> str:
        """The address of the run's project."""
        assert self.reach is not None
        return f"{self.reach.server}/{run.entity or self.reach.entity}/{run.project}"

    def address(self, run: MirroredRun) -> str:
        """The address of the run's page. The API of the public server is at api.wandb.ai, its pages are at wandb.ai."""
        return f"{self.destination(run).replace('//api.', '//', 1)}/runs/{run.dir.id}"

    def open(self, run: MirroredRun, *, reports_end: bool) -> wandb.Run:
        """Create the run in W&B, or resume it. Its `starting_step` is the first step that W&B lacks.

        Args:
            run: the run to open.
            reports_end: whether `finish` reports to the server that the run has ended, and how.
        """
        return wandb.init(
            id=run.dir.id,
            name=run.dir.name,
            project=run.project,
            entity=run.entity,
            group=run.sweep.path.name,
            job_type=JOB_TYPE,
            tags=tags(run),
            config=config(run),
            # Offline there is no server to ask, and each attempt writes a folder of its own.
            resume="allow" if self.online else None,
            # Several runs are open in one process; the default would return the one that is open already.
            reinit="create_new",
            mode="online" if self.online else "offline",
            dir=self._scratch.name if self.online else str(run.sweep.path),
            settings=self._settings(reports_end),
        )

    def folder(self, run: wandb.Run) -> Path:
        """The folder in which W&B writes the run."""
        return Path(run.dir).parent

    def _settings(self, reports_end: bool) -> wandb.Settings:
        return wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            use_dot_wandb=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            host="",
            program="lorapack",
            # Not x_disable_machine_info, which would turn off the system metrics too.
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_stats=self._trainer is None,
            x_stats_pid=self._trainer or os.getpid(),
            x_stats_gpu_device_ids=_own_gpus(),
            # Online nothing is written to disk: the journals can send everything again.
            x_skip_transaction_log=self.online,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            x_update_finish_state=reports_end,
            init_timeout=INIT_SECONDS,
            finish_timeout=self._finish_seconds,
            finish_timeout_raises=True,
        )


def sample_table(run: wandb.Run, row: Row) -> wandb.Table:
    """The sample answers of an evaluation, as the table of its step.

    It is bound to the run here. Otherwise W&B makes each table an artifact and asks the server about it while it logs.
    """
    table = wandb.Table(
        columns=list(SAMPLE_COLUMNS), data=[[sample[name] for name in SAMPLE_COLUMNS] for sample in row.samples]
    )
    table.bind_to_run(run, SAMPLES, row.step)  # type: ignore[no-untyped-call]
    return table


def _own_gpus() -> list[int] | None:
    """The indices of this job's GPUs, if they are named by index. None leaves it to W&B, which shows those that it can see."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(name) for name in names] if all(name.strip().isdigit() for name in names) else None
