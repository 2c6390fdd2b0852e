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
    """Set the environment variables that torch reads, except those that the user has set.

    Compiled kernels are kept on the disk below `compiled`, so that a requeued job does not compile again. GPU memory is allocated in
    segments that can grow: packs have tensors of many sizes, and fixed segments would leave gaps.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not _has_bytecode("torch"):
        _keep_bytecode(compiled / "python")


def _has_bytecode(package: str) -> bool:
    """Whether Python finds `package` compiled, can keep its bytecode for the next process, or was given a folder for bytecode."""
    if sys.pycache_prefix is not None:
        return True
    # `find_spec` looks for the package without importing it.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or spec.cached is None:
        return True
    may_write = not sys.dont_write_bytecode and os.access(Path(spec.origin).parent, os.W_OK)
    return may_write or Path(spec.cached).exists()


def _keep_bytecode(folder: Path) -> None:
    """Keep bytecode below `folder`, for this process, the processes that it starts, and later jobs.

    Containers often come without bytecode, to be small, and are read-only or tell Python to write none. Without this, every start
    compiles the thousands of files of torch and transformers again.
    """
    sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and transformers inside this block: no garbage is collected in it, and later collections skip what it created.

    Modules are never freed, and each collection would look through all of them. That took a quarter of the time of the imports
    (2 cores, torch 2.13, transformers 5.23: 3.0 s without collections, 4.1 s with).
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
        # At the end of the process Python has to see these objects again, or nanobind reports them as leaked.
        atexit.register(gc.unfreeze)
