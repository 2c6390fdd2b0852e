"""The code of a sweep as it was at submission. Jobs run from this copy, so later changes of the checkout do not affect them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.installation import SOURCE_DIR, shipped_conf
from train.store.layout import SweepDir
from train.store.storage import make_folder, write_folder


def freeze_code(sweep: SweepDir, source: Path = SOURCE_DIR) -> Path:
    """Copy the packages in `source` and the shipped configuration into the sweep, once per content.

    Returns:
        The folder to import them from. It has the layout of a checkout, even if the program is installed.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    files = _source_files(source)
    frozen = sweep.code / tree_hash(files)
    if not frozen.exists():
        make_folder(sweep.code)
        with write_folder(frozen) as folder:
            for name, file in files.items():
                make_folder((folder / name).parent)
                shutil.copyfile(file, folder / name)
    return frozen


def tree_hash(files: dict[str, Path]) -> str:
    """Sixteen hexadecimal digits over the names and contents of `files`."""
    digest = hashlib.sha256()
    for name, file in files.items():
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _source_files(source: Path) -> dict[str, Path]:
    """Every file to copy, under the path that it gets in the copy."""
    conf = shipped_conf(source)
    files: dict[str, Path] = {}
    for name, folder in (("launcher", source / "launcher"), ("train", source / "train"), ("conf", conf)):
        for path in _visible_files(folder):
            # An installed program keeps its configuration in launcher/conf/. The copy has it once, in conf/.
            if name == "conf" or conf not in path.parents:
                files[f"{name}/{path.relative_to(folder)}"] = path
    return files


def _visible_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, in order, without compiled and hidden ones."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden:
            yield path
