"""Which modules are adapted, with what rank and scaling: PEFT's rules, without PEFT.

Light on purpose: the launcher checks targets and counts parameters on the login node. The rules are those of PEFT 0.21's
`check_target_module_exists` and `get_pattern_key`; `tests/train/test_targets.py` compares them with PEFT itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from train.config import LoraConfig
from train.errors import BadInput
from train.model.folder import layer_index

ALL_LINEAR = "all-linear"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Target:
    """One module's adapter: it adds `scaling` * B A x, where A has `r` rows."""

    r: int
    alpha: float
    scaling: float


def adapted_modules(lora: LoraConfig, linear_names: Sequence[str]) -> dict[str, Target]:
    """The modules among `linear_names` (full names, in their order) that `lora` adapts.

    Raises:
        BadInput: nothing is adapted, or a target, layer or pattern is not in the model.
    """
    _refuse_unknown_targets(lora, linear_names)
    _refuse_unknown_layers(lora, linear_names)
    names = [name for name in linear_names if _is_adapted(lora, name)]
    if not names:
        raise BadInput(
            f"lora.target_modules={lora.target_modules!r} adapts nothing; a text has to match a module's whole name, like "
            f"'.*\\.q_proj'; a list names modules by their last part, of {_kinds(linear_names)}."
        )
    _refuse_idle_patterns("lora.rank_pattern", lora.rank_pattern, names)
    _refuse_idle_patterns("lora.alpha_pattern", lora.alpha_pattern, names)
    return {name: _target(lora, name) for name in names}


def trainable_parameters(lora: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Numbers that `lora` trains over modules of these (out, in) features: A [r, in] and B [out, r] of each.

    Raises:
        BadInput: see `adapted_modules`.
    """
    return sum(target.r * sum(shapes[name]) for name, target in adapted_modules(lora, list(shapes)).items())


def parameter_line(trainable: int, base_total: int) -> str:
    """What PEFT's `print_trainable_parameters` prints for an adapter over a base of `base_total` parameters."""
    total = base_total + trainable
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def _is_adapted(lora: LoraConfig, name: str) -> bool:
    """PEFT's `check_target_module_exists`: a module named in full is adapted whatever layer it is in."""
    if isinstance(lora.target_modules, str):
        return _is_all_linear(lora) or re.fullmatch(lora.target_modules, name) is not None
    # A list names modules in full, or by their end: "q_proj" is the end of model.layers.0.self_attn.q_proj.
    if name in lora.target_modules:
        return True
    in_layer = lora.layers_to_transform is None or layer_index(name) in lora.layers_to_transform
    return in_layer and any(name.endswith(f".{target}") for target in lora.target_modules)


def _is_all_linear(lora: LoraConfig) -> bool:
    return isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR


def _target(lora: LoraConfig, name: str) -> Target:
    r = _by_pattern(lora.rank_pattern, name, lora.r)
    alpha = _by_pattern(lora.alpha_pattern, name, lora.lora_alpha)
    # LoRA scales by alpha / r, rsLoRA by alpha / sqrt(r) (arXiv 2312.03732).
    return Target(r, alpha, alpha / math.sqrt(r) if lora.use_rslora else alpha / r)


def _by_pattern(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """PEFT's `get_pattern_key`: the first pattern that fits the name's end counts."""
    return next((value for pattern, value in patterns.items() if _fits(pattern, name)), default)


def _fits(pattern: str, name: str) -> bool:
    # "q_proj" and "layers.0.self_attn.q_proj" match model.layers.0.self_attn.q_proj; "proj" does not, since a part is whole.
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _refuse_unknown_targets(lora: LoraConfig, linear_names: Sequence[str]) -> None:
    if isinstance(lora.target_modules, str):
        return _refuse_bad_regex(lora.target_modules, linear_names)
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear_names):
            raise BadInput(
                f"lora.target_modules names {target!r}, which is not a linear layer of the model that can be adapted; "
                f"it has {_kinds(linear_names)}."
            )
    return None


def _refuse_bad_regex(pattern: str, linear_names: Sequence[str]) -> None:
    try:
        re.compile(pattern)
    except re.error as exc:
        raise BadInput(
            f"lora.target_modules={pattern!r} is not a valid regular expression ({exc}); give one, or a list of {_kinds(linear_names)}."
        ) from exc


def _refuse_unknown_layers(lora: LoraConfig, linear_names: Sequence[str]) -> None:
    if lora.layers_to_transform is None:
        return
    if isinstance(lora.target_modules, str):
        raise BadInput(
            f"lora.layers_to_transform={lora.layers_to_transform} needs lora.target_modules as a list, as in PEFT; "
            f"it is {lora.target_modules!r}: name the modules, of {_kinds(linear_names)}."
        )
    layers = {index for name in linear_names if (index := layer_index(name)) is not None}
    beyond = sorted(set(lora.layers_to_transform) - layers)
    if beyond:
        has = f"layers {min(layers)} to {max(layers)}" if layers else "no numbered layers"
        raise BadInput(f"lora.layers_to_transform names {beyond}, which the model does not have; it has {has}.")


def _refuse_idle_patterns(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_fits(pattern, name) for name in names):
            raise BadInput(f"{key} has {pattern!r}, which fits no adapted module; adapted are {_kinds(names)}.")


def _kinds(names: Sequence[str]) -> str:
    """The last parts of module names, each once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
