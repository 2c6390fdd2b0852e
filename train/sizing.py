"""How the base and the micro-batches of a pack share a device: the one owner of these constants and byte formulas.

Light on purpose: the trainer chooses by them (`train.memory`), and the launcher forecasts by the very same
(`launcher.estimate.arithmetic`).

A choice depends on the device's size, the base and the longest sequence; never on what happens to be free, nor on how many runs
sit in the pack. So a job that resumes only some runs of a pack cuts the same micro-batches and repeats the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import QuantConfig, TrainConfig

Residency = Literal["nf4", "resident"]
DeviceKind = Literal["cpu", "cuda"]

RESIDENT_SHARE = 0.35  # of the device that a base in full width may take
ACTIVATION_SHARE = 0.5  # of what the base leaves free that activations of a micro-batch may take
LARGEST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # beyond this no device is faster
FULL_GPU_TOKENS = 4096  # a micro-batch that keeps a GPU busy: below it, recomputing makes room for a larger one

# NF4: 4 bit a weight, and an absmax per 64 weights: 32 bit, or 0.127 bit a weight after double quantisation (arXiv 2305.14314, 3).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_QUANT_BYTES = 0.5 + 0.127 / 8


@dataclass(frozen=True)
class BaseSize:
    """A base model by its numbers; `linear_parameters` are those of its `parameters` that NF4 quantises."""

    layers: int
    hidden: int
    intermediate: int
    parameters: int
    linear_parameters: int


@dataclass(frozen=True)
class Device:
    """A GPU or a machine's memory, whatever is in use of it."""

    kind: DeviceKind
    memory_bytes: float


@dataclass(frozen=True)
class Fit:
    """The choices for one pack; `micro_batch_tokens` counts the tokens of all runs together."""

    residency: Residency
    checkpoint_activations: bool
    micro_batch_tokens: int

    def __str__(self) -> str:
        kept = "recomputed" if self.checkpoint_activations else "kept"
        return f"base {self.residency}, activations {kept}, micro-batches of at most {self.micro_batch_tokens:,} tokens"


def choose_fit(
    train: TrainConfig, quant: QuantConfig, base: BaseSize, value_bytes: int, device: Device, longest: int
) -> Fit:
    """The choices for packs in a precision of `value_bytes` whose longest sequence has `longest` tokens."""
    residency = _residency(train, quant, base.parameters * value_bytes, device)
    room = ACTIVATION_SHARE * max(0.0, device.memory_bytes - base_bytes(base, quant, residency, value_bytes))
    recompute = train.gradient_checkpointing
    if recompute == "auto":
        kept_tokens = room / token_bytes(base, value_bytes, recomputed=False)
        recompute = device.kind == "cuda" and kept_tokens < max(longest, FULL_GPU_TOKENS)
    if train.micro_batch_tokens != "auto":
        return Fit(residency, recompute, train.micro_batch_tokens)
    tokens = int(room / token_bytes(base, value_bytes, recomputed=recompute))
    return Fit(residency, recompute, max(1, min(tokens, LARGEST_MICRO_BATCH_TOKENS[device.kind])))


def base_bytes(base: BaseSize, quant: QuantConfig, residency: Residency, value_bytes: int) -> float:
    """The frozen weights; embeddings, norms and head are never quantised."""
    if residency == "resident":
        return base.parameters * value_bytes
    nf4 = NF4_DOUBLE_QUANT_BYTES if quant.bnb_4bit_use_double_quant else NF4_BYTES
    return base.linear_parameters * nf4 + (base.parameters - base.linear_parameters) * value_bytes


def token_bytes(base: BaseSize, value_bytes: int, *, recomputed: bool) -> int:
    """What the backward needs of a token: 12 hidden-sized and 4 MLP-sized values a layer, or the layers' inputs and one layer."""
    layer = 12 * base.hidden + 4 * base.intermediate
    return value_bytes * (base.layers * base.hidden + layer if recomputed else base.layers * layer)


def _residency(train: TrainConfig, quant: QuantConfig, dense_bytes: float, device: Device) -> Residency:
    """Full width where nothing is quantised or where it is small beside the device, unless the user chose."""
    if not quant.load_in_4bit:
        return "resident"
    if train.residency != "auto":
        return train.residency
    return "resident" if dense_bytes <= RESIDENT_SHARE * device.memory_bytes else "nf4"
