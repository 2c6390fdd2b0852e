"""Which form of experts a module computes, judged by its numbers, and its exchange.

Most of transformers' modules compute what `train.nn.experts` does, in one of a few forms: with a gate or without, with biases, with
weights from either side. A small copy of the module with random weights is compared with each. Whatever agrees with none keeps its own
forward: its stacks are then dequantized around it, and once more for the backward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train.model.experts import ExpertStack, expert_counts, expert_stacks
from train.nn.activations import ACTIVATIONS
from train.nn.experts import (
    POST_NORM,
    Activation,
    DenseStack,
    ExpertsForm,
    Gate,
    OwnGate,
    PackedExperts,
    SplitGate,
    Stack,
    mixture,
)
from train.nn.forward_context import ForwardContext

# Features of a probe, its tokens and its choices.
PROBE_HIDDEN, PROBE_WIDTH = 4, 6
PROBE_TOKENS, PROBE_CHOICES = 7, 2
# A probe is computed in float64; some activations go through float32.
PROBE_TOLERANCE = 1e-5

# Of a module's stack, by its full name.
Hold = Callable[[str, ExpertStack], Stack]


def exchange_experts(model: PreTrainedModel, context: ForwardContext, hold: Hold) -> None:
    """Exchange every module of stacked experts in `model`; `hold` gives a stack as it is held on the device."""
    stacks = expert_stacks(model)
    around: dict[str, list[tuple[ExpertStack, Stack]]] = {}
    for name in dict.fromkeys(stack_name.rpartition(".")[0] for stack_name in stacks):
        own = {n.rpartition(".")[2]: s for n, s in stacks.items() if n.rpartition(".")[0] == name}
        module = model.get_submodule(name)
        form = experts_form(module, own)
        held = {attribute: hold(f"{name}.{attribute}", stack) for attribute, stack in own.items()}
        if form is None:
            reader = _reader(model, name, own)
            around.setdefault(reader, []).extend((own[a], s) for a, s in held.items())
            continue
        for stack in own.values():
            stack.drop_weight()
        model.set_submodule(name, PackedExperts(module, form, held, context))
    for name, pairs in around.items():
        _give_stacks(model.get_submodule(name), pairs)


def _reader(model: nn.Module, name: str, stacks: Mapping[str, ExpertStack]) -> str:
    """The module in whose forward the stacks of module `name` are read: itself, or who counts experts above it.

    Where a parameter has the matrices of all experts below each other (DBRX), the modules above cut it up and pass parts on.
    """
    if all(stack.weight.dim() == 3 for stack in stacks.values()):
        return name
    parts = name.split(".")
    ways = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(way for way in ways if expert_counts(model.get_submodule(way)))


def _give_stacks(module: nn.Module, pairs: list[tuple[ExpertStack, Stack]]) -> None:
    """Give a module's own forward its stacks: for good where they are held in full width, else dequantized for each call."""
    if all(isinstance(held, DenseStack) for _, held in pairs):
        for stack, held in pairs:
            dense = held.dense(slice(None)).reshape(stack.weight.shape)
            setattr(stack.module, stack.attribute, nn.Parameter(dense, requires_grad=False))
        return
    forward = module.forward
    shapes = [stack.weight.shape for stack, _ in pairs]
    for stack, _ in pairs:
        # From now on a plain attribute: a parameter would be one of the model's.
        delattr(stack.module, stack.attribute)
        stack.drop_weight()

    def run(*args: Any, **kwargs: Any) -> Any:
        for (stack, held), shape in zip(pairs, shapes, strict=True):
            setattr(stack.module, stack.attribute, held.dense(slice(None)).reshape(shape))
        try:
            return forward(*args, **kwargs)
        finally:
            for stack, _ in pairs:
                stack.drop_weight()

    def run_again_for_backward(*args: Any, **kwargs: Any) -> Any:
        # Autograd would keep the dequantized weights of all layers until the backward.
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = run_again_for_backward


