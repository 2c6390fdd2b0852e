"""The one file that knows W&B's client. It is imported only by a process that mirrors, never by a trainer or the launcher.

What W&B learns of the machine is limited to its system metrics (GPU, CPU, memory, disk, network): no command line, no environment,
no git remote, no code, no list of packages, no console output.
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
# How often offline folders are flushed: ``wandb sync`` sends nothing at all if one of its folders was killed before its first.
FLUSH_SECONDS = 1.0
# Which run another program is, or whose client it shares: a W&B sweep's agent and a notebook leave these to their children.
NOT_OURS = ("RUN_ID", "SWEEP_ID", "SWEEP_PARAM_PATH", "SERVICE", "RESUME", "RESUME_FROM", "FORK_FROM")


class Client:
    """Opens W&B runs. `trainer` is the process whose processor and memory are shown, None for none."""

    def __init__(self, reach: Reach | None, *, finish_seconds: float, trainer: int | None = None) -> None:
        self.reach, self._trainer, self._finish_seconds = reach, trainer, finish_seconds
        logging.getLogger("wandb").setLevel(logging.WARNING)
        self._scratch = tempfile.TemporaryDirectory(prefix="lorapack-wandb-", ignore_cleanup_errors=True)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = self._scratch.name  # not the home folder, whose quota is small
        for name in NOT_OURS:
            os.environ.pop(f"WANDB_{name}", None)
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_SILENT"] = "true"
        if reach is not None and reach.key is not None:
            os.environ["WANDB_API_KEY"] = reach.key
            os.environ["WANDB_BASE_URL"] = reach.server

    @property
    def online(self) -> bool:
        """Whether rows go to a server, else to folders in the sweep."""
        return self.reach is not None

    def destination(self, run: MirroredRun) -> str:
        """The address of the project that the run goes to."""
        assert self.reach is not None
        return f"{self.reach.server}/{run.entity or self.reach.entity}/{run.project}"

    def address(self, run: MirroredRun) -> str:
        """Where the run can be looked at."""
        return f"{self.destination(run).replace('//api.', '//', 1)}/runs/{run.dir.id}"

    def open(self, run: MirroredRun, *, tells_end: bool) -> wandb.Run:
        """Begin the run in W&B, or go on with it; `starting_step` is then the first step that it lacks.

        Args:
            tells_end: whether `finish` tells the server that the run has ended, and how.
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
            resume="allow" if self.online else None,
            reinit="create_new",
            mode="online" if self.online else "offline",
            dir=self._scratch.name if self.online else str(run.sweep.path),
            settings=self._settings(tells_end),
        )

    def folder(self, run: wandb.Run) -> Path:
        """Where W&B writes the run."""
        return Path(run.dir).parent

    def _settings(self, tells_end: bool) -> wandb.Settings:
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
            x_disable_meta=True,  # not x_disable_machine_info, which would turn the system metrics off, too
            x_save_requirements=False,
            x_disable_stats=self._trainer is None,
            x_stats_pid=self._trainer or os.getpid(),
            x_stats_gpu_device_ids=_own_gpus(),
            x_skip_transaction_log=self.online,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            x_update_finish_state=tells_end,
            init_timeout=INIT_SECONDS,
            finish_timeout=self._finish_seconds,
            finish_timeout_raises=True,
        )


def sample_table(run: wandb.Run, row: Row) -> wandb.Table:
    """The sample answers of an evaluation, as a table of its step.

    It is bound to the run here: W&B would make an artifact of every other table, and ask the server about each while it logs.
    """
    table = wandb.Table(
        columns=list(SAMPLE_COLUMNS), data=[[sample[name] for name in SAMPLE_COLUMNS] for sample in row.samples]
    )
    table.bind_to_run(run, SAMPLES, row.step)  # type: ignore[no-untyped-call]
    return table


def _own_gpus() -> list[int] | None:
    """The GPUs of this job where they are named by number; None leaves it to W&B, which sees what the cluster lets it."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(name) for name in names] if all(name.strip().isdigit() for name in names) else None
