"""The GPUs that clusters have: memory and training speed, by any name that an administrator or NVIDIA's tools give them.

A new GPU type is a line in `MODELS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GpuModel:
    """Memory of one GPU as nvidia-smi reports it, and the FLOP/s that fine-tuning reaches.

    graphed: whether its steps can be CUDA graphs, which need no time for launches: from sm_80 on (`train.nn.backends`).
    """

    name: str
    memory_gib: float
    flops: float
    graphed: bool = True


# Patterns over the name without punctuation; the first match counts, so longer names come before their beginnings (h100nvl, h100).
# The memory is that of the smallest variant, unless a name contains a size of its own (a100_80gb).
# FLOP/s are those that training reaches when launches cost no time. Measured on an H200: 0.6 of the data sheet's figure for dense
# 16-bit tensor cores. The others are assumed to reach 0.6 from sm_80 on, and 0.4 before.
MODELS = {
    r"b200": GpuModel("B200", 179.0, 1350e12),
    r"gh200": GpuModel("GH200", 95.5, 590e12),
    r"h200": GpuModel("H200", 140.4, 590e12),
    r"h100nvl": GpuModel("H100 NVL", 93.5, 500e12),
    r"h100": GpuModel("H100", 79.6, 590e12),
    r"a100l": GpuModel("A100 80GB", 80.0, 190e12),
    r"a100": GpuModel("A100", 40.0, 190e12),
    r"rtxpro6000": GpuModel("RTX PRO 6000", 95.5, 300e12),
    r"(rtx)?6000ada": GpuModel("RTX 6000 Ada", 48.0, 218e12),
    r"a6000": GpuModel("RTX A6000", 48.0, 93e12),
    r"a5000": GpuModel("RTX A5000", 24.0, 67e12),
    r"a4000": GpuModel("RTX A4000", 16.0, 46e12),
    r"a40": GpuModel("A40", 45.0, 90e12),
    r"a30": GpuModel("A30", 24.0, 99e12),
    r"a10(?!0)": GpuModel("A10", 22.5, 75e12),
    r"l40s": GpuModel("L40S", 45.0, 217e12),
    r"l40": GpuModel("L40", 45.0, 108e12),
    r"l20": GpuModel("L20", 45.0, 72e12),
    r"l4(?!\d)": GpuModel("L4", 22.5, 72e12),
    r"(^|nvidia|tesla)a2(?!\d)": GpuModel("A2", 15.0, 11e12),
    r"v100l": GpuModel("V100 32GB", 32.0, 50e12, graphed=False),
    r"v100": GpuModel("V100", 16.0, 50e12, graphed=False),
    r"p100": GpuModel("P100", 12.0, 8e12, graphed=False),
    r"t4(?!\d)": GpuModel("T4", 15.0, 25e12, graphed=False),
    r"5090": GpuModel("RTX 5090", 31.8, 125e12),
    r"4090": GpuModel("RTX 4090", 24.0, 99e12),
    r"4080": GpuModel("RTX 4080", 16.0, 58e12),
    r"4070": GpuModel("RTX 4070", 12.0, 35e12),
    r"3090": GpuModel("RTX 3090", 24.0, 43e12),
    r"3080ti": GpuModel("RTX 3080 Ti", 12.0, 41e12),
    r"3080": GpuModel("RTX 3080", 10.0, 36e12),
    r"3070": GpuModel("RTX 3070", 8.0, 24e12),
    r"3060": GpuModel("RTX 3060", 12.0, 15e12),
    r"2080ti": GpuModel("RTX 2080 Ti", 11.0, 22e12, graphed=False),
    r"1080ti": GpuModel("GTX 1080 Ti", 11.0, 4e12, graphed=False),
    r"titanrtx": GpuModel("TITAN RTX", 24.0, 52e12, graphed=False),
    r"rtx8000": GpuModel("Quadro RTX 8000", 48.0, 52e12, graphed=False),
    r"rtx6000": GpuModel("Quadro RTX 6000", 24.0, 52e12, graphed=False),
}
UNKNOWN_GPU_FLOPS = 40e12
# 1g.10gb: one of seven slices of compute, and 10 GB.
MIG_SLICE = re.compile(r"(\d)g\.(\d+)gb")
MIG_SLICES = 7
SIZE = re.compile(r"(?<![a-z\d])(\d{1,3})(?:g|gb|gib)?(?![a-z\d])")
SMALLEST_SIZE_GB = 8


def known_gpu(name: str) -> GpuModel | None:
    """The GPU that `name` means, None if it is not in the table: ``a100``, ``Tesla T4``, ``a100_1g.10gb``."""
    lower = name.lower()
    plain = re.sub(r"[^a-z\d]", "", lower)
    model = next((model for pattern, model in MODELS.items() if re.search(pattern, plain)), None)
    if model is None:
        return None
    part = MIG_SLICE.search(lower)
    if part is not None:
        return replace(
            model,
            name=f"{model.name} {part[0]}",
            memory_gib=float(part[2]),
            flops=model.flops * int(part[1]) / MIG_SLICES,
        )
    sizes = [int(size) for size in SIZE.findall(lower.replace("_", "-"))]
    larger = [size for size in sizes if size >= SMALLEST_SIZE_GB and _is_variant(model, size)]
    return replace(model, memory_gib=float(larger[0])) if larger else model


def _is_variant(model: GpuModel, size_gb: int) -> bool:
    """Whether a number in a name is another memory size: the A100 comes with 40 and with 80 GB.

    80 in a name with H100 is no variant, because 79.6 GiB is its usual size.
    """
    usual = abs(size_gb / model.memory_gib - 1) < 0.1
    return 0.6 <= size_gb / model.memory_gib <= 2.5 and not usual and str(size_gb) not in model.name
