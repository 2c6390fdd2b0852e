"""Models with fewer layers of every kind, built from their configurations.

Two layers are of one kind if their modules have the same classes, shapes and settings, and the lists of the configuration that have an
entry per layer say the same of both. Gemma 3 with 26 layers (five with a window, one without, and so on) has two kinds.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from train.model.anatomy import decoder_layers
from train.model.modalities import auto_class, shallow_towers

# transformers' plain code for attention and experts, which every architecture has.
REFERENCE = "eager"
# Layers of a prefix that holds every kind; beyond it one layer of each kind is picked.
LONGEST_PREFIX = 16

# Settings with the numbers of some layers, and numbers of layers.
LISTED = re.compile(r"layers$|idxs?$|ids$|indices$")
COUNTED = re.compile(r"layers$|replace$")
# Settings of a module that only say where it stands.
PLACES = re.compile(r"idx|index|layer_id|training|layer_number")

Kind = tuple[Any, ...]


def build(
    config: PretrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = REFERENCE
) -> PreTrainedModel:
    """The model that `config` describes, with transformers' own initial weights, or with none on the device ``meta``."""
    config = shallow_towers(copy.deepcopy(config))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=True
        )
    # Reference code here too: grouped products of experts exist in no float64.
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(REFERENCE)
    return model.eval().requires_grad_(False)


def layer_kinds(model: PreTrainedModel, per_layer: list[str] | None = None) -> list[Kind]:
    """What each decoder layer is: equal for layers that compute the same with other weights.

    `per_layer` names the settings with an entry per layer, else those of that length.

    Raises:
        BadInput: no list of decoder layers is found.
    """
    layers = decoder_layers(model)
    text = text_config(model.config)
    keys = _per_layer_settings(text, len(layers)) if per_layer is None else per_layer
    return [(_modules_of(layer), tuple(repr(getattr(text, key)[i]) for key in keys)) for i, layer in enumerate(layers)]


def _per_layer_settings(text: Any, layers: int) -> list[str]:
    """The names of the settings that have an entry per layer."""
    return [key for key, value in vars(text).items() if _is_per_layer(key, value, layers)]


def _modules_of(layer: nn.Module) -> Kind:
    """Names, classes, shapes and settings of a layer's modules."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, value.shape) for key, value in module._parameters.items() if value is not None),
            tuple(sorted((k, repr(v)) for k, v in vars(module).items() if _is_setting(k, v))),
        )
        for name, module in layer.named_modules()
    )


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and isinstance(value, (bool, int, float, str)) and not PLACES.search(name)


def text_config(config: PretrainedConfig) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config(decoder=True)


def shortened(full: PreTrainedModel) -> tuple[PretrainedConfig, list[int]]:
    """The configuration with the fewest layers of every kind, and which layers of `full` they are.

    A prefix, if it is short, as it keeps the order of kinds; else the first layer of each kind. What is counted (the first three layers
    are dense, the last fifteen share their keys) is counted anew.
    """
    kinds = layer_kinds(full)
    count = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
    # Two at least, since one layer alone is followed by none.
    prefix = list(range(max(count, min(2, len(kinds)))))
    return first_alike(
        full.config, kinds, [prefix, one_of_each(kinds)] if count <= LONGEST_PREFIX else [one_of_each(kinds)]
    )


def one_of_each(kinds: list[Kind]) -> list[int]:
    """The first layer of each kind."""
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def first_alike(
    config: PretrainedConfig, kinds: list[Kind], selections: list[list[int]]
) -> tuple[PretrainedConfig, list[int]]:
    """The first selection of layers with a configuration that gives just these layers; all layers where none does."""
    per_layer = _per_layer_settings(text_config(config), len(kinds))
    for layers in selections:
        for counted in (None, "first", "last"):
            found = with_layers(config, layers, len(kinds), counted)
            try:
                if layer_kinds(build(found, "meta"), per_layer) == [kinds[i] for i in layers]:
                    return found, layers
            # A configuration that does not fit together raises whatever the model's code raises.
            except Exception:
                continue
    return config, list(range(len(kinds)))


def with_layers(
    config: PretrainedConfig, layers: list[int], total: int, counted: Literal["first", "last"] | None = None
) -> PretrainedConfig:
    """`config` with only some of its `total` layers; lists with an entry per layer are cut alike, and lists of layers too.

    `counted` says which layers other numbers of layers count (``first_k_dense_replace``, ``num_kv_shared_layers``): of layers 0, 5 and
    20 of 35 none is among the first 0, two are among the first 10, and one among the last 15.
    """
    config = copy.deepcopy(config)
    text = text_config(config)
    for key, value in list(vars(text).items()):
        if _lists_layers(key, value, total):
            set_key(text, key, [layers.index(i) for i in value if i in layers])
        elif _is_per_layer(key, value, total):
            set_key(
                text, key, [value[i] for i in layers] if isinstance(value, list) else "".join(value[i] for i in layers)
            )
        elif type(value) is int and 0 < value < total and COUNTED.search(key) and counted is not None:
            set_key(text, key, sum(i < value if counted == "first" else i >= total - value for i in layers))
    set_key(text, "num_hidden_layers", len(layers))
    return config


def _lists_layers(key: str, value: object, total: int) -> bool:
    """Whether a setting names layers by their numbers."""
    if not (isinstance(value, list) and LISTED.search(key) and all(type(i) is int for i in value)):
        return False
    return all(i < total for i in value) and value == sorted(set(value))


def _is_per_layer(key: str, value: object, total: int) -> bool:
    """Whether a setting has an entry per layer."""
    if not isinstance(value, list):
        return isinstance(value, str) and "pattern" in key and len(value) == total
    return len(value) == total and not _lists_layers(key, value, total)


def set_key(config: Any, key: str, value: Any) -> None:
    """Set a key that may be computed from others, which then has to be left alone."""
    try:
        setattr(config, key, value)
    except (AttributeError, NotImplementedError):
        return
