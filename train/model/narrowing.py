"""Configurations with smaller sizes that still fit together, and with fewer words and experts.

32 heads of 128 features with 8 key-value heads and 4,096 hidden features, divided by 4 (heads) and 8 (features of a head), are 8
heads of 16 with 2 key-value heads and 128 hidden features: whatever is heads * features stays so.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from train.model.layer_kinds import set_key, text_config

# Of a small copy.
VOCABULARY = 512
FEW_HEADS = 4
HEAD_FEATURES = 16
# Shorter than the judge's sequences, so that they reach beyond windows and chunks.
WINDOW = 6
CHUNK = 16
# Of a cut copy.
CUT_VOCABULARY = 1024
CUT_EXPERTS = 16

# What a number of a configuration means, by the names that transformers' configurations use.
HEAD_DIM = re.compile(r"head_dim|d_head|head_size|^rotary_dim$")
HEADS = re.compile(r"heads?$|^(mamba_)?n_groups$")
WIDTH = re.compile(
    r"hidden_size|intermediate|ffn|inner|n_embd|d_model|d_ssm|dense_size|embed|rank$|width$|(?<!head)_dim(_out)?$|^ffn_dim$"
)
NO_WIDTH = re.compile(r"position|^max_|num_|layers|multiple|token|norm")
EXPERTS = re.compile(r"^(n|num|moe_num)(_(local|routed))?_experts$")
PER_TOKEN = re.compile(r"experts?_per_tok(en)?$|top_?k(_experts)?$|^moe_k$")
CHOSEN = re.compile(rf"{PER_TOKEN.pattern}|^n_group$")
WINDOWS = re.compile(r"sliding_window(_size)?$|attention_chunk_size$|^window_size$")
CHUNKS = re.compile(r"^(mamba_)?chunk_size$")
# Lists with a number per rotated pair of features.
PER_PAIR = re.compile(r"^(short|long)_factor$")


def divisors(text: Any) -> Iterator[tuple[int, int]]:
    """By what numbers of heads and features of a head are divided, the smallest copy first.

    A width is divided by both.
    """
    numbers = _numbers(text.to_dict())
    heads = [v for k, v in numbers if HEADS.search(k) and not HEAD_DIM.search(k) and v > 1] or [1]
    dims = [v for k, v in numbers if HEAD_DIM.search(k) and v >= HEAD_FEATURES]
    hidden, count = text.hidden_size, getattr(text, "num_attention_heads", None) or 1
    if not dims and isinstance(hidden, int) and isinstance(count, int) and hidden % count == 0:
        dims = [hidden // count]
    by_heads = [n for n in _divisors_of(math.gcd(*heads)) if min(heads) // n >= 2 and max(heads) // n >= FEW_HEADS]
    by_dims = [
        n
        for n in _divisors_of(math.gcd(*dims) if dims else 1)
        if min(dims, default=HEAD_FEATURES) // n >= HEAD_FEATURES
    ]
    by_dims = [n for n in by_dims if all(d // n % 2 == 0 for d in dims)]
    for features in [*reversed(by_dims), 1] if by_dims != [1] else [1]:
        for head in dict.fromkeys([max(by_heads, default=1), 1]):
            if isinstance(hidden, int) and hidden % (head * features) == 0:
                yield head, features
    yield 1, 1


def _divisors_of(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(key, value) for key, value in values.items() if type(value) is int and value > 0]


def narrowed(config: PretrainedConfig, heads: int, features: int) -> PretrainedConfig:
    """`config` with its sizes divided."""
    config = copy.deepcopy(config)
    text = text_config(config)
    numbers = dict(_numbers(vars(text)))
    # Every expert group, and more experts than a token chooses.
    chosen = max((value for key, value in numbers.items() if CHOSEN.search(key)), default=1)
    for key, value in numbers.items():
        new = _new_size(key, value, heads, features, chosen)
        if new != value:
            set_key(text, key, new)
    for key, value in list(vars(text).items()):
        if isinstance(value, (dict, list)):
            set_key(text, key, _fewer_pairs(value, features, heads * features, key))
        # Beyond the words that are left.
        elif key.endswith("token_id") and type(value) is int and value >= VOCABULARY:
            set_key(text, key, VOCABULARY - 1)
    return config


def _new_size(key: str, value: int, heads: int, features: int, chosen: int) -> int:
    """The size of a small copy for a number of the configuration."""
    if key.startswith("vocab_size"):
        return min(value, VOCABULARY)
    if WINDOWS.search(key):
        return min(value, WINDOW)
    if CHUNKS.search(key):
        return min(value, CHUNK)
    if EXPERTS.search(key):
        few = max(2 * chosen, 4)
        return next((n for n in _divisors_of(value) if n >= few), value)
    if HEAD_DIM.search(key):
        return value // features if value % features == 0 else value
    if HEADS.search(key):
        return value // heads if value % heads == 0 and value > 1 else value
    if WIDTH.search(key) and not NO_WIDTH.search(key) and value >= 4 * HEAD_FEATURES:
        return value // (heads * features) if value % (heads * features) == 0 else _rounded(value / (heads * features))
    return value


def _rounded(size: float) -> int:
    """The next multiple of 8."""
    return max(8, math.ceil(size / 8) * 8)


def _fewer_pairs(value: Any, features: int, width: int, key: str = "") -> Any:
    """Nested settings with lists of a number per rotated pair shortened, and per-layer widths divided."""
    if isinstance(value, dict):
        return {name: _fewer_pairs(inner, features, width, name) for name, inner in value.items()}
    if isinstance(value, list) and PER_PAIR.search(key):
        return value[: len(value) // features]
    if key == "mrope_section" and isinstance(value, list) and all(n % features == 0 for n in value):
        return [n // features for n in value]
    if isinstance(value, list) and WIDTH.search(key) and all(type(n) is int for n in value):
        return [_rounded(n / width) for n in value]
    return value


def with_fewer_rows(config: PretrainedConfig) -> PretrainedConfig:
    """`config` with the first words and experts."""
    config = copy.deepcopy(config)
    text = text_config(config)
    numbers = dict(_numbers(vars(text)))
    chosen = max((value for key, value in numbers.items() if CHOSEN.search(key)), default=1)
    for key, value in numbers.items():
        if key.startswith("vocab_size"):
            set_key(text, key, min(value, CUT_VOCABULARY))
        elif EXPERTS.search(key):
            few = max(2 * chosen, CUT_EXPERTS)
            set_key(text, key, next((n for n in _divisors_of(value) if n >= few), value))
        elif key.endswith("token_id") and value >= CUT_VOCABULARY:
            set_key(text, key, CUT_VOCABULARY - 1)
    return config


def chosen_experts(text: Mapping[str, Any]) -> int:
    """How many experts a token goes through."""
    return max((value for key, value in _numbers(text) if PER_TOKEN.search(key)), default=1)
