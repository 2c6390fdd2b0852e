"""The base of a pack, opened on its device: loaded, judged with its own weights, and packed by the path that passed."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from train.config import QuantConfig
from train.errors import BadInput
from train.model.base_cache import BaseCache, BaseSpec
from train.model.copies import Reader, cut_model, small_model
from train.model.experts import expert_stacks
from train.model.facts import ModelFacts
from train.model.linears import frozen_linears
from train.model.nf4 import dequantize
from train.model.quantized import QuantizedBase, hollow_model, load_model
from train.model.reference_code import reference_code, take_reference_code
from train.nn.backends import EAGER, Kernels
from train.nn.judge import PATHS, Attempt, Verdict, judge
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.nn.probing import LONGEST
from train.sizing import ComputePath, Residency

# Of the device's free memory: what a copy in float64 may take; a larger one is computed on the CPU.
REFERENCE_SHARE = 0.25
UNQUANTIZED = QuantConfig(load_in_4bit=False)


def load_base(
    spec: BaseSpec,
    residency: Residency,
    longest: int,
    bases: BaseCache,
    kernels: Kernels = EAGER,
    facts: ModelFacts | None = None,
) -> PackedModel:
    """Load a base for packs whose sequences have at most `longest` tokens; a quantized one comes from the cache `bases`.

    What `facts` say of the architecture is not judged again; its own weights are.

    Raises:
        BadInput: weights are missing, or no path computes the architecture as transformers does.
    """
    setup = DeviceSetup(spec.quant, spec.device, residency, longest, kernels)
    if spec.device.type == "cpu":
        take_reference_code()
    quantized = None
    if spec.quant.load_in_4bit:
        quantized = bases.open(spec)
        model = hollow_model(spec.model_dir, spec.model, spec.dtype, quantized)
    else:
        model = load_model(spec.model_dir, spec.model, spec.dtype, spec.device)
    if facts is not None and facts.refusal is not None:
        raise BadInput(facts.refusal)
    first = None if facts is None else facts.path
    verdict = judge_loaded(model, weight_reader(model, quantized), spec.dtype, setup, first)
    if spec.device.type == "cuda":
        # The copies are gone, but their memory would stay with this process in pieces that fit no micro-batch.
        torch.cuda.empty_cache()
    base = pack_model(model, setup, quantized, verdict.checked(model.config.model_type))
    base.attempts = tuple(map(str, verdict.attempts))
    return base


def judge_architecture(full: PreTrainedModel) -> Verdict:
    """Judge a small float32 copy of an architecture on the CPU; `full` may be on ``meta``.

    Raises:
        BadInput: it cannot be made small.
    """
    setup = DeviceSetup(UNQUANTIZED, torch.device("cpu"), "resident", LONGEST)
    with reference_code():
        return judge(small_model(full), lambda copy, path: pack_model(copy, setup, path=path))


def judge_loaded(
    full: PreTrainedModel,
    read: Reader,
    dtype: torch.dtype,
    setup: DeviceSetup,
    first: ComputePath | None = None,
) -> Verdict:
    """Judge a model with its own weights, in its own precision and by the kernels of `setup`.

    In 16 bits rounding could hide a leak of a percent, and no probe is as long as a real model's windows. So only paths from `first` on
    are tried: the first that passed in float32 on a small copy, whose windows are short; it is judged now if it is not known.
    """
    failed: tuple[Attempt, ...] = ()
    if first is None:
        earlier = judge_architecture(full)
        if earlier.path is None:
            return earlier
        first, failed = earlier.path, earlier.attempts[:-1]
    paths = PATHS[PATHS.index(first) :]
    stock = cut_model(full, read, dtype, setup.device)
    as_is = replace(setup, quant=UNQUANTIZED, residency="resident")
    reference = _reference_device(stock)
    found = judge(stock, lambda copy, path: pack_model(copy, as_is, path=path), reference, paths, setup.longest)
    return Verdict(found.path, failed + found.attempts)


def _reference_device(stock: PreTrainedModel) -> torch.device:
    """Where the copy in float64 has room."""
    device: torch.device = stock.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 8 * stock.num_parameters() > REFERENCE_SHARE * free:
            return torch.device("cpu")
    return device


def weight_reader(model: PreTrainedModel, quantized: QuantizedBase | None) -> Reader:
    """Tensors of `model` by their names in its ``state_dict``, at least their first rows; those in 4 bits are dequantized."""
    state = model.state_dict(keep_vars=True)
    transposed = {f"{name}.weight" for name, linear in frozen_linears(model).items() if linear.transposed}
    stacks = expert_stacks(model)

    def read(name: str, rows: int) -> torch.Tensor:
        tensor: torch.Tensor = state[name]
        if tensor.device.type != "meta" or quantized is None:
            return tensor.detach()
        if name not in stacks:
            weight = dequantize(*quantized.linear(name.removesuffix(".weight")))
            return weight.t() if name in transposed else weight
        # A stack may be one matrix of all experts, one below the other.
        stack = stacks[name]
        experts = -(-rows * stack.experts // tensor.shape[0])
        dense = quantized.stack(name, stack).dense(slice(experts))
        return dense.reshape(-1, *tensor.shape[1:])

    return read
