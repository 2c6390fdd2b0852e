"""Where a pack can go: a partition of a cluster, or this machine, with the device that a job gets there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.estimate.devices import DeviceFacts, local_device

LOCAL_PARTITION = "local"

# Tokens of a micro-batch from which on a device gains no speed: about 4,500 on an H200, 1,500 on a T4; between and beyond by the
# power law through these two.
T4_FLOPS, T4_FULL_TOKENS, FULL_TOKENS_EXPONENT = 25e12, 1500.0, 0.35


@dataclass(frozen=True)
class Partition:
    """A kind of device that jobs can ask for. `gpus` is how many there are, None where nobody said; `max_minutes` None is no limit.

    tier: its priority; jobs of a higher one may push out those of a lower one. gpus_per_job: how many share every step of a job.
    per_node: the most GPUs on one of its nodes, None where nobody said.
    """

    name: str
    device: DeviceFacts
    gres: str = ""
    gpus: int | None = None
    max_minutes: int | None = None
    usd_per_gpu_hour: float | None = None
    tier: int = 1
    gpus_per_job: int = 1
    per_node: int | None = None

    @property
    def full_tokens(self) -> float:
        """Tokens of one step over all runs of a pack that keep a job's devices busy; on a CPU more runs always help."""
        if self.device.kind == "cpu":
            return float("inf")
        return self.gpus_per_job * T4_FULL_TOKENS * math.pow(self.device.flops / T4_FLOPS, FULL_TOKENS_EXPONENT)

    @property
    def most_per_job(self) -> float:
        """How many GPUs a job can have, which does not leave its node; any number where nobody said."""
        return self.per_node or self.gpus or math.inf

    @property
    def jobs(self) -> int | None:
        """Jobs that find GPUs there at once, None where nobody said."""
        return None if self.gpus is None else max(1, self.gpus // self.gpus_per_job)


def local_partition(gpus_per_job: int) -> Partition:
    """This machine, whose jobs ask for so many of its GPUs; without any a job is one process on the CPU."""
    device = local_device()
    return Partition(LOCAL_PARTITION, device, gpus_per_job=gpus_per_job if device.kind == "cuda" else 1)
