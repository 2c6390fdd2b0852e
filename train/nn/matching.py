"""Judging by numbers: whether two tensors are the same, by which factor they differ, which norm made one from the other, and where
a model keeps a number.

What a trace recorded is compared in float64, where equal means equal but for the norms and rotations that transformers rounds to
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from train.nn.description import ONE, NormDescription, Scalar, Undescribable
from train.nn.functional import Norm, normalize
from train.nn.tracing import Call

# Relative.
TOLERANCE = 1e-5
# Of a norm's input, so small that eps counts: 1e-6 beside a mean square of 1e-6.
SMALL_INPUT = 1e-3
# What norms add to the mean square where their code has the number in it.
LARGEST_EPSILON = 1e-2
USUAL_EPSILONS = (1e-5, 1e-6, 0.0, torch.finfo(torch.float32).eps)
# Keys that a multiplier may be a root of, with the exponent.
ROOTS = (("hidden_size", 0.5), ("hidden_size", -0.5), ("head_dim", -0.5))


def near(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are equal but for rounding and dimensions of size 1."""
    if mine.numel() != theirs.numel():
        return False
    a, b = mine.reshape(-1), theirs.reshape(-1)
    return bool((a - b).norm() <= TOLERANCE * b.norm())


def ratio(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """c where a = c b."""
    if a.numel() != b.numel():
        return None
    factor = float((a.reshape(-1) @ b.reshape(-1)) / b.square().sum())
    return factor if near(a, factor * b) else None


def find_scalar(value: float, owners: list[tuple[str, Any]], hints: str) -> Scalar:
    """Where a number is kept: by an attribute of one of `owners`, those with one of the words `hints` in their names first.

    Raises:
        Undescribable: nowhere, and it is not 1 and no root of a width.
    """
    if is_close(value, 1.0):
        return ONE
    found = [
        Scalar(kept, name, attribute)
        for name, owner in owners
        for attribute, kept in numbers(owner).items()
        if is_close(kept, value)
    ]
    # Another number may be as large: 6 is a window in the configuration, and the queries of a key in the module.
    told = [scalar for scalar in found if any(hint in scalar.attribute for hint in hints.split())]
    if found:
        return (told or found)[0]
    for name, owner in owners:
        kept = numbers(owner)
        for attribute, exponent in ROOTS:
            if attribute in kept and is_close(kept[attribute] ** exponent, value):
                return Scalar(kept[attribute] ** exponent, name, attribute, exponent)
    raise Undescribable(f"the factor {value:.6g} is kept nowhere")


def is_close(a: float, b: float) -> bool:
    """Whether two numbers are equal but for rounding."""
    return abs(a - b) <= TOLERANCE * abs(b)


def numbers(owner: Any) -> dict[str, float]:
    """Attributes of a module or configuration that are one number; those in a dictionary as ``rope_parameters.factor``."""
    entries = dict(vars(owner))
    if isinstance(owner, nn.Module):
        entries |= dict(owner.named_buffers(recurse=False)) | dict(owner.named_parameters(recurse=False))
    for name, value in list(entries.items()):
        if isinstance(value, dict) and not name.startswith("_"):
            entries |= {f"{name}.{key}": inner for key, inner in value.items()}
    return {name: float(value) for name, value in entries.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_norm(call: Call, config: Any) -> NormDescription | None:
    """The formula of a module that normed its input; None if it is none of those that we know."""
    weight, bias = norm_parameters(call.module)
    if any(each is not None and each.shape[-1] != call.input.shape[-1] for each in (weight, bias)):
        return None
    try:
        small = call.module(call.input * SMALL_INPUT)
    # A module that takes more than one tensor is no norm; it may raise anything.
    except Exception:
        return None
    if not isinstance(small, torch.Tensor) or small.shape != call.input.shape:
        return None
    x, y, small = (_heads_last(each, weight) for each in (call.input, call.output, small))
    for centered, offset in product((False, True), (0.0, 1.0) if weight is not None else (0.0,)):
        for eps in _epsilons(call, config):
            norm = Norm(None if weight is None else weight + offset, eps.value, bias, centered)
            if near(normalize(x, norm), y) and near(normalize(x * SMALL_INPUT, norm), small):
                return NormDescription(call.name, eps, centered, offset)
    return None


def norm_parameters(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias [dim] of a norm, where it has them; [heads, dim] of a module with a list of norms, one per head (StableLM)."""
    lists = [list(child) for child in module.children() if isinstance(child, nn.ModuleList)]
    if len(lists) == 1 and lists[0]:
        weights, biases = zip(*(norm_parameters(each) for each in lists[0]), strict=True)
        return _stacked(weights), _stacked(biases)
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    return _detached(weight), _detached(bias)


def _stacked(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    tensors = [part for part in parts if part is not None and part.dim() == 1]
    return torch.stack(tensors) if len(tensors) == len(parts) else None


def _detached(parameter: Any) -> torch.Tensor | None:
    return parameter.detach() if isinstance(parameter, torch.Tensor) else None


def _heads_last(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """[1, heads, T, dim] as [1, T, heads, dim] where each head has its own weight."""
    is_apart = weight is not None and weight.dim() == 2 and x.dim() == 4 and x.shape[2] != len(weight)
    return x.transpose(1, 2) if is_apart else x


def _epsilons(call: Call, config: Any) -> Iterator[Scalar]:
    """Numbers that a norm may add to the mean square."""
    for owner, kept in ((call.name, numbers(call.module)), ("config", numbers(config))):
        yield from (Scalar(value, owner, name) for name, value in kept.items() if 0 < value < LARGEST_EPSILON)
    yield from (Scalar(value) for value in USUAL_EPSILONS)


def coefficients(y: torch.Tensor, *parts: torch.Tensor) -> list[float]:
    """The factors c with y = sum of c_i parts_i, by least squares.

    Raises:
        Undescribable: there are none.
    """
    if any(part.numel() != y.numel() for part in parts):
        raise Undescribable("a layer's branches have other widths than its output")
    matrix = torch.stack([part.reshape(-1) for part in parts], 1).double()
    factors = torch.linalg.lstsq(matrix, y.reshape(-1, 1).double()).solution
    if not near(matrix @ factors, y):
        raise Undescribable("a layer's output is not the sum of its input, attention and MLP")
    return [float(factor) for factor in factors]


def as_heads(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """A module's input or output as [T, heads, dim], as `like` is; None if it has another size."""
    if x.numel() != like.numel():
        return None
    x = x.squeeze(0)
    if x.dim() == 3 and x.shape[1] == len(like) and x.shape[0] != len(like):
        x = x.transpose(0, 1)
    return x.reshape(like.shape)
