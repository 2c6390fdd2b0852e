"""How the base and the micro-batches of a pack share a device's memory: these constants and byte formulas are kept here alone.

Light on purpose: the trainer chooses by them (`train.nn.backends`), and the launcher forecasts by the same
(`launcher.estimate.arithmetic`).

A choice depends on the device's size, the base and the longest sequence, never on what happens to be free or on how many runs the pack
has. So a job that resumes only some runs of a pack cuts the same micro-batches and repeats the same bits.

Llama-2-7B in bf16 (2 bytes per value): 32 layers, 4,096 hidden and 11,008 MLP features, 6.74e9 parameters, 6.48e9 of them in linear
layers. tests/train/test_sizing.py computes these numbers:

    base_bytes   resident  6.74e9 * 2                                                                  12.55 GiB
                 nf4       6.48e9 * (0.5 + 0.127 / 8) + 0.26e9 * 2                                      3.60 GiB
    kept_values  a layer   2 norms' inputs, q k v, attention's result, inputs of qkv and of gate/up: 8 * 4,096
                           gate, up, and the input of down: 3 * 11,008                                   65,792
                 32 layers                                                                            2,105,344
    token_bytes  kept      2 * (2,105,344 + 5 * 4,096 + 3 * 11,008)                                   4,317,696
                 recomputed  2 * (32 * 4,096 + 65,792 + 5 * 4,096 + 3 * 11,008)                         500,736

    GPU      nf4 or resident  half of the rest  kept: tokens  recomputed: tokens  choice (longest sequence 512)
    80 GiB   resident         33.7 GiB          8,386         72,316              kept, 8,386 tokens
    40 GiB   resident         13.7 GiB          3,413         29,429              recomputed, 5,120 tokens (40 * 128)
    15 GiB   nf4               5.7 GiB          1,417         12,222              recomputed, 1,920 tokens (15 * 128)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from train.config import QuantConfig, TrainConfig

Residency = Literal["nf4", "resident"]
DeviceKind = Literal["cpu", "cuda"]
# How a base is computed (`train.nn.packed_model`): by our decoder, by transformers' on flat tokens, or by transformers' on padded
# sequences; in the order of their speed.
ComputePath = Literal["own", "flat", "padded"]

# Of the device: what a base in full width may take.
RESIDENT_SHARE = 0.35
# Of what the base leaves free: what the activations of a micro-batch may take.
ACTIVATION_SHARE = 0.5
# Beyond this many tokens no device is faster.
LARGEST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Nor is a GPU with little memory, which is a slow one: a T4 is busy with 1,920 tokens.
GPU_TOKENS_PER_GIB = 128
# Of a micro-batch that is replayed as a CUDA graph; beyond it no GPU waits for its host.
LARGEST_GRAPH_TOKENS = 6144
# A micro-batch that keeps a GPU busy: below it, recomputing makes room for a larger one.
FULL_GPU_TOKENS = 4096

# Targets whose logits exist at once (`train.nn.loss`). Without its kernel these are copied in float32, so of large vocabularies fewer
# rows are: of 151,936 words 384, which take 334 MiB.
LOGIT_ROWS = 1024
COPIED_LOGITS = 2**26
LOGIT_ROWS_MULTIPLE = 64

# The layers that write to the residual stream, by Llama's names.
ATTENTION_OUTPUT = "o_proj"
MLP_OUTPUT = "down_proj"
# Values per token, of the hidden size and of the widest layer, that the backward of a layer or the loss holds in addition to what
# was kept.
BACKWARD_HIDDEN = 5
BACKWARD_WIDEST = 3
# Values per token, of all features inside of its experts (`BaseSize.expert_width`): the input of the activation, its result, and both
# gradients, of which gate and up count twice.
BACKWARD_EXPERT_WIDTHS = 6
# Of experts that are dequantized at once on a GPU.
EXPERTS_CHUNK_BYTES = 2**30

# NF4: 4 bits per weight, and one scale per 64 weights. A scale has 32 bits, or 0.127 bits per weight after double quantization
# (arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_QUANT_BYTES = 0.5 + 0.127 / 8


@dataclass(frozen=True)
class ExpertsSize:
    """The experts of a base by their numbers.

    Attributes:
        parameters: weights of all experts in all layers.
        count: of a layer.
        chosen: how many of them a token goes through.
    """

    parameters: int
    count: int
    chosen: int

    @property
    def used_parameters(self) -> int:
        """Weights that a token is multiplied with."""
        return self.parameters * self.chosen // self.count


@dataclass(frozen=True)
class Activations:
    """What a decoder keeps of every token for the backward, of all layers.

    Attributes:
        kept: values that are kept whatever learns.
        inputs: linear layers that read the same, by their full names, and how many values that is: kept, once, if one of them learns.
    """

    kept: int
    inputs: tuple[tuple[frozenset[str], int], ...]

    def values(self, adapted: Collection[str] | None = None) -> int:
        """Values per token where the layers `adapted` learn; all of them if None."""
        learns = None if adapted is None else frozenset(adapted)
        return self.kept + sum(width for names, width in self.inputs if learns is None or names & learns)


@dataclass(frozen=True)
class BaseSize:
    """A base model by its numbers; `linears` maps every linear layer of its decoder to (out, in) features.

    Without `activations` (`train.nn.kept`) the linear layers are taken for a Llama's.
    """

    layers: int
    hidden: int
    parameters: int
    linears: Mapping[str, tuple[int, int]]
    experts: ExpertsSize | None = None
    activations: Activations | None = None

    @cached_property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def quantized_parameters(self) -> int:
        """Weights that NF4 holds in 4 bit: of linear layers and experts."""
        return self.linear_parameters + (self.experts.parameters if self.experts else 0)

    @property
    def used_parameters(self) -> int:
        """Weights of linear layers and experts that a token is multiplied with."""
        return self.linear_parameters + (self.experts.used_parameters if self.experts else 0)

    @property
    def expert_width(self) -> int:
        """Features inside of the experts that a token goes through in a layer, all together: of Qwen3-30B-A3B 8 * 768."""
        # Three matrices [width, hidden] in each layer: gate, up and down.
        return self.experts.used_parameters // (3 * self.hidden * self.layers) if self.experts else 0

    @cached_property
    def widest(self) -> int:
        """Features of the widest linear layer, the MLP's."""
        return max((max(shape) for shape in self.linears.values()), default=self.hidden)

    @cached_property
    def _kept(self) -> dict[frozenset[str] | None, int]:
        return {}

    def kept_values(self, adapted: frozenset[str] | None = None) -> int:
        """`kept_values` of all layers, cached: a plan of a thousand runs asks thousands of times for a few sets of layers."""
        if adapted not in self._kept:
            self._kept[adapted] = kept_values(self, adapted)
        return self._kept[adapted]


