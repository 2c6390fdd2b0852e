"""A base in 4 bits as tensors by name, and a model around them that never held its weights in full width.

The names are those under which transformers saves a model with `BitsAndBytesConfig`: for each linear layer of the decoder the packed
weight and bitsandbytes' own serialization of its `QuantState`, and everything else unchanged. A stack of experts, which transformers
leaves in full width, is the parts of an `NF4Stack` behind the parameter's name: model.layers.0.mlp.experts.down_proj.nf4.packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from train.config import ModelConfig
from train.model.experts import ExpertStack
from train.model.loading import load_decoder, plain_attention
from train.model.modalities import auto_class, shallow_towers
from train.model.nf4 import NF4Stack, state_from

# Between the name of a stack of experts and that of one of its parts.
STACK = ".nf4."


class QuantizedBase:
    """The tensors of a quantized base; each is moved to `device` when it is read.

    Args:
        names: of all tensors.
        read: returns the tensor of a name.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor], device: torch.device) -> None:
        self._read = read
        self._device = device
        self._parts: dict[str, list[str]] = {}
        names = list(names)
        for name in names:
            # model.layers.0.mlp.up_proj.weight.absmax is the part "absmax" of up_proj, whose packed weight is …up_proj.weight.
            layer, weight, part = name.partition(".weight.")
            if weight and STACK not in name:
                self._parts.setdefault(layer, []).append(part)
        in_four_bits = {f"{layer}.weight" for layer in self._parts} | {name for name in names if STACK in name}
        self.others = [name for name in names if ".weight." not in name and name not in in_four_bits]

    def linear(self, name: str) -> tuple[torch.Tensor, Any]:
        """The packed weight of a linear layer and its `QuantState`, as `quantize` gave them."""
        parts = {part: self.tensor(f"{name}.weight.{part}") for part in self._parts[name]}
        return self.tensor(f"{name}.weight"), state_from(parts, self._device)

    def stack(self, name: str, like: ExpertStack) -> NF4Stack:
        """The experts of a parameter, as `quantize_stack` gave them; `like` is the parameter without its values."""
        _, rows, columns = like.matrices.shape
        parts = {part: self.tensor(f"{name}{STACK}{part}") for part in NF4Stack.PARTS}
        return NF4Stack((rows, columns), like.weight.dtype, **parts)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its own name; `others` are those that belong to no layer in 4 bits, as ``state_dict`` names them."""
        return self._read(name).to(self._device)


def load_model(model_dir: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The unquantized model; on a GPU its weights go there straight from their files."""
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    return load_decoder(model_dir, model, dtype=dtype, **placed)


def hollow_model(model_dir: Path, model: ModelConfig, dtype: torch.dtype, base: QuantizedBase) -> PreTrainedModel:
    """The model around `base`: complete but for the weights of its `frozen_linears` and `expert_stacks`, on device ``meta``."""
    config = shallow_towers(AutoConfig.from_pretrained(model_dir, trust_remote_code=model.trust_remote_code))
    with init_empty_weights(include_buffers=False):
        hollow: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code, attn_implementation=plain_attention(config)
        )
    for name in base.others:
        owner, _, attribute = name.rpartition(".")
        module = hollow.get_submodule(owner)
        value = base.tensor(name)
        # Buffers have to stay buffers.
        is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
        setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    hollow.tie_weights()
    return hollow.eval()
