"""Saving a model with its tokenizer as an ordinary folder, with a full disk told as one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.storage import storage_errors

OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into an existing folder.

    Raises:
        StorageError: the disk is full or read-only.
    """
    with told_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def told_errors(path: Path) -> Iterator[None]:
    """`storage_errors` for safetensors and tokenizers, which give the system's error as text, in types of their own.

    Raises:
        StorageError: see `storage_errors`.
    """
    with storage_errors(path):
        try:
            yield
        except Exception as exc:
            told = OS_ERROR.search(str(exc))
            if told is None:
                raise
            raise OSError(int(told[1]), str(exc)) from exc
