"""An ordinary Hugging Face model folder: the files it must have, and the tensors' shapes in the headers of its weights.

Light on purpose: the launcher checks a model on the login node. A safetensors file starts with 8 bytes (the header's length,
little-endian) and a JSON header {name: {"dtype", "shape", "data_offsets"}}, so no weight is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import BadInput
from train.sizing import ExpertsSize
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
# Experts and router of a mixture of experts: transformers has them as bare parameters, which cannot be adapted.
MIXTURE = re.compile(r"\.experts\.|\.(gate|router)\.weight$")
# Keys of `config.json`: how many experts a layer has, and how many a token goes through.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
)
# The format's own limit.
LONGEST_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 2**14

# Sizes of a decoder, and the keys under which `config.json` of one architecture or another has them.
DECODER_SIZES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "vocab_size": ("vocab_size",),
}
# The text decoder of a model that also sees or hears, as transformers names it, and in older files as
# language_model.model.layers.0: there the module is model.language_model.layers.0.
TEXT_PART = re.compile(r"(^|\.)language_model\.|^lm_head\.")
OLD_TEXT_PART = re.compile(r"^language_model\.(model\.)?")
EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|embeddings?)\.weight$")

Shape = tuple[int, ...]


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


def linear_shapes(model_dir: Path) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear layer of the decoder, layer by layer; no embedding, norm or head.

    Raises:
        BadInput: the weights are missing or damaged.
    """
    shapes = _text_shapes(model_dir)
    found = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and LAYER_INDEX.match(name) and not MIXTURE.search(name)
    }
    return dict(sorted(found.items(), key=lambda item: _by_layer(item[0])))


def experts_size(model_dir: Path) -> ExpertsSize | None:
    """The experts of a mixture, None for a dense model.

    Files keep an expert's matrix by itself (model.layers.0.mlp.experts.7.up_proj.weight) or all of a layer in one stack.

    Raises:
        BadInput: the weights are missing or damaged.
    """
    config = model_config(model_dir)
    # DBRX has a section for them.
    text = {**config, **config.get("text_config", {}), **config.get("ffn_config", {})}
    count = next((text[key] for key in EXPERTS if isinstance(text.get(key), int) and text[key] > 1), None)
    if count is None:
        return None
    matrices = [
        shape
        for name, shape in _text_shapes(model_dir).items()
        if LAYER_INDEX.match(name)
        and ((".experts." in name and len(shape) > 1) or (len(shape) == 3 and shape[0] == count and min(shape[1:]) > 1))
    ]
    # Biases of stacks [experts, features] are no stacks.
    parameters = sum(math.prod(shape) for shape in matrices if not (len(shape) == 2 and shape[0] == count))
    # Where the configuration does not say it, all of them count.
    chosen = next((text[key] for key in EXPERTS_CHOSEN if isinstance(text.get(key), int)), count)
    return ExpertsSize(parameters, count, min(chosen, count)) if parameters else None


def decoder_numbers(model_dir: Path) -> dict[str, int]:
    """The sizes of a decoder, by Llama's keys in ``config.json``; `intermediate_size` defaults to four times the hidden size.

    Raises:
        BadInput: one is missing or not a positive whole number.
    """
    text = _text_config(model_dir)
    found: dict[str, Any] = {
        size: next((text[key] for key in keys if text.get(key)), None) for size, keys in DECODER_SIZES.items()
    }
    # Sizes that are the defaults of their architecture need not be in the file, as Gemma 3's vocabulary.
    for size, rows_or_columns in zip(("vocab_size", "hidden_size"), _embedding_shape(model_dir, found), strict=True):
        found[size] = found[size] or rows_or_columns
    if not found["intermediate_size"] and isinstance(found["hidden_size"], int):
        found["intermediate_size"] = 4 * found["hidden_size"]
    wrong = [key for key in DECODER_SIZES if type(found[key]) is not int or found[key] < 1]
    if wrong:
        raise BadInput(
            f"{model_dir / CONFIG} has no proper {', '.join(wrong)}, which every decoder has; give such a model, or fetch it again."
        )
    return found


def _embedding_shape(model_dir: Path, found: dict[str, Any]) -> tuple[int | None, int | None]:
    """(vocabulary, features) of the embedding in the weights, where the configuration lacks one of them."""
    if found["vocab_size"] and found["hidden_size"]:
        return None, None
    shapes = [shape for name, shape in _text_shapes(model_dir).items() if EMBEDDING.search(name) and len(shape) == 2]
    return max(shapes, default=(None, None))


def _text_config(model_dir: Path) -> dict[str, Any]:
    """The settings of the text decoder: those of ``text_config`` where other parts have settings of their own."""
    config = model_config(model_dir)
    text = config.get("text_config", config)
    return text if isinstance(text, dict) else {}


def linear_modules(model_dir: Path) -> list[str]:
    """The names of `linear_shapes`."""
    return list(linear_shapes(model_dir))


def parameter_count(model_dir: Path) -> int:
    """All parameters of the text decoder; a head that is tied to the embedding counts once, buffers do not count.

    Raises:
        BadInput: the weights are missing or damaged.
    """
    shapes = _text_shapes(model_dir)
    if model_config(model_dir).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq"))


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


def _text_shapes(folder: Path) -> dict[str, Shape]:
    """The tensors of the text decoder and its head, by the names of today's modules."""
    shapes = _tensor_shapes(folder)
    if any("language_model." in name for name in shapes):
        shapes = {name: shape for name, shape in shapes.items() if TEXT_PART.search(name)}
    # language_model.lm_head.weight is lm_head.weight.
    return {
        OLD_TEXT_PART.sub("" if ".lm_head." in name else "model.language_model.", name): shape
        for name, shape in shapes.items()
    }


def _tensor_shapes(folder: Path) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for file in weight_files(folder):
        header = _read_header(file)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


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


def _by_layer(name: str) -> tuple[int, str]:
    index = layer_index(name)
    return (-1 if index is None else index, name)


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
