"""What Python and torch read once, when torch is first imported. Light: a job calls it before that."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def prepare_torch(compiled: Path) -> None:
    """Set it, where the user has not.

    What is compiled is kept on the disk below `compiled`, so that a requeued job does not compile again. Memory is taken in
    segments that can grow: packs have tensors of many sizes, and fixed segments would leave gaps.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not _has_bytecode("torch"):
        _keep_bytecode(compiled / "python")


def _has_bytecode(package: str) -> bool:
    """Whether Python finds `package` compiled, or may leave it so for the next process, or the user says where bytecode lies."""
    if sys.pycache_prefix is not None:
        return True
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None or found.cached is None:
        return True
    may_write = not sys.dont_write_bytecode and os.access(Path(found.origin).parent, os.W_OK)
    return may_write or Path(found.cached).exists()


def _keep_bytecode(folder: Path) -> None:
    """Keep what Python compiles below `folder`, for this process, those it starts, and later jobs.

    Containers often come without bytecode, to be small, and are read-only or ask Python to write none: then every start compiles the
    thousands of files of torch and transformers again.
    """
    sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and transformers in here: garbage is not collected meanwhile, and what is there by then no collection looks at.

    Modules stay for good. Looking through them again and again while they grow took a quarter of the importing (2 cores, torch 2.13,
    transformers 5.23: 3.0 s without, 4.1 s with). When Python ends it has to see them again, or nanobind reports them as leaked.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
