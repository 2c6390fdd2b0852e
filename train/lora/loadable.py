"""Which targets PEFT is known to load over a model: tried once (`train.lora.peft_forms`), and remembered in the cache.

Light on purpose: the launcher asks on the login node whether anything has to be tried.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from contextlib import suppress
from functools import cache as cached
from pathlib import Path

from train.config import LoraConfig, ModelConfig
from train.errors import StorageError
from train.model.facts import facts_file
from train.store.layout import CacheDir
from train.store.record_file import FileRecord, write_record
from train.store.storage import make_folder

# The keys of `LoraConfig` that decide which modules get an adapter.
TARGETING = {"target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"}


class LoadableTargets(FileRecord):
    """``facts/<key>-<targets>.json`` in the cache: that PEFT of `version` loads adapters with these targets."""

    targets: str
    version: str


def targeting(lora: LoraConfig) -> str:
    """The keys that decide which modules get an adapter, as one text."""
    return lora.model_dump_json(include=TARGETING)


def is_known_to_load(model_dir: Path, model: ModelConfig, lora: LoraConfig, cache: CacheDir) -> bool:
    """Whether it was tried, with the packages of now.

    Raises:
        BadInput: the model's folder cannot be read.
    """
    return _file(model_dir, model, lora, cache).is_file()


def remember_that_it_loads(model_dir: Path, model: ModelConfig, lora: LoraConfig, cache: CacheDir) -> None:
    """Keep it in the cache, if that can be written; else it is tried again next time.

    Raises:
        BadInput: the model's folder cannot be read.
    """
    file = _file(model_dir, model, lora, cache)
    with suppress(StorageError):
        make_folder(file.parent)
        write_record(file, LoadableTargets(targets=targeting(lora), version=_peft_version()))


def _file(model_dir: Path, model: ModelConfig, lora: LoraConfig, cache: CacheDir) -> Path:
    digest = hashlib.sha256(f"{_peft_version()} {targeting(lora)}".encode()).hexdigest()
    return cache.facts(f"{facts_file(model_dir, model, cache).stem}-{digest[:12]}")


@cached
def _peft_version() -> str:
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return "none"
