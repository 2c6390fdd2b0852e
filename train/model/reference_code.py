"""transformers' own PyTorch code instead of kernels of other packages.

With flash-linear-attention, mamba-ssm or causal-conv1d installed, transformers takes their kernels for linear attention and state
spaces. These run on GPUs alone, and not in float64 or float32. Copies of a model that are computed on a CPU, or exactly, do without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import hub_kernels

# Exporting a model needs its PyTorch code too: where this says so, transformers takes it. Versions without it choose once, on import.
SWITCH = "is_torchdynamo_exporting"


@contextmanager
def reference_code() -> Iterator[None]:
    """Within this, models are computed by transformers' own code."""
    before = getattr(hub_kernels, SWITCH, None)
    take_reference_code()
    try:
        yield
    finally:
        if before is not None:
            setattr(hub_kernels, SWITCH, before)


def take_reference_code() -> None:
    """From now on, models are computed by transformers' own code: for a process without a GPU."""
    if hasattr(hub_kernels, SWITCH):
        setattr(hub_kernels, SWITCH, lambda: True)
