"""A configuration file for this cluster, written from what was found. Then ``cluster=site`` is all that a command needs."""

from __future__ import annotations

from pathlib import Path

import yaml

from launcher.cluster.inventory import Inventory
from launcher.cluster.parsing import LivePartition
from launcher.estimate.gpus import known_gpu
from launcher.installation import shipped_conf
from train.errors import BadInput
from train.section import check_name
from train.store.storage import make_folder, write_text

HEADER = """# Written by `python -m launcher doctor write={name}`; `python -m launcher keys cluster`
# lists what else can be set.
# With usd_per_gpu_hour on every partition, packs go to the cheapest one that holds them instead of the smallest.
kind: slurm
"""


def write_site(name: str, inventory: Inventory | None, conf_dir: Path) -> Path:
    """Write ``cluster/<name>.yaml`` below `conf_dir`, the user's configuration folder; its path.

    Raises:
        BadInput: no Slurm answers, the file exists already, it would replace a shipped one, or no partition with GPUs is open to the
            user.
    """
    path = conf_dir / "cluster" / f"{check_name(name, 'write')}.yaml"
    if inventory is None:
        raise BadInput(f"write={name}: Slurm does not answer here; run this on the cluster's login node.")
    if path.exists():
        raise BadInput(f"write={name}: {path} exists already; remove it, or choose another name.")
    shipped = shipped_conf() / "cluster" / path.name
    if shipped.exists():
        raise BadInput(f"write={name}: this would replace the shipped {shipped}; choose another name.")
    partitions = [partition for partition in inventory.open_partitions() if partition.gpus]
    if not partitions:
        raise BadInput(f"write={name}: no partition with working GPUs is open to you here.")
    make_folder(path.parent)
    write_text(path, site_text(name, partitions))
    return path


def site_text(name: str, partitions: list[LivePartition]) -> str:
    """The file's text. It describes each partition with one kind of GPU; mixed ones are only named, and asked about at every plan."""
    described = {partition.name: _settings(partition) for partition in partitions}
    return HEADER.format(name=name) + yaml.safe_dump({"partitions": described}, sort_keys=False)


def _settings(partition: LivePartition) -> dict[str, str | int | float]:
    if len(partition.gpus) != 1:
        return {}
    (kind, count), *_ = partition.gpus.items()
    model = known_gpu(kind)
    settings = {
        "gpu": kind or None,
        "memory_gib": model.memory_gib if model else None,
        "gpus": count,
        "max_minutes": partition.max_minutes,
        "tier": partition.tier,
    }
    return {key: value for key, value in settings.items() if value is not None}
