"""Bases quantized once per cluster: the first process quantizes while others wait, and then all read the same bytes.

A later job or a requeue reads a quarter of the model's bytes, straight to its device, and quantizes nothing. A job that adds a base
removes those that no job has opened for `IDLE_DAYS`: longer than any job runs, so none of them is in use.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train.config import ModelConfig, QuantConfig
from train.errors import StorageError
from train.model.folder import weight_files
from train.model.locking import locked
from train.model.quantized import QuantizedBase
from train.model.quantizing import quantize_files
from train.runtime.activity import Activity
from train.store.layout import BaseDir, CacheDir
from train.store.storage import Record, make_folder, storage_errors, write_folder, write_json

# Of the cached file: raise it when its names or their meaning change.
FORMAT_VERSION = 2
# The first decides the bits, the second the names.
VERSIONED = ("bitsandbytes", "transformers")
# Of the disk, for checkpoints.
LEFT_FREE_BYTES = 2**30
IDLE_DAYS = 30.0

log = logging.getLogger("lorapack.model")


@dataclass(frozen=True)
class BaseSpec:
    """Everything that decides the bits of a quantized base.

    bitsandbytes rounds by thresholds on a GPU and by distances on a CPU, so the kind of device is part of it.
    """

    model_dir: Path
    model: ModelConfig
    quant: QuantConfig
    dtype: torch.dtype
    device: torch.device

    def about(self) -> Record:
        """The same as JSON. A hub's branch changes under the same name, so the age of its files counts too."""
        moves = (self.model.fingerprint or "hub:").startswith("hub:")
        stats = [(file.name, file.stat()) for file in weight_files(self.model_dir)] if moves else []
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.fingerprint,
            "code": self.model.trust_remote_code,
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "quant": self.quant.model_dump(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        }

    def tensors(self, stop: Callable[[], None]) -> dict[str, torch.Tensor]:
        """Quantize the model's files, which the cache saves later jobs."""
        return quantize_files(self.model_dir, self.model, self.quant, self.dtype, self.device, stop)


@dataclass(frozen=True)
class BaseCache:
    """The quantized bases of a cache. `stop` may raise while this waits or quantizes.

    `activity` learns when it quantizes instead of loading.
    """

    cache: CacheDir
    stop: Callable[[], None]
    activity: Activity = field(default_factory=Activity)

    def open(self, wanted: BaseSpec) -> QuantizedBase:
        """The base, from the cache; quantized now if the cache does not have it yet.

        A cache that cannot be written (full, read-only) costs the next job time, and never stops this one.
        """
        about = wanted.about()
        key = base_key(about)
        folder = self.cache.base(key)
        found = read_base(folder, wanted.device)
        if found is not None:
            # Fails in a cache that is read-only for this user.
            with suppress(OSError):
                os.utime(folder.path)
            return found
        try:
            make_folder(folder.path.parent)
            with locked(self.cache.base_lock(key), self.stop):
                return read_base(folder, wanted.device) or self._make(folder, about, wanted)
        # The lock's file cannot be made: every job quantizes for itself.
        except StorageError as exc:
            return self._for_this_job(wanted, self._quantize(wanted), exc)

    def _make(self, folder: BaseDir, about: Record, wanted: BaseSpec) -> QuantizedBase:
        began = time.monotonic()
        tensors = self._quantize(wanted)
        for name in remove_idle(folder.path.parent):
            log.info(f"removed {name} from the cache: no job has opened that base for {IDLE_DAYS:.0f} days")
        try:
            write_base(folder, about, tensors)
        except StorageError as exc:
            return self._for_this_job(wanted, tensors, exc)
        log.info(f"quantized the base in {time.monotonic() - began:.1f} s, kept for later jobs in {folder.path}")
        return read_base(folder, wanted.device) or _in_memory(tensors, wanted.device)

    def _quantize(self, wanted: BaseSpec) -> dict[str, torch.Tensor]:
        self.activity.begin("quantizing")
        tensors = wanted.tensors(self.stop)
        self.activity.begin("loading")
        return tensors

    def _for_this_job(self, wanted: BaseSpec, tensors: dict[str, torch.Tensor], why: StorageError) -> QuantizedBase:
        log.warning(f"the quantized base is not kept, so later jobs will quantize again: {why}")
        return _in_memory(tensors, wanted.device)


def base_key(about: Record) -> str:
    """The name of a base in the cache, by what `BaseSpec.about` says of it."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]


def remove_idle(bases: Path) -> list[str]:
    """Remove the bases that no job has opened for `IDLE_DAYS`, and what killed writers left as long ago; their names."""
    idle_since = time.time() - IDLE_DAYS * 24 * 3600
    # Another job may be removing them at the same time.
    with suppress(OSError):
        idle = [path for path in bases.iterdir() if path.is_dir() and path.stat().st_mtime < idle_since]
        for path in idle:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in idle]
    return []


def read_base(folder: BaseDir, device: torch.device) -> QuantizedBase | None:
    """The base in a folder of the cache, mapped into memory and read on demand; None where there is none, or a damaged one."""
    try:
        _read_ahead(folder.weights)
        file = safe_open(folder.weights, framework="pt", device=str(device))
    except (OSError, SafetensorError):
        return None
    return QuantizedBase(file.keys(), file.get_tensor, device)  # type: ignore[no-untyped-call]


def write_base(folder: BaseDir, about: Record, tensors: dict[str, torch.Tensor]) -> None:
    """Write a base to its folder in the cache, complete or not at all.

    Raises:
        StorageError: the disk cannot be written, or would be almost full.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    with storage_errors(folder.path):
        disk = shutil.disk_usage(folder.path.parent)
    if disk.free - size < LEFT_FREE_BYTES:
        raise StorageError(
            f"{folder.path} would take {size / 2**30:.1f} GiB and {disk.free / 2**30:.1f} GiB are free there; "
            "free some space, or choose another cache="
        )
    with write_folder(folder.path) as temporary:
        files = BaseDir(temporary)
        with storage_errors(files.weights):
            save_file(tensors, files.weights)
        write_json(files.about, about)


def _in_memory(tensors: dict[str, torch.Tensor], device: torch.device) -> QuantizedBase:
    return QuantizedBase(list(tensors), tensors.__getitem__, device)


def _read_ahead(path: Path) -> None:
    """Let the system fetch the whole file while the model is built around it, in large pieces, which suits network storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)
