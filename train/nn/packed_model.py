"""The frozen base model of a pack: loaded once, quantized once, run on flat tokens, with a place for adapters in every linear layer.

A Llama runs through our own decoder (`train.nn.decoder`). Every other decoder is transformers' own with three parts exchanged:
attention (`train.nn.attention`), linear layers (`train.nn.linear`) and RMSNorm (one fused call, in float64 too, where
transformers would round to float32).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train.config import ModelConfig, QuantConfig
from train.data.micro_batch import MicroBatch
from train.lora.parameters import PackedAdapters
from train.model.base_cache import BaseCache, WantedBase
from train.model.loading import refuse_unsupported
from train.model.nf4 import dequantize, quantize
from train.model.quantized import QuantizedBase, frozen_linears, hollow_model, load_model
from train.nn.attention import ATTENTION
from train.nn.backends import PLAIN, Kernels
from train.nn.decoder import llama_decoder
from train.nn.forward_context import ForwardContext
from train.nn.kv_cache import KeyValueCache
from train.nn.linear import DenseWeight, NF4Weight, PackedLinear
from train.nn.loss import Head
from train.sizing import Residency


class FusedRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) of the last dimension, in one call and in no less than the input's precision."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedModel:
    """A frozen decoder that runs packs.

    `shapes` gives (out, in) features of every linear layer that an adapter may sit on; no sequence has more than `longest` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: dict[str, PackedLinear],
        shapes: dict[str, tuple[int, int]],
        current: ForwardContext,
        longest: int,
    ) -> None:
        self.longest = longest
        self.model, self.linears, self.shapes, self.current = model, linears, shapes, current
        self.head = Head(model.get_output_embeddings().weight)
        self.dtype, self.device = self.head.dtype, self.head.device
        linear_parameters = sum(out_features * in_features for out_features, in_features in shapes.values())
        biases = sum(linear.bias.numel() for linear in linears.values() if linear.bias is not None)
        self.parameters = linear_parameters + biases + sum(parameter.numel() for parameter in model.parameters())
        self._decoder = llama_decoder(model, current)
        self._recomputes = False

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether the same shapes always run the same kernels without asking the host, so that a CUDA graph can repeat them."""
        return self.current.kernels.graphs and self._decoder is not None and not self._recomputes

    def members(self) -> set[tuple[int, ...]]:
        """The distinct groups of runs that adapt a layer."""
        return {linear.slot.members for linear in self.linears.values() if linear.slot is not None}

    def attach(self, adapters: PackedAdapters | None) -> None:
        """Put a pack's adapters in their places; None leaves the bare base."""
        for name, linear in self.linears.items():
            linear.slot = None if adapters is None else adapters.slots.get(name)

    def hidden_states(
        self, batch: MicroBatch, dropout_keys: torch.Tensor | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """The last hidden state [T, dim] of every token; `dropout_keys` [runs] turn dropout on, `cache` holds the tokens before."""
        self.current.begin(batch, dropout_keys, cache)
        if self._decoder is not None:
            return self._decoder(batch)
        output = self.model.base_model(batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def checkpoint_activations(self) -> None:
        """Keep only the decoder layers' inputs in the forward and compute the rest again in the backward (arXiv 1604.06174)."""
        self._recomputes = True
        if self._decoder is not None:
            self._decoder.checkpoint_activations()
            return
        for layer in self.model.base_model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def load_base(
    model_dir: Path,
    model: ModelConfig,
    quant: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
    residency: Residency,
    longest: int,
    bases: BaseCache,
    kernels: Kernels = PLAIN,
) -> PackedModel:
    """Load the model in `model_dir` for packs whose sequences have at most `longest` tokens; in 4 bits it comes from `bases`.

    Raises:
        BadInput: weights are missing, or the architecture computes something that the packed trainer would leave out.
    """
    if not quant.load_in_4bit:
        return pack_model(load_model(model_dir, model, dtype, device), quant, device, residency, longest, kernels)
    quantized = bases.open(WantedBase(model_dir, model, quant, dtype, device))
    hollow = hollow_model(model_dir, model, dtype, quantized)
    return pack_model(hollow, quant, device, residency, longest, kernels, quantized)


def pack_model(
    model: PreTrainedModel,
    quant: QuantConfig,
    device: torch.device,
    residency: Residency,
    longest: int,
    kernels: Kernels = PLAIN,
    quantized: QuantizedBase | None = None,
) -> PackedModel:
    """Freeze `model`, move it to `device` and put packed parts in its places.

    A `hollow_model` brings the weights of its linear layers in `quantized`.

    Raises:
        BadInput: see `load_base`.
    """
    refuse_unsupported(model, longest)
    model.requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    current = ForwardContext(kernels)
    linears: dict[str, PackedLinear] = {}
    shapes: dict[str, tuple[int, int]] = {}
    frozen = frozen_linears(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name in frozen:
            shapes[name] = (module.out_features, module.in_features)
            weight = _weight(name, module, quant, device, residency, quantized)
            linears[name] = PackedLinear(
                weight, None if module.bias is None else module.bias.detach().to(device), current
            )
            model.set_submodule(name, linears[name])
        elif fused := _fused_norm(module):
            model.set_submodule(name, fused)
        elif hasattr(module, "layer_idx") and re.search("attention|attn", type(module).__name__, re.IGNORECASE):
            module.current_batch = current
    model.to(device).eval()
    return PackedModel(model, linears, shapes, current, longest)


def _weight(
    name: str,
    linear: nn.Linear,
    quant: QuantConfig,
    device: torch.device,
    residency: Residency,
    quantized: QuantizedBase | None,
) -> DenseWeight | NF4Weight:
    """The frozen weight of one layer. A resident NF4 weight holds the quantized values in full width: same numbers, no unpacking."""
    if not quant.load_in_4bit:
        return DenseWeight(linear.weight.detach().to(device))
    packed, state = quantized.linear(name) if quantized else quantize(linear.weight.detach().to(device), quant)
    return NF4Weight(packed, state) if residency == "nf4" else DenseWeight(dequantize(packed, state))


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The fused form of an RMSNorm that computes exactly this, judged by its result on a random input; None for all else."""
    if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
        return None
    eps, weight = float(cast(Any, module).variance_epsilon), cast(torch.Tensor, module.weight).detach()
    random = torch.rand(weight.shape)
    probe = type(module)(len(weight), eps=eps).requires_grad_(False)
    cast(torch.Tensor, probe.weight).copy_(random)
    x = torch.randn(3, len(weight))
    same = torch.allclose(probe(x), FusedRMSNorm(random, eps)(x), atol=1e-5)
    return FusedRMSNorm(weight, eps) if same else None
