"""Saving a model with its tokenizer as an ordinary folder, with a full disk told as one."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.rundir import storage_errors

OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into an existing folder.

    Raises:
        StorageError: the disk is full or read-only.
    """
    with storage_errors(folder):
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as exc:  # safetensors and tokenizers give the system's error as text, in types of their own
            told = OS_ERROR.search(str(exc))
            if told is None:
                raise
            raise OSError(int(told[1]), str(exc)) from exc
