"""What a pack will take, by arithmetic alone: bytes from the model's shape, seconds from FLOPs over the device's rate.

Right to about a factor of 1.5 before anything was measured; finished packs of the sweep folder correct it (`forecaster`). What the
trainer will choose (residency, recomputation, micro-batch) comes from `train.sizing`, which the trainer uses too.

A worked example: Llama-2-7B, 8 runs of LoRA rank 16 on q_proj and v_proj (8,388,608 parameters each), batches of 4 rows of 131.4 tokens
on average and 512 at most, 100 steps, on an A100 with 40 GiB. `train.sizing` chooses a resident 16-bit base, recomputed
activations and micro-batches of at most 5,120 tokens. A step has 8 * 4 = 32 rows and 32 * 131.4 = 4,204.8 tokens, one micro-batch.

memory    base         6.74e9 parameters * 2 bytes                                           12.55 GiB
          adapters     8 runs * 8,388,608 * (16 + 2) bytes                                    1.13 GiB
          activations  4,204.8 * (1 + 0.65 / sqrt(32)) = 4,688 tokens * 470,528 bytes         2.05 GiB
          logits       1,024 rows * 32,000 tokens of the vocabulary * 8 bytes                 0.24 GiB
          process                                                                             0.50 GiB
          sum                                                                                16.47 GiB of 0.92 * 40 usable
time      arithmetic   6.61e9 weights * 6 FLOP * 420,480 tokens = 1.67e16 FLOP, / 190e12      87.7 s
          launches     100 micro-batches * 224 linear layers * 0.67 ms * 1.5 = 22.5 s, hidden  0.0 s
          per layer    100 * 32 * 0.25 ms                                                      0.8 s
          startup                                                                             15.0 s
          sum                                                                                103.5 s
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.estimate.devices import GIB, DeviceSpec
from launcher.estimate.shapes import ModelShape
from launcher.estimate.workload import Workload, share
from launcher.records import Forecast
from train.config import RunConfig
from train.sizing import ComputePath, Device, Fit, base_bytes, choose_fit, logit_rows, token_bytes

# Per adapter parameter: float32 weight, gradient and AdamW's two averages. The weight in the base's precision comes on top.
ADAPTER_BYTES = 16
# Of a logit of `train.sizing.logit_rows`: in float32 and twice in 16 bit.
LOGIT_BYTES = 8

# Of the memory; the rest is the system's, or lost to fragmentation.
USABLE_SHARE = {"cpu": 0.8, "cuda": 0.92}

# What a process takes before any weights: Python with torch and transformers; the work areas of a GPU's matrix products.
PROCESS_GIB = {"cpu": 0.9, "cuda": 0.5}
# Per micro-batch, measured on an H200. Launching the kernels forward and backward takes 0.67 ms for each linear layer with what lies
# between: 150 ms for the 224 of Llama-2-7B, 186 ms for the 252 of Qwen3-8B on flat tokens, 96 ms for the 128 of Falcon-7B on padded.
LAUNCH_SECONDS = 0.00067
# And 5.7 ms for a decoder layer with experts: Qwen3-30B-A3B, 48 layers, takes 298 ms for 1 x 4 and 266 ms for 8 x 4 (30 November 2026).
EXPERTS_LAUNCH_SECONDS = 0.0057
# Of a decoder layer. If a graph is replayed, or the kernels take longer than their launches, 8 ms remain of Llama-2-7B's 32 layers in
# addition to the arithmetic, for reading weights and filling the GPU.
LAYER_SECONDS = 0.00025
# How many times as long as by our own decoder the arithmetic takes, by path, for 8 runs of 4 rows on an H200. Flat: Qwen3-8B at 15,957
# tokens/s. Padded, where attention, norms and activations compute the pads too: Falcon-7B at 13,902 tokens/s.
SLOWER: dict[ComputePath, float] = {"own": 1.0, "flat": 1.1, "padded": 1.5}
# How far the largest of some ten steps lies above the mean, for one row.
LARGEST_STEP = 0.65
# Unpacking an NF4 weight takes as long as this many FLOP, at each use.
NF4_FLOP = 750
# Imports and loading.
STARTUP_SECONDS = 15.0


@dataclass(frozen=True)
class Correction:
    """What earlier packs measured, divided by what was forecast for them."""

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
    """The forecast for one pack of runs with `work`, which share the base of `config`, on `gpus` GPUs together.

    Memory is that of one GPU. The exchange of the adapters' gradients at every step is small and not counted.
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
    # A pack's adapters are stacked in one tensor, so each takes as much as the largest.
    adapters = (ADAPTER_BYTES + width) * len(work) * max((w.adapter_parameters for w in work), default=0)
    adapted = frozenset[str]().union(*{w.adapted for w in work})
    # The largest step counts, not the mean. Lengths vary by about half of their mean, so the sum of n rows varies by half of its own
    # mean over sqrt(n), and the largest of ten such sums lies 0.65 / sqrt(n) above it.
    rows = sum(w.batch_size for w in work)
    largest = min(tokens * (1 + LARGEST_STEP / rows**0.5), float(fit.micro_batch_tokens)) if rows else 0.0
    activations = largest * token_bytes(
        shape.size, width, recomputed=fit.checkpoint_activations, adapted=adapted or None
    )
    # The kernel that takes no copy runs where CUDA graphs do.
    rows_of_logits = logit_rows(shape.vocabulary, copied=not device.graphed)
    logits = LOGIT_BYTES * min(tokens, rows_of_logits) * shape.vocabulary
    return base + adapters + activations + logits + PROCESS_GIB[device.kind] * GIB


