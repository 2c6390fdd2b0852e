"""What this machine computes on, and how fast such devices train: the few numbers that a forecast needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from launcher.estimate.gpus import UNKNOWN_GPU_FLOPS, known_gpu

GIB = 2**30
NVIDIA_SMI_TIMEOUT_SECONDS = 5.0

# SmolLM2-135M in float32 on 2 cores, 512 tokens a step: 2.8 s, which is 4 x 135e6 x 512 FLOP.
CPU_CORE_FLOPS = 50e9


@dataclass(frozen=True)
class DeviceFacts:
    """One device that a pack can train on: a GPU, or all cores of a machine.

    `flops` is FLOP/s in training; `graphed` says that steps can be CUDA graphs, so that no launch holds them up.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_gib: float
    flops: float
    graphed: bool = False


def local_device() -> DeviceFacts:
    """The first GPU that a job on this machine would see, else its CPU."""
    return _first_gpu() or cpu_device()


def cpu_device() -> DeviceFacts:
    """The cores that this process may use, and the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return DeviceFacts("cpu", f"{cores} CPU cores", memory / GIB, cores * CPU_CORE_FLOPS)


def gpu_device(name: str, memory_gib: float) -> DeviceFacts:
    """A GPU by the name that NVIDIA's tools or a cluster give it."""
    model = known_gpu(name)
    if model is None:
        return DeviceFacts("cuda", name, memory_gib, UNKNOWN_GPU_FLOPS)
    return DeviceFacts("cuda", name, memory_gib, model.flops, model.graphed)


def _first_gpu() -> DeviceFacts | None:
    """The first visible GPU by nvidia-smi, None where there is none or the driver hangs."""
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