@dataclass(frozen=True)
class Device:
    """A GPU, or a machine's memory, in use or not."""

    kind: DeviceKind
    memory_bytes: float


@dataclass(frozen=True)
class Fit:
    """The choices for one pack; `micro_batch_tokens` counts the tokens of all runs together.

    `graphs` says that CUDA graphs have room: their memory is their own, in addition to what eager micro-batches use.
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
        # Recomputing costs a third more time, so only where a micro-batch would otherwise be too small for the GPU or a sequence.
        kept_tokens = room / token_bytes(base, value_bytes, recomputed=False)
        recompute = device.kind == "cuda" and kept_tokens < max(longest, min(FULL_GPU_TOKENS, _useful_tokens(device)))
    per_token = token_bytes(base, value_bytes, recomputed=recompute)
    # A graph keeps its own activations, so there has to be room for another micro-batch of the largest captured size.
    graphs = device.kind == "cuda" and not recompute and room >= LARGEST_GRAPH_TOKENS * per_token
    if train.micro_batch_tokens != "auto":
        return Fit(residency, recompute, train.micro_batch_tokens, graphs)
    return Fit(residency, recompute, max(1, min(int(room / per_token), _useful_tokens(device))), graphs)


def _useful_tokens(device: Device) -> int:
    """The tokens of a micro-batch beyond which a device is not faster."""
    most = LARGEST_MICRO_BATCH_TOKENS[device.kind]
    return most if device.kind == "cpu" else min(most, int(device.memory_bytes / 2**30 * GPU_TOKENS_PER_GIB))


def base_bytes(base: BaseSize, quant: QuantConfig, residency: Residency, value_bytes: int) -> float:
    """The frozen weights; embeddings, norms and head are never quantized."""
    if residency == "resident":
        return base.parameters * value_bytes
    nf4 = NF4_DOUBLE_QUANT_BYTES if quant.bnb_4bit_use_double_quant else NF4_BYTES
    held = base.quantized_parameters * nf4 + (base.parameters - base.quantized_parameters) * value_bytes
    return held + dequantized_bytes(base, value_bytes)


def dequantized_bytes(base: BaseSize, value_bytes: int) -> float:
    """What `train.nn.experts` dequantizes at once: the larger of a layer's two stacks, gate and up, or a chunk of its experts."""
    if base.experts is None:
        return 0.0
    return min(EXPERTS_CHUNK_BYTES, value_bytes * base.experts.parameters * 2 / 3 / base.layers)


