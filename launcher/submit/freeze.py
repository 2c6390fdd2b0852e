"""The code of a sweep as it was at submission: jobs run from this copy, whatever happens to the checkout meanwhile."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from train.store.layout import SweepDir
from train.store.storage import make_folder, write_folder

SOURCE_DIR = Path(__file__).resolve().parents[2]
FROZEN = ("launcher", "train", "conf")


def freeze_code(sweep: SweepDir, source: Path = SOURCE_DIR) -> Path:
    """Copy the packages and the configuration into the sweep once per content; the folder to import them from.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    files = list(_source_files(source))
    frozen = sweep.code / tree_hash(source, files)
    if not frozen.exists():
        make_folder(sweep.code)
        with write_folder(frozen) as folder:
            for file in files:
                copy = folder / file.relative_to(source)
                make_folder(copy.parent)
                shutil.copyfile(file, copy)
    return frozen


def tree_hash(source: Path, files: list[Path]) -> str:
    """Sixteen hexadecimal digits over the names and contents of `files`."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(source)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _source_files(source: Path) -> Iterator[Path]:
    """Every file of the frozen folders, in order; compiled and hidden ones left out."""
    for name in FROZEN:
        for path in sorted((source / name).rglob("*")):
            parts = path.relative_to(source).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not hidden:
                yield path
