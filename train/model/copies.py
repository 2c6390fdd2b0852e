"""Small copies of a model, on which `train.nn.judge` measures how it can be computed.

    small_model   the architecture with every kind of layer, few layers, narrow ones, random weights: needs a configuration alone
    cut_model     the real widths and the real weights of one layer of each kind, with the first words and experts

Gemma 3 with 26 layers (five with a window, one without, and so on) becomes, small, its first six layers with 64 hidden features, and,
cut, its layers 0 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from train.errors import BadInput
from train.model.anatomy import layers_name, text_decoder
from train.model.layer_kinds import REFERENCE, build, first_alike, layer_kinds, one_of_each, shortened, text_config
from train.model.loading import with_plain_attention
from train.model.narrowing import divisors, narrowed, with_fewer_rows

# A larger copy would cost the login node minutes.
LARGEST_PARAMETERS = 300_000_000

# From a name in a model's ``state_dict``, and how many of its first rows are needed, to a tensor of at least these rows.
Reader = Callable[[str, int], torch.Tensor]


def small_model(full: PreTrainedModel, seed: int = 0, attention: str = REFERENCE) -> PreTrainedModel:
    """A small float32 copy of the architecture of `full` (which may be on ``meta``) with random weights, made for an `attention`.

    Raises:
        BadInput: it cannot be made small.
    """
    text = text_config(full.config)
    reason: Exception | None = None
    short, _ = shortened(full)
    for heads, features in divisors(text):
        config = narrowed(short, heads, features)
        try:
            if build(config, "meta").num_parameters() > LARGEST_PARAMETERS:
                continue
            model = build(config, attention=attention)
            randomize(model, seed)
            # Sizes that do not fit together show here.
            with torch.no_grad():
                model(torch.arange(7)[None] + 1, use_cache=False)
        # Whatever the model's own code raises about sizes that do not fit together.
        except Exception as exc:
            reason = reason or exc
            continue
        return model
    why = "" if reason is None else f" ({type(reason).__name__}: {first_sentence(reason)})"
    raise BadInput(f"the architecture {full.config.model_type!r} cannot be copied small{why}; choose another model.")


def first_sentence(error: BaseException, longest: int = 300) -> str:
    """The first sentence of an error's message."""
    return " ".join(str(error).split()).partition(". ")[0][:longest].rstrip(".") or type(error).__name__


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights with which every part matters: transformers' initial ones leave norms at one, biases at zero and outputs tiny."""
    random = torch.Generator().manual_seed(seed)
    # Not a vision tower, which may be large.
    text = [text_decoder(model), model.get_output_embeddings()]
    parameters = {id(parameter): parameter for part in text if part is not None for parameter in part.parameters()}
    embeddings = {id(model.get_input_embeddings().weight)} | {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=random)
        mean, std = float(parameter.float().mean()), float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        if id(parameter) in embeddings:
            parameter.copy_(noise * 0.5)
        elif parameter.dim() < 2:
            parameter.add_(0.2 * noise)
        # Structured, as the decay rates of a state space.
        elif abs(mean) > 0.3 * std:
            parameter.add_(0.1 * noise)
        else:
            # Between the sizes of input and output, since layouts differ: outputs stay about as large as inputs.
            parameter.copy_(noise * 1.4 / math.sqrt(math.sqrt(parameter.shape[-1] * parameter.shape[-2])))
    # Buffers that a checkpoint fills, as a router's correction of its scores, start as one value; decays and the like do not.
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and buffer.dim() and bool(buffer.min() == buffer.max()):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=random))


def run_as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, from reference code to the code that a loaded model runs by (`train.model.loading`)."""
    with_plain_attention(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(model.get_correct_experts_implementation(None))
    return model


@torch.no_grad()
def cut_model(full: PreTrainedModel, read: Reader, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """One layer of each kind of `full` with its own weights, the first words of the vocabulary and, of many, the first experts.

    `full` itself is only looked at; `read` gives its tensors.
    """
    kinds = layer_kinds(full)
    picked = one_of_each(kinds)
    config, layers = first_alike(full.config, kinds, [picked, list(range(max(picked) + 1))])
    config = with_fewer_rows(config)
    with init_empty_weights(include_buffers=False):
        model = build(config, "cpu", dtype)
    prefix = layers_name(model)
    for name, wanted in list(model.state_dict(keep_vars=True).items()):
        rows = wanted.shape[0] if wanted.dim() else 1
        source = read(_original_name(name, prefix, layers_name(full), layers), rows)
        # Fewer words and experts: the first rows.
        value = source[tuple(slice(0, size) for size in wanted.shape)].to(device, wanted.dtype).clone()
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        is_parameter = isinstance(wanted, nn.Parameter)
        setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    model.tie_weights()
    return model.to(device)


def _original_name(name: str, prefix: str, original: str, layers: list[int]) -> str:
    """The name in the full model: its layer 5 is layer 1 of the cut copy."""
    if not name.startswith(f"{prefix}."):
        return name
    index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{original}.{layers[int(index)]}.{rest}"