def experts_form(module: nn.Module, stacks: Mapping[str, ExpertStack]) -> ExpertsForm | None:
    """The form of `mixture` that a module of these stacks computes, None for none."""
    up = "gate_up_proj" if "gate_up_proj" in stacks else "up_proj"
    if stacks.keys() != {up, "down_proj"} or stacks[up].experts != stacks["down_proj"].experts:
        return None
    # Weights that no form knows.
    if module._parameters.keys() - {up, "down_proj", f"{up}_bias", "down_proj_bias"}:
        return None
    candidates = (ExpertsForm(up, transposed, gate) for transposed in (False, True) for gate in _gates(module))
    return next((form for form in candidates if _computes(module, stacks, form)), None)


def _gates(module: nn.Module) -> Iterator[Activation]:
    """What may stand between a module's products: first what has kernels, then its own code."""
    own: Gate | None = getattr(module, "_apply_gate", None)
    activation: Gate | None = getattr(module, "act_fn", None)
    yield from map(SplitGate, ACTIVATIONS)
    if own is not None:
        yield OwnGate(own)
    if activation is not None:
        yield OwnGate(partial(_gated, activation))
        yield OwnGate(activation)


def _gated(activation: Gate, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return activation(gate) * up


def _computes(module: nn.Module, stacks: Mapping[str, ExpertStack], form: ExpertsForm) -> bool:
    """Whether a small copy of `module` with random weights computes `form`."""
    widths = _widths(stacks, form)
    if widths is None:
        return False
    random = torch.Generator().manual_seed(0)
    experts = stacks["down_proj"].experts

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    shapes = {form.up: (widths, PROBE_HIDDEN), "down_proj": (PROBE_HIDDEN, PROBE_WIDTH)}
    probe = copy.copy(module)
    # Copies share their dictionaries, so the probe gets ones of its own.
    probe._parameters, probe._modules = dict(module._parameters), dict(module._modules)
    for name, (rows, columns) in shapes.items():
        matrices = normal(experts, columns, rows) if form.transposed else normal(experts, rows, columns)
        probe._parameters[name] = nn.Parameter(matrices, requires_grad=False)
        if probe._parameters.get(f"{name}_bias") is not None:
            probe._parameters[f"{name}_bias"] = nn.Parameter(normal(experts, rows), requires_grad=False)
    if hasattr(module, POST_NORM):
        probe._modules[POST_NORM] = nn.Tanh()
    x, router_weights = normal(PROBE_TOKENS, PROBE_HIDDEN), normal(PROBE_TOKENS, PROBE_CHOICES).abs()
    chosen = torch.rand(PROBE_TOKENS, experts, generator=random).topk(PROBE_CHOICES).indices
    held = {name: DenseStack(cast(torch.Tensor, probe._parameters[name])) for name in shapes}
    try:
        # The forward behind the choice of an implementation, where transformers put one around it.
        y = inspect.unwrap(type(module).forward)(probe, x, chosen, router_weights)
        ours = mixture(x, chosen, router_weights, form.weights(probe, held), grouped=False)
    # Whatever a module of another kind raises on such weights and inputs.
    except Exception:
        return False
    return isinstance(y, torch.Tensor) and y.shape == ours.shape and torch.allclose(y, ours, rtol=PROBE_TOLERANCE)


def _widths(stacks: Mapping[str, ExpertStack], form: ExpertsForm) -> int | None:
    """Features of `up` in a probe: those of `down`'s input, or twice as many with a gate; None if the stacks do not fit the form."""
    up, down = (tuple(stacks[name].matrices.shape[1:]) for name in (form.up, "down_proj"))
    if form.transposed:
        up, down = up[::-1], down[::-1]
    if up[1] != down[0]:
        return None
    return {1: PROBE_WIDTH, 2: 2 * PROBE_WIDTH}.get(up[0] // down[1]) if up[0] % down[1] == 0 else None
