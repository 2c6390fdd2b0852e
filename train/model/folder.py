"""An ordinary Hugging Face model folder: the files it must have, and whether its weights are whole.

Light on purpose: the launcher checks a model on the login node. A safetensors file starts with 8 bytes (the header's length,
little-endian) and a JSON header {name: {"dtype", "shape", "data_offsets"}}, so no weight is read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import BadInput
from train.store.storage import readable, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Any one of these is a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
# The format's own limit.
LONGEST_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 2**14


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that could not be trained on.

    Raises:
        BadInput: naming what is missing and what was looked for.
    """
    with readable(folder):
        _check_parts(folder)


def _check_parts(folder: Path) -> None:
    if not folder.is_dir():
        raise BadInput(f"model.source={str(folder)!r} is not a folder; give the folder that has the model's {CONFIG}.")
    if not (folder / CONFIG).is_file():
        raise BadInput(f"model folder {folder} has no {CONFIG}; give the folder of a Hugging Face model.")
    if "quantization_config" in model_config(folder):
        raise BadInput(
            f"model folder {folder} has weights that are quantized already; give the unquantized model, "
            "and quant=nf4 quantizes it while loading."
        )
    weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadInput(
            f"model folder {folder} has no tokenizer (looked for {', '.join(TOKENIZERS)}); save it there too."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, by name.

    Raises:
        BadInput: there are none, or one that the index names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise BadInput(
            f"model folder {folder} has no weights: looked for {WEIGHTS} and {WEIGHTS_INDEX}; pickled weights "
            "(*.bin, *.pt) are not read, since they can run code: save them with safe_serialization=True."
        )
    weight_map = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{folder / WEIGHTS_INDEX} has no weight_map of file names; fetch the model again.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadInput(f"model folder {folder} lacks {', '.join(missing)} of {WEIGHTS_INDEX}; fetch the model again.")
    return files


def check_weights(folder: Path) -> None:
    """Refuse weight files that are damaged, by their headers and sizes.

    Raises:
        BadInput: naming the file.
    """
    for file in weight_files(folder):
        _read_header(file)


def vocabulary(folder: Path) -> int | None:
    """How many tokens the model's ``config.json`` says that it has, None if it does not say.

    Raises:
        BadInput: it cannot be read, or is not a JSON object.
    """
    config = model_config(folder)
    text = config.get("text_config", config)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if type(size) is int else None


def layer_index(name: str) -> int | None:
    """The layer of a module by PEFT's rule, the first number between dots: model.layers.7.self_attn.q_proj -> 7."""
    match = LAYER_INDEX.match(name)
    return int(match["idx"]) if match else None


def weight_samples(file: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and the first bytes (`SAMPLE_BYTES`) of each of its tensors.

    Raises:
        BadInput: the file is damaged.
    """
    header = _read_header(file)
    yield json.dumps(header, sort_keys=True).encode()
    begins = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    # Offsets count from the end of the header: a header of 1,000 bytes puts the tensor at [0, 64] into bytes 1,008 to 1,072.
    with readable(file), file.open("rb") as stream:
        data_start = 8 + struct.unpack("<Q", stream.read(8))[0]
        for begin, end in begins:
            stream.seek(data_start + begin)
            yield stream.read(min(SAMPLE_BYTES, end - begin))


def _read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file whose size agrees with it."""
    with readable(file), file.open("rb") as stream:
        start = stream.read(8)
        # A file that is not safetensors starts with any number, so nothing longer than the format allows is read.
        length_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = stream.read(length_bytes) if 0 < length_bytes <= LONGEST_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
        raise BadInput(
            f"{file} is not a safetensors file (perhaps a Git LFS pointer?); fetch the model again."
        ) from exc
    if file.stat().st_size < 8 + length_bytes + end:
        raise BadInput(f"{file} is cut short: {file.stat().st_size} of {8 + length_bytes + end} bytes; fetch it again.")
    return header


def model_config(folder: Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        BadInput: it cannot be read, or is not a JSON object.
    """
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with readable(path):
            value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise BadInput(f"{path} is not valid JSON ({exc}); fetch the model again.") from exc
    if not isinstance(value, dict):
        raise BadInput(f"{path} must be a JSON object, not a {type(value).__name__}; fetch the model again.")
    return value


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into an existing folder.

    Raises:
        StorageError: the disk is full or read-only.
    """
    with storage_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
