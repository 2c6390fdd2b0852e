"""Decoder and tokenizer by transformers' own loaders.

`check_files` looks at a model on the meta device: names and shapes. That takes a second and no memory, so it is done before anything is
submitted. The job loads the same files, so the result holds for it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from train.config import ModelConfig
from train.errors import BadInput, LorapackError
from train.model.modalities import auto_class, shallow_towers

# Named explicitly, since transformers might choose other kernels; `train.nn.packed_model` exchanges it. Every model has the first, and
# not all the second, which is faster: Gemma 2 has none with its soft cap.
REFERENCE_ATTENTION = "eager"
PLAIN_ATTENTION = "sdpa"
CHOOSE_ANOTHER = "choose another model"
# Characters: some messages of transformers list everything that it knows.
LONGEST_REASON = 300


def load_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        BadInput: its files are damaged or of a kind that transformers does not know.
    """
    with foreign_errors(f"the tokenizer in {folder}", "save the tokenizer there again"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code
        )
    return tokenizer


def plain_attention(config: PretrainedConfig) -> str:
    """`PLAIN_ATTENTION` where transformers has it for the architecture, as it would choose itself, else its reference code.

    Chosen when a model is made: Falcon's layers are of another class for each, and differ in what they compute.
    """
    # Code of the repository's own is in no table.
    known = auto_class(config)._model_mapping.get(type(config), None)
    return PLAIN_ATTENTION if getattr(known, "_supports_sdpa", True) else REFERENCE_ATTENTION


def load_decoder(folder: Path, model: ModelConfig, **how: Any) -> PreTrainedModel:
    """The model in `folder`, with all of its weights; `how` is for transformers (dtype, device_map).

    Raises:
        BadInput: weights are missing or of other shapes, which transformers would fill with random numbers.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    loaded, info = auto_class(config).from_pretrained(
        folder,
        config=shallow_towers(config),
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,
        attn_implementation=plain_attention(config),
        # Reported below, in one sentence.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **how,
    )
    decoder: PreTrainedModel = loaded
    if info["missing_keys"]:
        raise BadInput(
            f"the weights in {folder} are incomplete: {_some(sorted(info['missing_keys']))} of the architecture "
            f"{_kind(decoder)} cannot be found; save or fetch the model again."
        )
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise BadInput(
            f"the weights in {folder} do not belong to its config.json: {name} has the shape {tuple(stored)} instead of "
            f"{tuple(expected)}; save or fetch the model again."
        )
    return decoder


def stock_skeleton(folder: Path, model: ModelConfig) -> PreTrainedModel:
    """The model in `folder` on the meta device, as its users get it from transformers: names and shapes without weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        skeleton: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    return skeleton


def with_plain_attention(decoder: PreTrainedModel) -> PreTrainedModel:
    """A model that was made with other attention, with `plain_attention` where that can be exchanged."""
    # Raised by architectures that have reference code alone.
    with suppress(ValueError):
        decoder.set_attn_implementation(PLAIN_ATTENTION)
    return decoder


def check_files(folder: Path, model: ModelConfig) -> None:
    """Refuse a model whose files a job could not load, without loading its weights.

    Raises:
        BadInput: transformers cannot load it, or weights are missing or of other shapes.
    """
    with quiet(), foreign_errors(f"the model in {folder}", CHOOSE_ANOTHER):
        load_decoder(folder, model, dtype=torch.bfloat16, device_map="meta")


def _kind(decoder: PreTrainedModel) -> str:
    return repr(decoder.config.model_type)


@contextmanager
def foreign_errors(what: str, advice: str) -> Iterator[None]:
    """Translate whatever a loader raises: the types differ from library to library and from version to version.

    Raises:
        BadInput: `what` cannot be loaded, the loader's own reason, and what to do.
    """
    try:
        yield
    except LorapackError:
        raise
    except (Exception, RecursionError) as exc:
        sentence = " ".join(str(exc).split()).partition(". ")[0][:LONGEST_REASON] or type(exc).__name__
        version = f"transformers {transformers.__version__}"
        raise BadInput(f"{what} cannot be loaded by {version} ({sentence.rstrip('.')}); {advice}.") from exc


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no tables of weights: the error says once what is wrong."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
