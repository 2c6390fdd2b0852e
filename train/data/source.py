"""What `data.source` means: which file it is, what stands for its content in run ids, and the name of its tokens in the cache.

Light, without numpy: the launcher uses all of it on the login node.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from train.config import HOW_KEYS, DataConfig, ModelConfig
from train.data.row_files import READERS, reader_of
from train.errors import BadInput
from train.model.source import DEFAULT_REVISION, HUB_ID, PATH_START, is_there
from train.store.layout import CacheDir, TokensDir
from train.store.storage import local_path, read_json, readable

TASKS = Path(__file__).parent.parent / "tasks"
BUILTIN_DATA = {"builtin:tasks": TASKS / "train.jsonl", "builtin:tasks/heldout": TASKS / "heldout.jsonl"}

# Of the arrays in the cache and of the rendering. Raise it when either changes: then no run uses the tokens of an older version.
FORMAT_VERSION = 1

# Counts of rows and tokens, as `train.data.loading` writes them to ``facts.json`` in the cache.
TokenizedStats = dict[str, Any]


def data_path(source: str) -> Path | None:
    """The absolute path of a local data file, or None for a hub id.

    Raises:
        BadInput: the file does not exist, its suffix is unknown, or `source` is neither a file nor a hub id.
    """
    path = BUILTIN_DATA.get(source) or local_path(source)
    if is_there(path) and path.is_file():
        # Checked before any cache is looked up: otherwise the answer would depend on what was read earlier under another name.
        reader_of(path)
        return path
    if path.is_dir():
        raise BadInput(f"data source {source!r} is a folder ({path}); give one file of {', '.join(READERS)}.")
    if source.startswith(PATH_START) or path.suffix.lower() in READERS:
        raise BadInput(
            f"data file {source!r} does not exist; looked at {path}. Correct data.source or data.eval_source."
        )
    if HUB_ID.fullmatch(source):
        return None
    raise BadInput(
        f"data source {source!r} is neither a file (looked at {path}), nor a hub id like org/name, "
        f"nor one of {', '.join(BUILTIN_DATA)}."
    )


def data_fingerprint(data: DataConfig) -> str:
    """What stands for the data in a run's identity: the content of local files, a hub's id with revision and split.

    Raises:
        BadInput: see `data_path`.
    """
    sources = [data.source] if data.eval_source is None else [data.source, data.eval_source]
    return "+".join(_source_fingerprint(source, data) for source in sources)


def _source_fingerprint(source: str, data: DataConfig) -> str:
    path = data_path(source)
    if path is None:
        return f"hub:{source}@{data.revision or DEFAULT_REVISION}:{data.split}"
    with readable(path), path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


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


def read_dataset_stats(data: DataConfig, model: ModelConfig, cache: CacheDir) -> TokenizedStats | None:
    """The stats of data that is already tokenized, None if it is not."""
    stats: TokenizedStats | None = read_json(TokensDir(cache.tokens(tokens_key(data, model))).stats)
    return stats
