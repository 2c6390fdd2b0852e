"""What `data.source` means: where its file lies, and the fingerprint that stands for its content. Light: the login node uses it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from train.config import DataConfig
from train.errors import BadInput
from train.model.source import DEFAULT_REVISION, HUB_ID, PATH_START, is_there
from train.store.storage import local_path, readable

TASKS = Path(__file__).parent.parent / "tasks"


BUILTIN_DATA = {"builtin:tasks": TASKS / "train.jsonl", "builtin:tasks/heldout": TASKS / "heldout.jsonl"}


DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def data_path(source: str) -> Path | None:
    """The absolute path of a local data file, or None for a hub id.

    Raises:
        BadInput: the file does not exist, or `source` is neither a file nor a hub id.
    """
    path = BUILTIN_DATA.get(source) or local_path(source)
    if is_there(path) and path.is_file():
        return _with_known_suffix(path)
    if path.is_dir():
        raise BadInput(f"data source {source!r} is a folder ({path}); give one file of {', '.join(DATA_SUFFIXES)}.")
    if source.startswith(PATH_START) or path.suffix.lower() in DATA_SUFFIXES:
        raise BadInput(
            f"data file {source!r} does not exist; looked at {path}. Correct data.source or data.eval_source."
        )
    if HUB_ID.fullmatch(source):
        return None
    raise BadInput(
        f"data source {source!r} is neither a file (looked at {path}), nor a hub id like org/name, "
        f"nor one of {', '.join(BUILTIN_DATA)}."
    )


def _with_known_suffix(path: Path) -> Path:
    """Refused here, before any cache is asked: its answer would depend on what was read earlier under another name."""
    if path.suffix.lower() not in DATA_SUFFIXES:
        raise BadInput(f"data file {path} ends with {path.suffix!r}; it has to be one of {', '.join(DATA_SUFFIXES)}.")
    return path


def data_fingerprint(data: DataConfig) -> str:
    """What stands for the data in a run's identity: the content of local files, a hub's id with revision and split.

    Raises:
        BadInput: see `data_path`.
    """
    sources = [data.source] if data.eval_source is None else [data.source, data.eval_source]
    return "+".join(_data_digest(source, data) for source in sources)


def _data_digest(source: str, data: DataConfig) -> str:
    path = data_path(source)
    if path is None:
        return f"hub:{source}@{data.revision or DEFAULT_REVISION}:{data.split}"
    with readable(path), path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
