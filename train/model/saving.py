"""Saving a model with its tokenizer as an ordinary folder, with a full disk told as one."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.storage import storage_errors


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into an existing folder.

    Raises:
        StorageError: the disk is full or read-only.
    """
    with storage_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
