"""Decoder and tokenizer by transformers' own loaders, and the refusal of models that the packed trainer would compute differently.

`check_decoder` looks at a model on the meta device: names, shapes and one forward without numbers. That takes a second and no
memory, so it is done before anything is submitted. The job loads the same files, so the result holds for it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from train.config import ModelConfig
from train.errors import BadInput, LorapackError
from train.model.architecture import CHOOSE_ANOTHER, HEAD_WITH_BIAS, refuse_by_config
from train.model.folder import linear_shapes
from train.model.modalities import auto_class, shallow_towers

# Named explicitly, since transformers might choose other kernels; `train.nn.packed_model` exchanges it. Every model has the first, and
# not all the second, which is faster: Gemma 2 has none with its soft cap.
REFERENCE_ATTENTION = "eager"
PLAIN_ATTENTION = "sdpa"
PROBE_ATTENTION = "lorapack_probe"
PROBE_TOKENS = 4
# Characters: some messages of transformers list everything that it knows.
LONGEST_REASON = 300


def load_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        BadInput: its files are damaged or of a kind that transformers does not know.
    """
    with _foreign_errors(f"the tokenizer in {folder}", "save the tokenizer there again"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code
        )
    return tokenizer


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
        attn_implementation=REFERENCE_ATTENTION,
        # Reported below, in one sentence.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **how,
    )
    decoder: PreTrainedModel = with_plain_attention(loaded)
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
    """The model with `PLAIN_ATTENTION` where it supports that, else as it is."""
    # Raised by architectures that have reference code alone.
    with suppress(ValueError):
        decoder.set_attn_implementation(PLAIN_ATTENTION)
    return decoder


def check_decoder(folder: Path, model: ModelConfig, longest: int) -> None:
    """Refuse a model that a job over sequences of at most `longest` tokens could not train, without loading its weights.

    Raises:
        BadInput: transformers cannot load it, weights are missing, or it is not a Llama-like decoder.
    """
    with quiet(), _foreign_errors(f"the model in {folder}", CHOOSE_ANOTHER):
        refuse_by_config(AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code), longest)
        decoder = load_decoder(folder, model, dtype=torch.bfloat16, device_map="meta")
        refuse_unsupported(decoder, longest)
        _refuse_other_linears(decoder, folder)
        _refuse_other_mixing(decoder)


def refuse_unsupported(decoder: PreTrainedModel, longest: int) -> None:
    """Refuse what would silently be computed differently from transformers.

    Raises:
        BadInput: attention sees fewer tokens than `longest`, logits are scaled or capped, or the output layer has a bias.
    """
    refuse_by_config(decoder.config, longest)
    if getattr(decoder.get_output_embeddings(), "bias", None) is not None:
        raise BadInput(f"{HEAD_WITH_BIAS.format(decoder.config.model_type)}; {CHOOSE_ANOTHER}.")


def _refuse_other_linears(decoder: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose files have matrices that look like linear layers, but are not: they cannot be adapted."""
    linears = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    others = sorted({name.rpartition(".")[2] for name in linear_shapes(folder).keys() - linears})
    if others:
        raise BadInput(
            f"the architecture {_kind(decoder)} keeps {_some(others)} in modules of its own kind, which cannot be adapted; "
            f"{CHOOSE_ANOTHER}."
        )


def _refuse_other_mixing(decoder: PreTrainedModel) -> None:
    """Refuse a decoder whose layers mix tokens in another way than by attention that can be exchanged, once a layer.

    The trainer concatenates sequences and keeps them apart in attention. A convolution, a state space or an attention of the model's
    own would let them see each other.
    """
    calls = 0

    def probe(
        _module: nn.Module, query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any, **_others: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(PROBE_ATTENTION, probe)
    decoder.set_attn_implementation(PROBE_ATTENTION)
    tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device="meta")
    output = decoder.base_model(input_ids=tokens, position_ids=tokens, use_cache=False)
    layers = decoder.config.num_hidden_layers
    if calls != layers:
        raise BadInput(
            f"the architecture {_kind(decoder)} has {layers} layers and transformers' exchangeable attention in {calls} of them, "
            f"so packed sequences cannot be kept apart; {CHOOSE_ANOTHER}."
        )
    if not hasattr(output, "last_hidden_state"):
        raise BadInput(f"the architecture {_kind(decoder)} does not give its last hidden state; {CHOOSE_ANOTHER}.")


def _kind(decoder: PreTrainedModel) -> str:
    return repr(decoder.config.model_type)


@contextmanager
def _foreign_errors(what: str, advice: str) -> Iterator[None]:
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
