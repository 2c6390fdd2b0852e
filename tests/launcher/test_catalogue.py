"""The catalogue against transformers: every shipped model is built on the meta device from its numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from launcher.estimate.catalogue import CATALOGUE, CatalogueModel
from launcher.estimate.model_table import shipped_models, with_table
from launcher.estimate.shapes import catalogue_shape
from launcher.estimate.workload import SizingInputs
from launcher.installation import SOURCE_DIR, shipped_conf
from model_facts import sizes
from train.config import ModelConfig
from train.model.anatomy import layers_name
from train.model.linears import frozen_linears
from train.nn.base import judge_architecture
from train.nn.kept import activations
from train.nn.reading import describe_model
from train.store.layout import CacheDir

TOWER_PART = "vision|multi_modal"
# Of the vision tower of Gemma 3 4B and 12B: SigLIP.
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def config_of(model: CatalogueModel) -> Any:
    """The model's configuration, as its ``config.json`` has it."""
    numbers = {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model.experts is not None:
        numbers |= {
            "num_experts": model.experts.count,
            "num_local_experts": model.experts.count,
            "num_experts_per_tok": model.experts.chosen,
            "moe_intermediate_size": model.experts.intermediate,
        }
    if model.prefix != "model":
        return AutoConfig.for_model(
            model.architecture, text_config=numbers, vision_config=TOWER, mm_tokens_per_image=256
        )
    return AutoConfig.for_model(model.architecture, **numbers)


def built(model: CatalogueModel) -> PreTrainedModel:
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(model))
    return built


@pytest.mark.parametrize("source", CATALOGUE)
def test_the_numbers_are_those_of_the_model(source: str) -> None:
    """The parameters are the hub's count, so a wrong number shows even where transformers would take it."""
    model = CATALOGUE[source]
    theirs = built(model)
    linears = {name: linear.shape for name, linear in frozen_linears(theirs).items()}
    assert linears == model.linears
    assert sum(parameter.numel() for parameter in theirs.parameters()) == model.parameters + model.tower
    assert sum(p.numel() for name, p in theirs.named_parameters() if re.search(TOWER_PART, name)) == model.tower
    stacks = sum(parameter.numel() for parameter in theirs.model.parameters() if parameter.dim() == 3)
    assert stacks == (model.experts_size.parameters if model.experts_size else 0)


@pytest.mark.parametrize("source", [source for source, model in CATALOGUE.items() if model.path == "own"])
def test_our_decoder_keeps_as_much_of_a_token(source: str) -> None:
    model = CATALOGUE[source]
    theirs = built(model)
    kept = activations(describe_model(theirs), layers_name(theirs), model.linears, model.hidden)
    assert model.activations == kept


@pytest.mark.slow
@pytest.mark.parametrize("source", CATALOGUE)
def test_the_judge_takes_the_path_that_the_catalogue_says(source: str) -> None:
    model = CATALOGUE[source]
    assert judge_architecture(built(model)).path == model.path


def test_every_shipped_model_is_in_the_catalogue() -> None:
    files = {path.stem for path in shipped_conf().glob("model/*.yaml")}
    assert files - shipped_models().keys() == {"own", "tiny"}
    assert set(shipped_models().values()) == CATALOGUE.keys()


@pytest.mark.parametrize(("choice", "source"), shipped_models().items())
def test_a_file_says_licence_and_gating(choice: str, source: str) -> None:
    comment = (shipped_conf() / "model" / f"{choice}.yaml").read_text().partition("\n")[0]
    model = CATALOGUE[source]
    assert model.gated == ("hf auth login" in comment and "may ask" not in comment)
    assert model.gated or model.licence in comment


def test_a_shipped_model_needs_no_fetch(tmp_path: Path) -> None:
    model = ModelConfig(name="m", source="Qwen/Qwen3-8B-Base")
    shape = SizingInputs(CacheDir(tmp_path)).shape(model)
    assert shape == catalogue_shape(CATALOGUE[model.source])
    assert (shape.origin, shape.assumed, shape.size.parameters) == ("catalogue", True, 8_190_735_360)


def test_a_fetched_model_speaks_for_itself(tiny_model: tuple[ModelConfig, CacheDir, Path]) -> None:
    model, cache, folder = tiny_model
    shape = SizingInputs(cache).shape(model)
    assert (shape.size.parameters, shape.size.linears) == (sizes(folder).parameters, sizes(folder).linears)
    assert (shape.path, shape.assumed) == ("own", False)


def test_the_page_has_the_table_of_now() -> None:
    page = SOURCE_DIR / "docs" / "models.md"
    hint = "make it again: python -m launcher.estimate.model_table docs/models.md"
    assert with_table(page.read_text()) == page.read_text(), hint
