"""The launcher's own sections of the configuration: cluster, sweep and folders. `train.config` has those of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from train.section import Section

SLURM_JOBS_AT_ONCE = 8


class PartitionConfig(Section):
    """A partition that jobs may go to. What is `null` is asked of the cluster or follows from the GPU type."""

    gpu: str | None = None
    """Type of its GPUs as Slurm writes it; `null` where the GPUs have no type."""

    gres: str | None = None
    """What to pass to `sbatch --gres`; `null` asks for one GPU of that type."""

    memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB."""

    gpus: int | None = Field(None, ge=1)
    """How many GPUs the partition has."""

    max_minutes: int | None = Field(None, ge=1)
    """Its longest job in minutes; `null` means no limit if the cluster has none either."""

    tier: int | None = Field(None, ge=0)
    """Its PriorityTier. Jobs of a higher tier may preempt those of a lower one, so higher tiers are the last choice."""

    usd_per_gpu_hour: float | None = Field(None, ge=0)
    """Price of a GPU hour. The cheapest partition that holds a pack is chosen; without prices, the smallest GPU."""

    @property
    def gres_request(self) -> str:
        """What ``sbatch --gres`` takes."""
        return self.gres or ":".join(filter(None, ["gpu", self.gpu, "1"]))


class ClusterConfig(Section):
    """Where jobs run and what each one asks for."""

    kind: Literal["auto", "local", "slurm"]
    """`local` trains on this machine, `slurm` submits jobs. `auto` is Slurm where one answers, else this machine."""

    partitions: dict[str, PartitionConfig] = Field(default_factory=dict)
    """Partitions that jobs may go to, by name. Without any, all that have GPUs and are open to you."""

    account: str | None = None
    """What to pass to `sbatch --account`."""

    qos: str | None = None
    """What to pass to `sbatch --qos`."""

    reservation: str | None = None
    """What to pass to `sbatch --reservation`."""

    constraint: str | None = None
    """What to pass to `sbatch --constraint`."""

    setup: list[str] = Field(default_factory=list)
    """Shell lines that a job runs before Python, after `modules`."""

    modules: list[str] = Field(default_factory=list)
    """Modules that a job loads with `module load`."""

    container: str | None = None
    """Words before the job's Python, such as `apptainer exec --nv image.sif`."""

    cpus: int = Field(4, ge=1)
    """CPU cores of a job."""

    ram_gib: float | None = Field(None, gt=0)
    """Main memory of a job in GiB; `null` takes the cluster's default."""

    max_parallel: int | None = Field(None, ge=1)
    """Jobs of the sweep that run at once, those of earlier commands included; `null` means 1 on this machine and 8 on Slurm."""

    max_runs_per_pack: int | None = Field(None, ge=1)
    """The most runs that train together; `null` lets memory decide."""

    gpus_per_job: int = Field(1, ge=1, le=16)
    """GPUs of one machine that share every step of a job, with a process on each. Without GPUs one process trains."""

    def jobs_at_once(self, *, slurm: bool) -> int:
        """How many jobs may run side by side."""
        return self.max_parallel or (SLURM_JOBS_AT_ONCE if slurm else 1)


class SweepConfig(Section):
    """Which values to compare. `lora.r=8,16` on the command line adds an axis without a file."""

    name: str | None = None
    """Folder of the sweep below `root`; `null` makes it from the sweep file, the model and the data."""

    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys and their values; every combination is a run."""

    zip: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys and their values, paired element by element; all lists have the same length."""


class FolderConfig(Section):
    """The top-level keys: the folders that everything is written below."""

    root: str
    """Folder of the sweeps."""

    cache: str
    """Folder of models and tokenized data, shared by all sweeps."""
