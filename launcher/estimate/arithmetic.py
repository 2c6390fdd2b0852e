"""What a pack will take, by arithmetic alone: bytes from the model's shape, seconds from FLOPs over the device's rate.

Honest to about a factor of 1.5 before anything was measured; finished packs of the sweep folder correct it (`history`). What the
trainer will choose (residency, recomputation, micro-batch) is asked of `train.sizing`, as the trainer does.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.estimate.devices import GIB, DeviceSpec
from launcher.estimate.shapes import ModelShape
from launcher.estimate.workload import Workload, share
from launcher.records import Forecast
from train.config import RunConfig
from train.sizing import Device, Fit, base_bytes, choose_fit, token_bytes

ADAPTER_BYTES = 16  # float32 weight, gradient and AdamW's two averages; the weight in the base's precision comes on top
LOGIT_ROWS, LOGIT_BYTES = 1024, 8  # rows of logits that exist at once, in float32 and twice in 16 bit

USABLE_SHARE = {"cpu": 0.8, "cuda": 0.92}  # of the memory; the rest is the system's, or lost to fragmentation

# What is there before any weights: Python with torch and transformers; the work areas of a GPU's matrix products.
PROCESS_GIB = {"cpu": 0.9, "cuda": 0.5}
# Measured on an H200 with 32 layers: launching a micro-batch forward and backward takes 150 ms; where a graph is replayed, or the
# kernels take longer, 8 ms of reading weights and filling the GPU are left beside the arithmetic.
LAUNCH_SECONDS, LAYER_SECONDS = 0.0047, 0.00025
LARGEST_STEP = 0.65  # how far the largest of some ten steps lies above the mean, for one row
NF4_FLOP = 750  # unpacking a weight takes as long as so many FLOP, at each use
STARTUP_SECONDS = 15.0  # imports, loading


@dataclass(frozen=True)
class Correction:
    """What earlier packs measured, over what was forecast for them."""

    seconds: float = 1.0
    memory: float = 1.0


def forecast(
    config: RunConfig,
    work: list[Workload],
    shape: ModelShape,
    device: DeviceSpec,
    correction: Correction,
    gpus: int = 1,
) -> Forecast:
    """The forecast for one pack of runs with `work`, which share the base of `config`, on so many GPUs together.

    Memory is that of one GPU. What they tell each other at every step, the gradients of adapters, counts for nothing.
    """
    work = [share(run, gpus) for run in work]
    seconds = STARTUP_SECONDS + correction.seconds * training_seconds(config, work, shape, device)
    memory = correction.memory * memory_bytes(config, work, shape, device)
    paid = gpus if device.kind == "cuda" else 0
    return Forecast(memory / GIB, seconds, paid * seconds / 3600, usd=None)


def fits(expected: Forecast, device: DeviceSpec) -> bool:
    """Whether a pack with this forecast can train on `device`."""
    return expected.vram_gib <= USABLE_SHARE[device.kind] * device.memory_gib


def memory_bytes(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceSpec) -> float:
    """Peak memory: base, adapters with their optimizer, activations of a micro-batch and its logits."""
    fit, tokens = _micro_batch(config, work, shape, device)
    width = _dtype_bytes(config, device)
    base = base_bytes(shape.size, config.quant, fit.residency, width)
    # Rows of one matrix: the largest adapter decides how long all are.
    adapters = (ADAPTER_BYTES + width) * len(work) * max((w.adapter_parameters for w in work), default=0)
    adapted = frozenset[str]().union(*{w.adapted for w in work})
    # The largest step counts: lengths vary by about half of their mean, so the sum of n rows by half of it over the root of n.
    rows = sum(w.batch_size for w in work)
    largest = min(tokens * (1 + LARGEST_STEP / rows**0.5), float(fit.micro_batch_tokens)) if rows else 0.0
    activations = largest * token_bytes(
        shape.size, width, recomputed=fit.checkpoint_activations, adapted=adapted or None
    )
    logits = LOGIT_BYTES * min(tokens, LOGIT_ROWS) * shape.vocabulary
    return base + adapters + activations + logits + PROCESS_GIB[device.kind] * GIB


def training_seconds(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceSpec) -> float:
    """Time in steps and evaluations: 2 FLOP a weight forward, 2 backward (a frozen weight has no gradient), 2 if recomputed."""
    fit, tokens = _micro_batch(config, work, shape, device)
    train_tokens, eval_tokens = sum(w.train_tokens for w in work), sum(w.eval_tokens for w in work)
    flop = shape.flop_parameters * ((6 if fit.checkpoint_activations else 4) * train_tokens + 2 * eval_tokens)
    if device.kind == "cpu":
        return flop / device.flops
    micro_batches = max(train_tokens / max(tokens, 1.0), max(w.steps for w in work))
    if fit.residency == "nf4":
        flop += micro_batches * (3 if fit.checkpoint_activations else 2) * NF4_FLOP * shape.size.linear_parameters
    forwards = 1.5 if fit.checkpoint_activations else 1.0
    launches = 0.0 if _replays_graphs(config, device, fit) else forwards * micro_batches * shape.layers * LAUNCH_SECONDS
    return max(flop / device.flops, launches) + micro_batches * shape.layers * LAYER_SECONDS


def _replays_graphs(config: RunConfig, device: DeviceSpec, fit: Fit) -> bool:
    """As `train.nn.backends` chooses; that a model's decoder is a Llama is taken for granted."""
    may = config.train.compile is not False and config.train.dtype in ("auto", "bfloat16")
    return may and device.graphed and fit.graphs


def _micro_batch(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceSpec) -> tuple[Fit, float]:
    """What the trainer will choose, and the tokens of the largest micro-batch."""
    size = Device(device.kind, device.memory_gib * GIB)
    longest = max((w.longest for w in work), default=0)
    fit = choose_fit(config.train, config.quant, shape.size, _dtype_bytes(config, device), size, longest)
    return fit, min(sum(w.step_tokens for w in work), float(fit.micro_batch_tokens))


def _dtype_bytes(config: RunConfig, device: DeviceSpec) -> int:
    """Bytes of a value in the training precision; ``auto`` is 16 bit on a GPU and 32 on a CPU."""
    widths = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "auto": 4 if device.kind == "cpu" else 2}
    return widths[config.train.dtype]