def training_seconds(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceSpec) -> float:
    """Time in steps and evaluations.

    Per weight and token: 2 FLOP forward, 2 backward (a frozen weight needs no gradient of its own), and 2 to recompute. That is 6
    with recomputation, 4 without and 2 in an evaluation, instead of the usual 6 N of full training (arXiv 2001.08361, section 2.1).
    """
    fit, tokens = _micro_batch(config, work, shape, device)
    train_tokens = sum(w.train_tokens for w in work)
    eval_tokens = sum(w.eval_tokens for w in work)
    flop = shape.flop_parameters * ((6 if fit.checkpoint_activations else 4) * train_tokens + 2 * eval_tokens)
    if device.kind == "cpu":
        return SLOWER[shape.path or "own"] * flop / device.flops
    # At least one micro-batch per step, however few tokens it has.
    micro_batches = max(train_tokens / max(tokens, 1.0), max(w.steps for w in work))
    if fit.residency == "nf4":
        # Forward, backward and recomputation unpack every weight again for each micro-batch, whatever its size.
        flop += micro_batches * (3 if fit.checkpoint_activations else 2) * NF4_FLOP * shape.size.quantized_parameters
    forwards = 1.5 if fit.checkpoint_activations else 1.0
    replayed = _replays_graphs(config, shape, device, fit)
    launches = 0.0 if replayed else forwards * micro_batches * _launch_seconds(shape)
    arithmetic = SLOWER[shape.path or "own"] * flop / device.flops
    # Launches and arithmetic overlap, so the slower of both counts.
    return max(arithmetic, launches) + micro_batches * shape.size.layers * LAYER_SECONDS


def _launch_seconds(shape: ModelShape) -> float:
    """What the host takes for one micro-batch, forward and backward."""
    if shape.size.experts:
        return shape.size.layers * EXPERTS_LAUNCH_SECONDS
    return len(shape.size.linears) * LAUNCH_SECONDS


def slowdown(config: RunConfig, work: list[Workload], shape: ModelShape, device: DeviceSpec, gpus: int = 1) -> float:
    """How many times as long the shape's path takes as our own decoder would."""
    work = [share(run, gpus) for run in work]
    ours = training_seconds(config, work, replace(shape, path="own"), device)
    return training_seconds(config, work, shape, device) / ours if ours else 1.0


def _replays_graphs(config: RunConfig, shape: ModelShape, device: DeviceSpec, fit: Fit) -> bool:
    """Whether the trainer will replay CUDA graphs, as `train.nn.backends` decides; our own decoder alone can be replayed.

    Nor can experts: how many tokens each of them gets is known only when the router has chosen.
    """
    if shape.path not in (None, "own") or shape.size.experts:
        return False
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
