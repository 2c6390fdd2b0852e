"""Where a pack can go: a partition of a cluster, or this machine, with the few numbers of its device that a forecast needs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from launcher.estimate.gpus import UNKNOWN_GPU_FLOPS, known_gpu

GIB = 2**30
LOCAL_PARTITION = "local"
NVIDIA_SMI_TIMEOUT_SECONDS = 5.0

# SmolLM2-135M in float32 on 2 cores, 512 tokens a step: 2.8 s, which is 4 x 135e6 x 512 FLOP.
CPU_CORE_FLOPS = 50e9

# From this many tokens in a micro-batch on, a device gains no more speed: about 4,500 on an H200 and 1,500 on a T4. Between them and
# beyond, the power law through these two: 1,500 * (590e12 / 25e12) ** 0.35 = 4,535.
T4_FLOPS = 25e12
T4_FULL_TOKENS = 1500.0
FULL_TOKENS_EXPONENT = 0.35


@dataclass(frozen=True)
class DeviceSpec:
    """One device that a pack can train on: a GPU, or all cores of a machine.

    flops: FLOP/s that training reaches. graphed: whether steps can be CUDA graphs, which need no time for launches.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_gib: float
    flops: float
    graphed: bool = False


def local_device() -> DeviceSpec:
    """The first GPU that a job on this machine would see, else its CPU."""
    return _first_gpu() or cpu_device()


def cpu_device() -> DeviceSpec:
    """The cores that this process may use, and the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return DeviceSpec("cpu", f"{cores} CPU cores", memory / GIB, cores * CPU_CORE_FLOPS)


def gpu_device(name: str, memory_gib: float) -> DeviceSpec:
    """A GPU by the name that NVIDIA's tools or a cluster give it."""
    model = known_gpu(name)
    if model is None:
        return DeviceSpec("cuda", name, memory_gib, UNKNOWN_GPU_FLOPS)
    return DeviceSpec("cuda", name, memory_gib, model.flops, model.graphed)


def _first_gpu() -> DeviceSpec | None:
    """The first visible GPU by nvidia-smi, None without a GPU or if the driver hangs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in {"", "-1"} or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    selected = ["-i", visible.split(",")[0]] if visible else []
    try:
        answer = subprocess.run(
            [*query, *selected], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=True
        )
        name, _, mebibytes = answer.stdout.splitlines()[0].rpartition(",")
        return gpu_device(name.strip(), float(mebibytes) / 1024)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


@dataclass(frozen=True)
class Partition:
    """A kind of device that jobs can ask for.

    gres: what ``sbatch --gres`` takes. gpus: how many there are, per_node: the most on one node; None if unknown.
    max_minutes: the longest job, None for no limit. tier: its priority; jobs of a higher tier may preempt those of a lower one.
    gpus_per_job: how many GPUs share every step of a job.
    """

    name: str
    device: DeviceSpec
    gres: str = ""
    gpus: int | None = None
    max_minutes: int | None = None
    usd_per_gpu_hour: float | None = None
    tier: int = 1
    gpus_per_job: int = 1
    per_node: int | None = None

    @property
    def full_tokens(self) -> float:
        """Tokens of one step, over all runs of a pack, that keep a job's devices busy. On a CPU more runs always help."""
        if self.device.kind == "cpu":
            return float("inf")
        return self.gpus_per_job * T4_FULL_TOKENS * math.pow(self.device.flops / T4_FLOPS, FULL_TOKENS_EXPONENT)

    @property
    def most_per_job(self) -> float:
        """How many GPUs a job can have. A job does not leave its node. Infinite if unknown."""
        return self.per_node or self.gpus or math.inf

    @property
    def jobs(self) -> int | None:
        """How many jobs find GPUs there at once, None if unknown."""
        return None if self.gpus is None else max(1, self.gpus // self.gpus_per_job)


def local_partition(gpus_per_job: int) -> Partition:
    """This machine. Without a GPU a job is one process on the CPU."""
    device = local_device()
    return Partition(LOCAL_PARTITION, device, gpus_per_job=gpus_per_job if device.kind == "cuda" else 1)
