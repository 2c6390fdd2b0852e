"""What `model.source` and `data.source` mean: where their files lie, and fingerprints that stand for their content.

Light on purpose: the launcher resolves sources on the login node, without torch or a network.

    model.source                        data.source
    builtin:tiny                        builtin:tasks, builtin:tasks/heldout
    pypi:package==version               a .json, .jsonl, .csv or .parquet file
    a folder                            hub id org/name
    hub id org/name
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from train.config import ModelConfig
from train.errors import BadInput
from train.model.folder import (
    CONFIG,
    TOKENIZER_FILES,
    check_model_folder,
    weight_files,
    weight_samples,
)
from train.store.layout import CacheDir
from train.store.storage import local_path, readable

Kind = Literal["builtin", "pypi", "folder", "hub"]

TINY = "builtin:tiny"
# A new number when the built model changes.
TINY_VERSION = "builtin:tiny/1"
PYPI_SOURCE = re.compile(r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
PATH_START = ("/", ".", "~")
DEFAULT_REVISION = "main"


def source_kind(source: str) -> Kind:
    """Which kind of model source it is, by its form and by the folders that exist.

    Raises:
        BadInput: it is of no kind.
    """
    if source == TINY:
        return "builtin"
    if PYPI_SOURCE.fullmatch(source):
        return "pypi"
    if is_there(local_path(source)) or source.startswith(PATH_START):
        return "folder"
    if HUB_ID.fullmatch(source):
        return "hub"
    raise BadInput(
        f"model.source={source!r} is none of: an existing folder (looked at {local_path(source)}), a hub id like "
        f"org/name, a GGUF in a Python package like pypi:package==version, {TINY}."
    )


def is_there(path: Path) -> bool:
    """Whether something is at `path`.

    Raises:
        BadInput: the system does not let the user look.
    """
    with readable(path):
        return path.exists()


def model_key(model: ModelConfig) -> str:
    """The name of the model's folder in the cache; what is fetched with its own code lies apart."""
    kind = source_kind(model.source)
    if kind == "hub":
        code = "-code" if model.trust_remote_code else ""
        return f"hub-{model.source.replace('/', '--')}-{(model.revision or DEFAULT_REVISION).replace('/', '--')}{code}"
    name = TINY_VERSION if kind == "builtin" else model.source
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def staged_model(model: ModelConfig, cache: CacheDir) -> Path | None:
    """The model's ordinary folder, ready to load; None where it has to be fetched or made first.

    Raises:
        BadInput: the source is of no kind, or its local folder is not sound.
    """
    if source_kind(model.source) == "folder":
        folder = local_path(model.source)
        check_model_folder(folder)
        return folder
    folder = cache.model(model_key(model))
    return folder if folder.exists() else None


def model_fingerprint(model: ModelConfig) -> str:
    """What stands for the model in a run's identity: equal for equal weights and tokenizer, wherever they lie.

    Of a local folder the configuration and the tokenizer count whole, and of each weight file its name, its header and the
    first 16 KiB of every tensor: hashing 15 GB whole would cost the login node a minute at every command. Every tensor
    is looked at because a merged adapter leaves the embedding, where a file begins, as it was.

    Raises:
        BadInput: the source is of no kind, or a local folder lacks configuration, weights or tokenizer.
    """
    kind = source_kind(model.source)
    if kind == "builtin":
        return TINY_VERSION
    if kind == "pypi":
        return model.source
    if kind == "hub":
        return f"hub:{model.source}@{model.revision or DEFAULT_REVISION}"
    return f"sha256:{_folder_digest(local_path(model.source), with_code=model.trust_remote_code)}"


def _folder_digest(folder: Path, with_code: bool) -> str:
    check_model_folder(folder)
    digest = hashlib.sha256()
    code = sorted(file.name for file in folder.glob("*.py")) if with_code else []
    for name in (CONFIG, *TOKENIZER_FILES, *code):
        if (folder / name).is_file():
            with readable(folder / name):
                _add(digest, name, (folder / name).read_bytes())
    for file in weight_files(folder):
        for sample in weight_samples(file):
            _add(digest, file.name, sample)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, title: str, content: bytes) -> None:
    """Length before content, so that no two lists of parts give the same bytes."""
    digest.update(f"{title}: {len(content)}\n".encode())
    digest.update(content)
