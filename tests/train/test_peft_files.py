"""Adapter files: stock PEFT loads them and computes what they say."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from test_targets import CASES, lora
from transformers import AutoModelForCausalLM

from model_facts import linear_shapes
from train.config import LoraConfig, ModelConfig
from train.errors import BadInput
from train.lora.peft_files import read_adapter, write_adapter
from train.lora.peft_forms import StockPeft
from train.lora.targets import adapted_modules
from train.model.loading import stock_skeleton
from train.store.layout import CacheDir

Tiny = tuple[ModelConfig, CacheDir, Path]
Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]

TOKENS = torch.arange(1, 25).view(2, 12)


def random_adapter(config: LoraConfig, folder: Path) -> Tensors:
    """Both matrices far from zero, so that an adapter left out or scaled wrongly shows."""
    generator = torch.Generator().manual_seed(0)
    shapes = linear_shapes(folder)
    return {
        name: (
            0.1 * torch.randn(target.r, shapes[name][1], generator=generator),
            0.1 * torch.randn(shapes[name][0], target.r, generator=generator),
        )
        for name, target in adapted_modules(config, list(shapes)).items()
    }


def peft_config(config: LoraConfig, model: ModelConfig, folder: Path, tensors: Tensors) -> PeftLoraConfig:
    peft = StockPeft(model, partial(stock_skeleton, folder, model))
    return peft.config(config, adapted_modules(config, list(linear_shapes(folder))), tensors)


def write_random_adapter(to: Path, config: LoraConfig, model: ModelConfig, model_dir: Path) -> Tensors:
    """A random adapter of the model in `model_dir`, which is also written to the folder `to`."""
    adapter = random_adapter(config, model_dir)
    write_adapter(to, peft_config(config, model, model_dir, adapter), adapter)
    return adapter


@torch.no_grad()
def logits_with(config: LoraConfig, adapter: Tensors, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's logits, and those with scaling * B A added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    bare = model(TOKENS).logits
    targets = adapted_modules(config, list(linear_shapes(folder)))
    for name, (a, b) in adapter.items():
        model.get_submodule(name).weight += targets[name].scaling * b @ a
    return bare, model(TOKENS).logits


@pytest.mark.parametrize("case", ["patterns", "layers", "rsLoRA", "all-linear", "regex"])
@torch.no_grad()
def test_stock_peft_computes_what_the_file_says(case: str, tiny_model: Tiny, tmp_path: Path) -> None:
    model, _, folder = tiny_model
    config = lora(**CASES[case], lora_dropout=0.3, loraplus_lr_ratio=4.0)
    adapter = write_random_adapter(tmp_path, config, model, folder)
    bare, expected = logits_with(config, adapter, folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)(TOKENS).logits
    assert (expected - bare).abs().max() > 0.1
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_what_is_written_is_read(tiny_model: Tiny, tmp_path: Path) -> None:
    model, _, folder = tiny_model
    config = lora(["q_proj", "down_proj"])
    adapter = random_adapter(config, folder)
    other_layout = {n: (a.double(), b.double().T.contiguous().T) for n, (a, b) in adapter.items()}
    write_adapter(tmp_path, peft_config(config, model, folder, adapter), other_layout)
    read = read_adapter(tmp_path)
    assert read.keys() == adapter.keys()
    for name, pair in adapter.items():
        for ours, back in zip(pair, read[name], strict=True):
            assert back.dtype == torch.float32
            assert torch.equal(ours, back)


def test_the_configuration_names_the_base(tiny_model: Tiny) -> None:
    _, _, folder = tiny_model
    config = lora("all-linear")
    model = ModelConfig(name="m", source="org/name", revision="v1")
    written = peft_config(config, model, folder, random_adapter(config, folder))
    expected: dict[str, Any] = {
        "base_model_name_or_path": "org/name",
        "revision": "v1",
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "inference_mode": True,
        # Spelled out for readers that do not know all-linear, in an order that every process shares.
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "target_parameters": None,
        "fan_in_fan_out": False,
    }
    assert expected.items() <= written.to_dict().items()


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adapter"):
        read_adapter(tmp_path)
