"""What a pack will take, by arithmetic alone: bytes from the model's shape, seconds from FLOPs over the device's rate.

Honest to about a factor of 1.5 before anything was measured; finished packs of the sweep folder correct it (`history`). The
choices of the trainer (residency, recomputation, micro-batch) are those of `train.memory`, which cannot be imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.estimate.devices import GIB, DeviceFacts
from launcher.estimate.shapes import ModelShape
from launcher.estimate.workload import Workload
from launcher.records import Forecast
from train.config import RunConfig

# NF4: 4 bit a weight, and an absmax per 64 weights: 32 bit, or 0.127 bit a weight after double quantisation (arXiv 2305.14314, 3).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_QUANT_BYTES = 0.5 + 0.127 / 8
ADAPTER_BYTES = 16  # float32 weight, gradient and AdamW's two averages
LOGIT_ROWS = 1024  # rows of logits that exist at once, float32, with their gradient

RESIDENT_SHARE = 0.35
ACTIVATION_SHARE = 0.5
LARGEST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
USABLE_SHARE = {"cpu": 0.8, "cuda": 0.92}  # of the memory; the rest is the system's, or lost to fragmentation

CPU_PROCESS_GIB = 0.9  # Python with torch and transformers, before any weights
GPU_LAYER_SECONDS = 0.0047  # a layer's kernels cannot be launched faster, forward and backward: 32 layers take 150 ms
STARTUP_SECONDS = 15.0  # imports, loading


@dataclass(frozen=True)
class Correction:
    """What earlier packs measured, over what was forecast for them."""

    seconds: float = 1.0
    memory: float = 1.0


def forecast(
    config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceFacts, correction: Correction
) -> Forecast:
    """The forecast for one pack of runs with `work`, which share the base of `config`."""
    seconds = STARTUP_SECONDS + correction.seconds * training_seconds(config, work, shape, device)
    memory = correction.memory * memory_bytes(config, work, shape, device)
    gpus = 1 if device.kind == "cuda" else 0
    return Forecast(memory / GIB, seconds, gpus * seconds / 3600, usd=None)


def fits(expected: Forecast, device: DeviceFacts) -> bool:
    """Whether a pack with this forecast can train on `device`."""
    return expected.vram_gib <= USABLE_SHARE[device.kind] * device.memory_gib


def memory_bytes(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceFacts) -> float:
    """Peak memory: base, adapters with their optimizer, activations of a micro-batch and its logits."""
    width = _dtype_bytes(config, device)
    tokens, recomputed = _micro_batch(config, work, shape, device)
    adapters = ADAPTER_BYTES * sum(w.adapter_parameters for w in work)
    logits = 2 * 4 * min(tokens, LOGIT_ROWS) * shape.vocabulary
    process = CPU_PROCESS_GIB * GIB if device.kind == "cpu" else 0.0
    return (
        _base_bytes(config, shape, device)
        + adapters
        + tokens * _token_bytes(shape, width, recomputed)
        + logits
        + process
    )


def training_seconds(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceFacts) -> float:
    """Time in steps and evaluations: 2 FLOP a weight forward, 2 backward (a frozen weight has no gradient), 2 if recomputed."""
    tokens, recomputed = _micro_batch(config, work, shape, device)
    train_flop = (6 if recomputed else 4) * sum(w.train_tokens for w in work)
    flop = shape.flop_parameters * (train_flop + 2 * sum(w.eval_tokens for w in work))
    if device.kind == "cpu":
        return flop / device.flops
    micro_batches = sum(w.train_tokens for w in work) / max(tokens, 1.0)
    launches = max(micro_batches, max(w.steps for w in work)) * shape.layers * GPU_LAYER_SECONDS
    return max(flop / device.flops, launches)


def _base_bytes(config: RunConfig, shape: ModelShape, device: DeviceFacts) -> float:
    """The frozen weights; embeddings, norms and head are never quantised."""
    width = _dtype_bytes(config, device)
    if _is_resident(config, shape, device):
        return shape.parameters * width
    nf4 = NF4_DOUBLE_QUANT_BYTES if config.quant.bnb_4bit_use_double_quant else NF4_BYTES
    return shape.linear_parameters * nf4 + (shape.parameters - shape.linear_parameters) * width


def _is_resident(config: RunConfig, shape: ModelShape, device: DeviceFacts) -> bool:
    """Whether the base is held in full width."""
    if not config.quant.load_in_4bit or config.train.residency == "resident":
        return True
    dense = shape.parameters * _dtype_bytes(config, device)
    return config.train.residency == "auto" and dense <= RESIDENT_SHARE * device.memory_gib * GIB


def _micro_batch(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceFacts) -> tuple[float, bool]:
    """Tokens of the largest micro-batch, and whether activations are recomputed."""
    width = _dtype_bytes(config, device)
    step_tokens = sum(w.step_tokens for w in work)
    room = ACTIVATION_SHARE * max(0.0, device.memory_gib * GIB - _base_bytes(config, shape, device))
    recomputed = config.train.gradient_checkpointing
    if recomputed == "auto":
        recomputed = device.kind == "cuda" and step_tokens * _token_bytes(shape, width, False) > room
    if config.train.micro_batch_tokens != "auto":
        return min(step_tokens, float(config.train.micro_batch_tokens)), recomputed
    most = min(room / _token_bytes(shape, width, recomputed), LARGEST_MICRO_BATCH_TOKENS[device.kind])
    return min(step_tokens, float(math.ceil(most))), recomputed


def _token_bytes(shape: ModelShape, width: int, recomputed: bool) -> int:
    """What the backward needs of a token: 12 hidden-sized and 4 MLP-sized values a layer, or the layers' inputs and one layer."""
    layer = 12 * shape.hidden + 4 * shape.intermediate
    return width * (shape.layers * shape.hidden + layer if recomputed else shape.layers * layer)


def _dtype_bytes(config: RunConfig, device: DeviceFacts) -> int:
    """Bytes of a value in the training precision; ``auto`` is 16 bit on a GPU and 32 on a CPU."""
    widths = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "auto": 4 if device.kind == "cpu" else 2}
    return widths[config.train.dtype]