def logit_rows(vocabulary: int, *, copied: bool) -> int:
    """The targets whose logits exist at once; `copied` says that they are copied in float32."""
    if not copied:
        return LOGIT_ROWS
    rows = COPIED_LOGITS // vocabulary // LOGIT_ROWS_MULTIPLE * LOGIT_ROWS_MULTIPLE
    return max(LOGIT_ROWS_MULTIPLE, min(LOGIT_ROWS, rows))


def token_bytes(base: BaseSize, value_bytes: int, *, recomputed: bool, adapted: frozenset[str] | None = None) -> int:
    """The memory of a token while its gradient is computed: what was kept for the backward, and what the backward holds at once.

    Without `adapted` (full names of linear layers) every layer is assumed to learn, which takes the most.
    """
    kept = base.kept_values(adapted)
    if recomputed:
        # The inputs of all layers, and everything of the one layer that is recomputed at the moment.
        kept = base.layers * base.hidden + kept // base.layers
    held = BACKWARD_HIDDEN * base.hidden + BACKWARD_WIDEST * base.widest
    if base.experts:
        # A row for each expert that the token goes through: its gradients at both ends, and the activation's on the way.
        held = max(held, 2 * base.experts.chosen * base.hidden + BACKWARD_EXPERT_WIDTHS * base.expert_width)
    return value_bytes * (kept + held)


def kept_values(base: BaseSize, adapted: Collection[str] | None = None) -> int:
    """Values per token that `train.nn.decoder` keeps for the backward, of all layers.

    Per decoder layer: the inputs of its two norms and of its output projection (attention's own result), and the outputs of the other
    projections. A linear layer that learns also keeps its input, once where several read the same.
    """
    # Of experts the input of their activation: gate and up.
    experts = 2 * base.expert_width * base.layers
    return experts + (base.activations or _llama_activations(base)).values(adapted)


def _llama_activations(base: BaseSize) -> Activations:
    """By the names that Llama's linear layers have."""
    # By decoder layer and width: q, k and v of a layer share one entry, gate and up another.
    readers: dict[tuple[str, int], set[str]] = {}
    kept = 2 * base.hidden * base.layers
    for name, (out_features, in_features) in base.linears.items():
        block, _, part = name.rpartition(".")
        if part == ATTENTION_OUTPUT:
            kept += in_features
            continue
        # The outputs of `o_proj` and `down_proj` are added to the residual stream, and counted as the next norm's input.
        if part != MLP_OUTPUT:
            kept += out_features
        readers.setdefault((block, in_features), set()).add(name)
    return Activations(kept, tuple((frozenset(names), width) for (_, width), names in readers.items()))


def _residency(train: TrainConfig, quant: QuantConfig, dense_bytes: float, device: Device) -> Residency:
    """Full width where nothing is quantized or where it is small compared with the device, unless the user chose."""
    if not quant.load_in_4bit:
        return "resident"
    if train.residency != "auto":
        return train.residency
    return "resident" if dense_bytes <= RESIDENT_SHARE * device.memory_bytes else "nf4"
