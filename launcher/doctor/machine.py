"""This machine: packages, the device that local jobs get, and the disks that sweeps and models are written to."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launcher.doctor.advice import Advice
from launcher.estimate.devices import GIB, DeviceSpec, local_device

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "submitit", "hydra-core", "wandb")
MOUNTS = Path("/proc/self/mounts")
# File systems that other machines certainly do not see.
NODE_LOCAL = {"tmpfs", "ramfs", "overlay", "squashfs"}
LITTLE_SPACE_GIB = 10.0


@dataclass(frozen=True)
class Disk:
    """The file system of a folder, which need not exist yet."""

    path: str
    kind: str
    free_gib: float
    writable: bool


@dataclass(frozen=True)
class Machine:
    """What jobs on this machine find. A missing package has the version None."""

    host: str
    python: str
    packages: dict[str, str | None]
    device: DeviceSpec
    root: Disk
    cache: Disk


def look_at_machine(root: Path, cache: Path) -> Machine:
    """Look at packages, device and disks. Writes nothing."""
    packages = {name: _version(name) for name in PACKAGES}
    return Machine(
        platform.node(), platform.python_version(), packages, local_device(), look_at_disk(root), look_at_disk(cache)
    )


def look_at_disk(path: Path) -> Disk:
    """The file system of `path`, or of the nearest folder above it that exists."""
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(folder).free / GIB
    return Disk(str(path), _kind(folder.resolve()), free, os.access(folder, os.W_OK))


def machine_advice(machine: Machine, *, slurm: bool) -> list[Advice]:
    """What would go wrong on this machine. `slurm` says that jobs run on other machines, from the same folders."""
    missing = [name for name, installed in machine.packages.items() if installed is None and name != "wandb"]
    advice = [Advice("warning", f"Not installed here: {', '.join(missing)}; run 'make install'.")] if missing else []
    if slurm and (machine.packages["torch"] or "").endswith("+cpu"):
        text = f"torch {machine.packages['torch']} cannot use GPUs, and jobs run in this environment; install a build with CUDA."
        advice.append(Advice("warning", text))
    for name, disk in (("root", machine.root), ("cache", machine.cache)):
        advice += _disk_advice(name, disk, slurm=slurm)
    return advice


def _disk_advice(name: str, disk: Disk, *, slurm: bool) -> list[Advice]:
    where = f"{name}={disk.path}"
    if not disk.writable:
        return [Advice("warning", f"{where} cannot be written to; choose another folder.")]
    advice = []
    if slurm and disk.kind in NODE_LOCAL:
        text = f"{where} is on {disk.kind}, which the cluster's nodes may not see; jobs need a shared folder."
        advice.append(Advice("warning", text))
    if disk.free_gib < LITTLE_SPACE_GIB:
        advice.append(Advice("warning", f"Only {disk.free_gib:.1f} GiB are free for {where}."))
    return advice


def _kind(folder: Path) -> str:
    """The type of the file system, by the longest mount point above `folder`."""
    try:
        rows = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [(len(row[1]), row[2]) for row in rows if folder.is_relative_to(row[1])]
    return max(above)[1] if above else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
