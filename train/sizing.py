"""How the base and the micro-batches of a pack share a device: the one owner of these constants and byte formulas.

Light on purpose: the trainer chooses by them (`train.nn.backends`), and the launcher forecasts by the very same
(`launcher.estimate.arithmetic`).

A choice depends on the device's size, the base and the longest sequence; never on what happens to be free, nor on how many runs
sit in the pack. So a job that resumes only some runs of a pack cuts the same micro-batches and repeats the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from train.config import QuantConfig, TrainConfig

Residency = Literal["nf4", "resident"]
DeviceKind = Literal["cpu", "cuda"]

RESIDENT_SHARE = 0.35  # of the device that a base in full width may take
ACTIVATION_SHARE = 0.5  # of what the base leaves free that activations of a micro-batch may take
LARGEST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # beyond this no device is faster
GPU_TOKENS_PER_GIB = 128  # nor is a GPU with little memory, which is a slow one: a T4 is full with 1,920 tokens
LARGEST_GRAPH_TOKENS = 6144  # of a micro-batch that is replayed as a CUDA graph; beyond it no GPU waits for its host
FULL_GPU_TOKENS = 4096  # a micro-batch that keeps a GPU busy: below it, recomputing makes room for a larger one

ATTENTION_OUTPUT, MLP_OUTPUT = (
    "o_proj",
    "down_proj",
)  # the layers that write to the residual stream, as Llamas name them
BACKWARD_HIDDEN, BACKWARD_WIDEST = (
    5,
    3,
)  # values a token that the backward of a layer, or the loss, holds beside what was kept

# NF4: 4 bit a weight, and an absmax per 64 weights: 32 bit, or 0.127 bit a weight after double quantization (arXiv 2305.14314, 3).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_QUANT_BYTES = 0.5 + 0.127 / 8


@dataclass(frozen=True)
class BaseSize:
    """A base model by its numbers; `linears` maps every linear layer of its decoder to (out, in) features."""

    layers: int
    hidden: int
    parameters: int
    linears: Mapping[str, tuple[int, int]]

    @cached_property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers: those that NF4 holds in 4 bit."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def widest(self) -> int:
        """Features of the widest linear layer, the MLP's."""
        return max((max(shape) for shape in self.linears.values()), default=self.hidden)

    @cached_property
    def _kept(self) -> dict[frozenset[str] | None, int]:
        return {}

    def kept_values(self, adapted: frozenset[str] | None = None) -> int:
        """`kept_values` of all layers, looked up: a plan of a thousand runs asks thousands of times for a few sets of layers."""
        if adapted not in self._kept:
            self._kept[adapted] = kept_values(self, adapted)
        return self._kept[adapted]


@dataclass(frozen=True)
class Device:
    """A GPU or a machine's memory, whatever is in use of it."""

    kind: DeviceKind
    memory_bytes: float


@dataclass(frozen=True)
class Fit:
    """The choices for one pack; `micro_batch_tokens` counts the tokens of all runs together.

    `graphs` says that CUDA graphs have room: what they compute with is theirs, beside what everything else computes with.
    """

    residency: Residency
    checkpoint_activations: bool
    micro_batch_tokens: int
    graphs: bool

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
        recompute = device.kind == "cuda" and kept_tokens < max(longest, min(FULL_GPU_TOKENS, _useful_tokens(device)))
    per_token = token_bytes(base, value_bytes, recomputed=recompute)
    graphs = device.kind == "cuda" and not recompute and room >= LARGEST_GRAPH_TOKENS * per_token
    if train.micro_batch_tokens != "auto":
        return Fit(residency, recompute, train.micro_batch_tokens, graphs)
    return Fit(residency, recompute, max(1, min(int(room / per_token), _useful_tokens(device))), graphs)


def _useful_tokens(device: Device) -> int:
    """The tokens of a micro-batch beyond which a device is no faster."""
    most = LARGEST_MICRO_BATCH_TOKENS[device.kind]
    return most if device.kind == "cpu" else min(most, int(device.memory_bytes / 2**30 * GPU_TOKENS_PER_GIB))


def base_bytes(base: BaseSize, quant: QuantConfig, residency: Residency, value_bytes: int) -> float:
    """The frozen weights; embeddings, norms and head are never quantized."""
    if residency == "resident":
        return base.parameters * value_bytes
    nf4 = NF4_DOUBLE_QUANT_BYTES if quant.bnb_4bit_use_double_quant else NF4_BYTES
    return base.linear_parameters * nf4 + (base.parameters - base.linear_parameters) * value_bytes


def token_bytes(base: BaseSize, value_bytes: int, *, recomputed: bool, adapted: frozenset[str] | None = None) -> int:
    """What a token takes while its gradient is computed: what was kept for the backward, and what the backward holds at once.

    Without `adapted` (full names of linear layers) every layer is taken to learn, which takes the most.
    """
    kept = base.kept_values(adapted)
    if recomputed:  # the layers' inputs, and one layer
        kept = base.layers * base.hidden + kept // base.layers
    return value_bytes * (kept + BACKWARD_HIDDEN * base.hidden + BACKWARD_WIDEST * base.widest)


def kept_values(base: BaseSize, adapted: Collection[str] | None = None) -> int:
    """Values per token that `train.nn.decoder` keeps for the backward, of all layers.

    Of every layer the inputs of its two norms and of its output projection (attention's own result), and what the other
    projections put out; of layers that learn their input too, once where several read the same.
    """
    inputs: dict[tuple[str, int], int] = {}
    kept = 2 * base.hidden * base.layers
    for name, (out_features, in_features) in base.linears.items():
        block, _, part = name.rpartition(".")
        if part == ATTENTION_OUTPUT:
            kept += in_features
            continue
        if part != MLP_OUTPUT:  # what the two outputs add is the next norm's input
            kept += out_features
        if adapted is None or name in adapted:
            inputs[block, in_features] = in_features
    return kept + sum(inputs.values())


def _residency(train: TrainConfig, quant: QuantConfig, dense_bytes: float, device: Device) -> Residency:
    """Full width where nothing is quantized or where it is small beside the device, unless the user chose."""
    if not quant.load_in_4bit:
        return "resident"
    if train.residency != "auto":
        return train.residency
    return "resident" if dense_bytes <= RESIDENT_SHARE * device.memory_bytes else "nf4"
