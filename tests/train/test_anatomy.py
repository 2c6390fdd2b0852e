"""Where decoder and layers are, by structure."""

import pytest
from transformers import AutoConfig

from architectures import ARCHITECTURES
from train.model.anatomy import decoder_layers, layers_name, text_decoder
from train.model.layer_kinds import build


@pytest.mark.parametrize(
    ("model_type", "name", "count"),
    [
        # Calls its head a decoder.
        ("modernbert-decoder", "model.layers", 22),
        # Counts two layers in one module, and has lists in them.
        ("longcat_flash", "model.layers", 28),
    ],
)
def test_layers_are_found_where_names_and_counts_mislead(model_type: str, name: str, count: int) -> None:
    model = build(AutoConfig.for_model(model_type), "meta")
    assert layers_name(model) == name
    assert len(decoder_layers(model)) == count


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("llama", "model"), ("gpt2", "transformer"), ("opt", "model.decoder"), ("gemma3", "model.language_model")],
)
def test_the_text_decoder_is_what_owns_the_layers(name: str, decoder: str) -> None:
    model = build(ARCHITECTURES[name].config(), "meta")
    assert text_decoder(model) is model.get_submodule(decoder)
