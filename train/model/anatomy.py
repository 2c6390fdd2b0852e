"""Where the parts of a causal language model are, for any class of transformers: found by structure, not by the model's name.

LlamaForCausalLM                 model.layers                   text decoder: model
GPT2LMHeadModel                  transformer.h                  transformer
OPTForCausalLM                   model.decoder.layers           model.decoder
Gemma3ForConditionalGeneration   model.language_model.layers    model.language_model, beside a vision tower that text never enters
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from train.errors import BadInput


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the model's text decoder, in order.

    Raises:
        BadInput: there is no list of modules.
    """
    return cast(nn.ModuleList, model.get_submodule(layers_name(model)))


def layers_name(model: PreTrainedModel) -> str:
    """The full name of `decoder_layers` in `model`: ``model.layers``.

    Raises:
        BadInput: as `decoder_layers`.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Not the experts, heads or branches of a layer.
    outermost = {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    choices: tuple[list[str], ...] = (
        [name for name, size in outermost.items() if size == count and name.startswith(inside)],
        # Some call their head a decoder (ModernBERT), some count two layers in one module (LongCat Flash).
        [name for name, size in outermost.items() if size == count],
        sorted(outermost, key=lambda name: -outermost[name]),
    )
    for found in choices:
        if found:
            return found[0]
    raise BadInput(
        f"the architecture {model.config.model_type!r} has no list of decoder layers; choose a model of another architecture."
    )


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head and whatever is not text: takes tokens, gives the last hidden state.

    Raises:
        BadInput: as `decoder_layers`.
    """
    name = layers_name(model)
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if isinstance(owner, PreTrainedModel):
            return owner
    return model
