"""Checkpoints of models that also see: their text decoder is trained, with the names and the results of stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import packs
from architectures import VOCABULARY
from model_facts import sizes
from train.config import ModelConfig
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.lora.parameters import PackedAdapters
from train.lora.targets import Target
from train.model.base_cache import BaseCache, BaseSpec
from train.model.linears import frozen_linears
from train.model.loading import stock_skeleton
from train.nn.base import load_base
from train.nn.packed_model import PackedModel
from train.store.layout import CacheDir

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
IMAGE = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92, "mm_tokens_per_image": 4}
# The class that wrote the checkpoint, and its configuration.
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {"text_config": TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}} | IMAGE,
    ),
    # Files of both with a vision tower that the text class leaves out.
    "qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        {
            "text_config": TEXT
            | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
            | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
            | {"patch_size": 4, "deepstack_visual_indexes": []},
            "image_token_id": 92, "video_token_id": 93, "vision_start_token_id": 94, "vision_end_token_id": 95,
        },
    ),
    # The text of Mistral Small 3.1, which transformers has no causal class for.
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 92,
        },
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 90, 15).astype(np.int32)


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint as its authors publish it."""
    kind, model_type, settings = CHECKPOINTS[request.param]
    config = AutoConfig.for_model(model_type, **({"vision_config": VISION} | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def about(folder: Path) -> ModelConfig:
    return ModelConfig(name="m", source=str(folder))


def stock(folder: Path) -> PreTrainedModel:
    """As a user loads it."""
    kind = type(stock_skeleton(folder, about(folder)))
    return kind.from_pretrained(folder).eval()


def packed(folder: Path, quant: Any, tmp_path: Path) -> PackedModel:
    bases = BaseCache(CacheDir(tmp_path / "cache"), lambda: None)
    return load_base(BaseSpec(folder, about(folder), quant, torch.float32, packs.CPU), "nf4", 64, bases)


def logits(base: PackedModel) -> torch.Tensor:
    with torch.no_grad():
        batch = MicroBatch([TokenSequence(0, 0, TOKENS, TOKENS)], 1, packs.CPU)
        return base.head.logits(base.hidden_states(batch))[:, :VOCABULARY]


def stock_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.from_numpy(TOKENS).long()[None], use_cache=False).logits[0]
    return found


def test_text_is_computed_as_by_stock_transformers(folder: Path, tmp_path: Path) -> None:
    base = packed(folder, packs.SIXTEEN_BIT, tmp_path)
    torch.testing.assert_close(logits(base), stock_logits(stock(folder)), rtol=1e-4, atol=1e-4)
    assert not any("vision" in name or "visual" in name for name in base.shapes)


def test_in_four_bits_only_the_text_is_quantized(folder: Path, tmp_path: Path) -> None:
    base = packed(folder, packs.NF4, tmp_path)
    model = stock(folder)
    for name, linear in base.linears.items():
        model.get_submodule(name).weight.data.copy_(linear.weight)
    torch.testing.assert_close(logits(base), stock_logits(model), rtol=1e-4, atol=1e-4)


def test_the_facts_of_the_text_are_those_of_the_base(folder: Path, tmp_path: Path) -> None:
    base = packed(folder, packs.SIXTEEN_BIT, tmp_path)
    found = sizes(folder)
    assert found.linears == base.shapes
    assert found.parameters == base.parameters
    assert [found.layers, found.hidden, found.vocabulary] == [
        TEXT[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    ]


def test_adapters_have_the_names_that_stock_peft_has(folder: Path, tmp_path: Path) -> None:
    base = packed(folder, packs.SIXTEEN_BIT, tmp_path)
    names = [name for name in base.shapes if name.endswith(("q_proj", "in_proj_qkv"))]
    adapters = PackedAdapters([dict.fromkeys(names, Target(8, 16.0, 2.0))], base.shapes, [0.0], base.dtype, packs.CPU)
    adapters.theta.copy_(0.1 * torch.randn(adapters.theta.shape))
    base.attach(adapters)
    model = peft.get_peft_model(stock(folder), peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)).eval()
    for name, (a, b) in adapters.tensors(0).items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    torch.testing.assert_close(logits(base), stock_logits(model), rtol=1e-4, atol=1e-4)


def test_the_whole_model_has_the_same_linear_layers_as_that_with_shallow_towers(folder: Path, tmp_path: Path) -> None:
    """As `merge` loads it, which writes the vision tower too."""
    assert list(frozen_linears(stock(folder))) == list(packed(folder, packs.SIXTEEN_BIT, tmp_path).shapes)
