"""Names that people read in folders, tables and charts, made from what is swept."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any

from train.data.row_files import READERS

# With '-' and the ten digits of a run id, a folder's name has at most 64 characters.
MAX_RUN_NAME = 53
MAX_SWEEP_NAME = 64

# How the papers and users abbreviate; the value of a key that maps to "" speaks for itself. Other keys keep their last part.
SHORT = {
    "lora.r": "r",
    "lora.lora_alpha": "a",
    "lora.lora_dropout": "d",
    "lora.target_modules": "",
    "train.learning_rate": "lr",
    "train.batch_size": "b",
    "train.max_steps": "steps",
    "train.num_train_epochs": "ep",
    "train.weight_decay": "wd",
    "train.seed": "s",
    "train.dtype": "",
    "train.lr_scheduler_type": "",
}


def run_name(axes: dict[str, Any]) -> str:
    """``r16-a32`` for the values of a run's axes; ``run`` where nothing is swept."""
    return fitting("-".join(_part(key, value) for key, value in axes.items()) or "run", MAX_RUN_NAME)


def sweep_name(sweep_file: str, axis_keys: list[str], models: set[str], data: set[str]) -> str:
    """``<sweep file>-<model>-<data>``; without a file the swept keys stand for it. A swept model or data set is left out."""
    label = sweep_file if sweep_file != "none" else "_".join(key.rpartition(".")[2] for key in axis_keys) or "single"
    parts = [label, *(name for names in (models, data) if len(names) == 1 for name in names)]
    return fitting("-".join(parts), MAX_SWEEP_NAME)


def source_name(source: str) -> str:
    """The last part of a path, hub id or ``kind:`` source, without a data file's suffix."""
    last = PurePosixPath(source).name.rpartition(":")[2]
    path = PurePosixPath(last)
    return fitting(path.stem if path.suffix in READERS else last, 32)


def fitting(name: str, limit: int) -> str:
    """`name` with other characters than a folder's replaced; a longer one is cut and ends in a digest of the whole."""
    # Letters without their accents: u for ü.
    letters = "".join(mark for mark in unicodedata.normalize("NFKD", name) if not unicodedata.combining(mark))
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip("-.") or "x"
    if len(clean) <= limit:
        return clean
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{clean[: limit - 7].rstrip('-.')}-{digest}"


def _part(key: str, value: Any) -> str:
    """One axis: a short key right before a number, set off by a dot before a word."""
    short = SHORT.get(key, key.rpartition(".")[2] if "." in key else "")
    text = _text(value)
    joint = "." if short and not text[:1].isdigit() else ""
    return f"{short}{joint}{text}"


def _text(value: Any) -> str:
    """A value in the characters of a folder's name."""
    if isinstance(value, list):
        return ".".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ".".join(f"{key}.{_text(item)}" for key, item in value.items())
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}".replace("e+", "e")
    return str(value)
