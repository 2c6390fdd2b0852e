"""From a model in full width to a base in 4 bits, a weight at a time.

`quantize_files` needs memory for the quantized base and the widest weight, not for the model in full width: each weight is quantized as
soon as transformers has read it, merged it with others (experts that files keep one by one) and put it in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, core_model_loading

from train.config import ModelConfig, QuantConfig
from train.model.experts import ExpertStack, expert_stacks
from train.model.linears import FrozenLinear, frozen_linears
from train.model.nf4 import quantize, quantize_stack
from train.model.quantized import STACK, load_model

# The function by which transformers puts a weight in its place, and the variable that makes it read one weight after the other:
# otherwise its threads would read ahead, as fast as the disk allows.
SETTER = "set_param_for_module"
SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


class Quantizer:
    """Quantizes the weights of a model as they come.

    Attributes:
        tensors: what a `QuantizedBase` reads, on the CPU, as far as it has come.
    """

    def __init__(self, quant: QuantConfig, device: torch.device, stop: Callable[[], None]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._quant = quant
        self._device = device
        self._stop = stop
        self._parts: dict[str, FrozenLinear | ExpertStack] | None = None

    def take(self, model: PreTrainedModel, name: str) -> None:
        """Quantize the parameter `name` of `model`, if it is one of those, and leave a stand-in without memory in its place."""
        if self._parts is None:
            self._parts = _quantizable(model)
        if name not in self._parts:
            return
        self._stop()
        self.tensors |= {f"{name}{part}": t for part, t in self._quantize(self._parts[name]).items()}
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, _StandIn(getattr(module, attribute), name))

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Quantize what is left of `model`, which loses those weights; `tensors`, and all others of the model."""
        for name, part in _quantizable(model).items():
            parameter = model.get_parameter(name)
            if not isinstance(parameter, _StandIn):
                self.take(model, name)
            # Two layers of one weight: transformers has put the stand-in of the first into the second.
            elif parameter.stands_for != name:
                first = parameter.stands_for
                copies = {n: t for n, t in self.tensors.items() if n == first or n.startswith(f"{first}.")}
                self.tensors |= {f"{name}{n.removeprefix(first)}": t.clone() for n, t in copies.items()}
            part.drop_weight()
        others = _distinct(model.state_dict(keep_vars=True))
        return self.tensors | {name: tensor.detach().cpu() for name, tensor in others}

    @torch.no_grad()
    def _quantize(self, part: FrozenLinear | ExpertStack) -> dict[str, torch.Tensor]:
        """The tensors of one weight by the ends of their names."""
        if isinstance(part, ExpertStack):
            stack = quantize_stack(part.matrices.to(self._device), self._quant)
            return {f"{STACK}{name}": tensor.cpu() for name, tensor in stack.tensors().items()}
        packed, state = quantize(part.weight.to(self._device), self._quant)
        return {"": packed.cpu()} | {f".{name}": t.cpu() for name, t in state.as_dict(packed=True).items()}


class _StandIn(nn.Parameter):
    """Of a quantized weight: its shape, with the memory of one number."""

    stands_for: str

    def __new__(cls, weight: torch.Tensor, name: str) -> _StandIn:
        number = torch.zeros((), dtype=weight.dtype, device=weight.device)
        made: _StandIn = super().__new__(cls, number.expand(weight.shape), requires_grad=False)
        made.stands_for = name
        # What transformers asks before it gives a weight that it has not found a random value.
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        return made

    def __init__(self, *_: Any) -> None:
        """All is done."""


def quantize_files(
    model_dir: Path,
    model: ModelConfig,
    quant: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """What a `QuantizedBase` reads, from the files of a model: on the CPU, quantized on `device` from values in `dtype`.

    `stop` is called between weights and may raise.

    Raises:
        BadInput: as `train.model.loading.load_decoder`.
    """
    quantizer = Quantizer(quant, device, stop)
    with _each_weight(quantizer.take):
        loaded = load_model(model_dir, model, dtype, torch.device("cpu"))
    return quantizer.finish(loaded)


@contextmanager
def _each_weight(take: Callable[[PreTrainedModel, str], None]) -> Iterator[None]:
    """Let transformers read weights one after the other, and give each to `take` once it is in its place.

    Its loader has no hook for that. A version that puts weights in their places otherwise only costs memory: `Quantizer.finish` takes
    what has not been taken.
    """
    place = getattr(core_model_loading, SETTER, None)
    before = os.environ.get(SEQUENTIAL)

    def place_and_take(model: PreTrainedModel, name: str, *others: Any, **options: Any) -> None:
        cast(Callable[..., None], place)(model, name, *others, **options)
        take(model, name)

    if place is not None:
        setattr(core_model_loading, SETTER, place_and_take)
    os.environ[SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if place is not None:
            setattr(core_model_loading, SETTER, place)
        os.environ.pop(SEQUENTIAL)
        if before is not None:
            os.environ[SEQUENTIAL] = before


def _quantizable(model: PreTrainedModel) -> dict[str, FrozenLinear | ExpertStack]:
    """The parameters that are quantized, by their names."""
    return {f"{name}.weight": linear for name, linear in frozen_linears(model).items()} | expert_stacks(model)


def _distinct(state: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    """Entries of a ``state_dict``, a tied tensor once, under its first name."""
    # Reversed, so that of several names of one tensor the first one is kept.
    return {id(tensor): (name, tensor) for name, tensor in reversed(state.items())}.values()
