"""The nodes of the cluster in a box. They are four slurmd on one host; their GPUs, CPUs and memory are invented."""

from __future__ import annotations

from dataclasses import dataclass

CPUS_PER_NODE = 8
MEMORY_PER_NODE_MIB = 64_000
GPUS_PER_NODE = 2


@dataclass(frozen=True)
class Node:
    """A node and the partition it belongs to, which is also the type of its GPUs."""

    name: str
    gpu: str


NODES = tuple(Node(f"{gpu}-{number}", gpu) for gpu in ("t4", "a100") for number in (1, 2))
PARTITIONS = tuple(dict.fromkeys(node.gpu for node in NODES))
# A partition over all nodes, whose jobs preempt the others.
URGENT = "urgent"


def nodes_of(partition: str) -> str:
    """The nodes of a partition as Slurm lists them."""
    return ",".join(node.name for node in NODES if node.gpu == partition)
