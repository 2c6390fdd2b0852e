"""The frozen base model of a pack: loaded once, quantized once, run on flat tokens, with a place for adapters in every linear layer.

It runs by one of three paths:

    own      our decoder (`train.nn.decoder`), with all kernels and CUDA graphs
    flat     transformers' decoder on flat tokens, with attention (`train.nn.attention`), linear layers (`train.nn.linear`) and RMSNorm
             exchanged (one fused call, in float64 too, where transformers would round to float32)
    padded   transformers' decoder on right-padded sequences, with linear layers exchanged
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from train.config import QuantConfig
from train.data.micro_batch import MicroBatch
from train.lora.parameters import PackedAdapters
from train.model.anatomy import text_decoder
from train.model.experts import ExpertStack
from train.model.linears import FrozenLinear, frozen_linears
from train.model.nf4 import dequantize, quantize, quantize_stack
from train.model.quantized import QuantizedBase
from train.nn.attention import ATTENTION
from train.nn.backends import EAGER, Kernels
from train.nn.decoder import OwnDecoder
from train.nn.description import DecoderDescription, Undescribable
from train.nn.expert_forms import exchange_experts
from train.nn.experts import DenseStack, Stack
from train.nn.forward_context import ForwardContext, KeyValueCache
from train.nn.head import model_head
from train.nn.linear import DenseWeight, NF4Weight, PackedLinear
from train.nn.reading import describe_model
from train.nn.transformers_decoder import Decoder, FlatDecoder, PaddedDecoder
from train.sizing import ComputePath, Residency


class FusedRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) of the last dimension, in one call and in no less than the input's precision."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class DeviceSetup:
    """How a base is kept and run on a device.

    Attributes:
        quant: whether its linear layers are quantized, and how.
        residency: whether a quantized weight stays in 4 bits (``nf4``) or its values are kept in full width (``resident``).
        longest: no sequence has more tokens.
    """

    quant: QuantConfig
    device: torch.device
    residency: Residency
    longest: int
    kernels: Kernels = EAGER


class PackedModel:
    """A frozen decoder that runs packs.

    Attributes:
        linears: every linear layer that an adapter may be added to, by name; `shapes` gives its (out, in) features.
        longest: no sequence has more tokens.
        path: how the decoder is computed; `attempts` is what each path tried gave when it was chosen (`train.nn.judge`).
        parameters: how many the base has, quantized ones included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: dict[str, PackedLinear],
        context: ForwardContext,
        longest: int,
        parameters: int,
        path: ComputePath | None = None,
        description: DecoderDescription | None = None,
    ) -> None:
        self.model = model
        self.linears = linears
        self.shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self.context = context
        self.longest = longest
        self.head = model_head(model)
        self.dtype = self.head.dtype
        self.device = self.head.device
        self.parameters = parameters
        self.path, self._decoder = _choose_path(model, context, longest, path, description)
        self.attempts: tuple[str, ...] = ()
        self._calls_modules = description is not None and description.calls_modules
        self._recomputes = False

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether the same shapes always launch the same kernels without asking the host, so that a CUDA graph can replay them."""
        replays = self.path == "own" and not self._recomputes and not self._calls_modules
        return self.context.kernels.cuda_graphs and replays

    @property
    def takes_cache(self) -> bool:
        """Whether `hidden_states` can go on from a cache: on padded sequences transformers' mixers keep their states to themselves."""
        return self.path != "padded"

    def members(self) -> set[tuple[int, ...]]:
        """The distinct groups of runs that adapt a layer."""
        return {linear.lora.members for linear in self.linears.values() if linear.lora is not None}

    def attach(self, adapters: PackedAdapters | None) -> None:
        """Attach a pack's adapters to the layers that they adapt; None leaves the bare base."""
        for name, linear in self.linears.items():
            linear.lora = None if adapters is None else adapters.stacks.get(name)

    def hidden_states(
        self, batch: MicroBatch, dropout_keys: torch.Tensor | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """The last hidden state [T, hidden] of every token; `dropout_keys` [runs] turn dropout on, `cache` holds earlier tokens."""
        self.context.set(batch, dropout_keys, cache)
        # Mamba's residual stream is float32 in every precision; heads take their own.
        return self._decoder(batch).to(self.dtype)

    def checkpoint_activations(self) -> None:
        """Keep only the decoder layers' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""
        self._recomputes = True
        self._decoder.checkpoint_activations()


def _choose_path(
    model: PreTrainedModel,
    context: ForwardContext,
    longest: int,
    path: ComputePath | None,
    description: DecoderDescription | None,
) -> tuple[ComputePath, Decoder]:
    """The decoder by `path`; without one ours, if there is a description for it, else transformers' on flat tokens."""
    if description is not None:
        return "own", OwnDecoder(description, model, context)
    if path == "padded":
        return path, PaddedDecoder(model, context)
    return "flat", FlatDecoder(model, context, longest)


def _describe(model: PreTrainedModel, path: ComputePath | None) -> DecoderDescription | None:
    """The description of a decoder; None if another path was chosen, or none was and it has no description.

    Raises:
        Undescribable: it has none, and our own path was chosen.
    """
    if path not in (None, "own"):
        return None
    try:
        return describe_model(model)
    except Undescribable:
        if path == "own":
            raise
        return None


def pack_model(
    model: PreTrainedModel,
    setup: DeviceSetup,
    quantized: QuantizedBase | None = None,
    path: ComputePath | None = None,
) -> PackedModel:
    """Freeze `model`, move it to its device, and exchange the parts that packs need exchanged.

    The linear weights of a `hollow_model` are in `quantized`. Without a `path`, ours if the architecture has a description, else
    transformers' on flat tokens; `train.nn.judge` tells whether a path computes what transformers does.

    Raises:
        Undescribable: `path` is ``own``, and the architecture has no description.
    """
    description = _describe(model, path)
    model.requires_grad_(False)
    if description is None and path != "padded":
        model.set_attn_implementation(ATTENTION)
    context = ForwardContext(setup.kernels)
    # Weights that are exchanged are not parameters of the model any more, so they are counted before. A tied head counts once.
    text = [*text_decoder(model).parameters(), *model.get_output_embeddings().parameters()]
    parameters = sum(parameter.numel() for parameter in set(text))
    linears: dict[str, PackedLinear] = {}
    frozen = frozen_linears(model)
    for name, module in list(model.named_modules()):
        if linear := frozen.get(name):
            weight = _frozen_weight(name, linear, setup, quantized)
            bias = None if linear.bias is None else linear.bias.to(setup.device)
            linears[name] = PackedLinear(weight, bias, linear.shape, context)
            model.set_submodule(name, linears[name])
        elif description is None and path != "padded" and (fused := _fused_norm(module)):
            model.set_submodule(name, fused)
    exchange_experts(model, context, partial(_held_stack, setup, quantized))
    model.to(setup.device).eval()
    return PackedModel(model, linears, context, setup.longest, parameters, path, description)


def _frozen_weight(
    name: str, linear: FrozenLinear, setup: DeviceSetup, quantized: QuantizedBase | None
) -> DenseWeight | NF4Weight:
    """The frozen weight of one layer. A resident NF4 weight holds the quantized values in full width: the same numbers, unpacked."""
    if not setup.quant.load_in_4bit:
        return DenseWeight(linear.weight.to(setup.device).contiguous())
    if quantized is None:
        packed, state = quantize(linear.weight.to(setup.device), setup.quant)
    else:
        packed, state = quantized.linear(name)
    return NF4Weight(packed, state) if setup.residency == "nf4" else DenseWeight(dequantize(packed, state))


def _held_stack(setup: DeviceSetup, quantized: QuantizedBase | None, name: str, stack: ExpertStack) -> Stack:
    """The experts of one parameter, as `_frozen_weight` holds a layer."""
    if not setup.quant.load_in_4bit:
        return DenseStack(stack.matrices.to(setup.device))
    held = quantized.stack(name, stack) if quantized else quantize_stack(stack.matrices.to(setup.device), setup.quant)
    return held if setup.residency == "nf4" else DenseStack(held.dense(slice(None)))


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The fused form of a module that computes just an RMSNorm, judged by its result on a random input; None for all others."""
    if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
        return None
    eps = float(cast(Any, module).variance_epsilon)
    weight = cast(torch.Tensor, module.weight).detach()
    # A module of the same class with random weights: one that adds 1 to its weight, as Gemma's, is found out too.
    random = torch.rand(weight.shape)
    probe = type(module)(len(weight), eps=eps).requires_grad_(False)
    cast(torch.Tensor, probe.weight).copy_(random)
    x = torch.randn(3, len(weight))
    same = torch.allclose(probe(x), FusedRMSNorm(random, eps)(x), atol=1e-5)
    return FusedRMSNorm(weight, eps) if same else None
