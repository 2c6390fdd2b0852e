"""The name of tokenized data in the cache, and what was counted there.

Light on purpose: the launcher reads the counts for its forecast, without numpy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from train.config import HOW_KEYS, DataConfig, ModelConfig
from train.store.layout import CacheDir, TokensDir
from train.store.storage import read_json

FORMAT_VERSION = 1  # of the arrays and of the rendering: raise it when either changes


def tokens_key(data: DataConfig, model: ModelConfig) -> str:
    """The name of the tokenized data in the cache: a hash of everything that decides the tokens.

    Raises:
        ValueError: the fingerprints are not resolved yet.
    """
    if data.fingerprint is None or model.fingerprint is None:
        raise ValueError("tokens have a key only once model.fingerprint and data.fingerprint are resolved")
    decisive = {
        "format_version": FORMAT_VERSION,
        "model": model.fingerprint,
        "data": data.model_dump(exclude=HOW_KEYS["data"]),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:20]


def read_facts(data: DataConfig, model: ModelConfig, cache: CacheDir) -> dict[str, Any] | None:
    """The facts of data that is tokenized already, None if it is not."""
    facts: dict[str, Any] | None = read_json(TokensDir(cache.tokens(tokens_key(data, model))).facts)
    return facts
