"""What torch reads from the environment once, when it is first imported. Light: a job calls it before that."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_torch(compiled: Path) -> None:
    """Set it, where the user has not.

    What is compiled is kept on the disk below `compiled`, so that a requeued job does not compile again. Memory is taken in
    segments that can grow: packs have tensors of many sizes, and fixed segments would leave gaps.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
