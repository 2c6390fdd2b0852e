"""A base is quantized while its files are read: the numbers of the whole model, in the memory of one weight."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import packs
from architectures import ARCHITECTURES, tiny_model
from train.config import ModelConfig
from train.model.quantized import load_model
from train.model.quantizing import Quantizer, _quantizable, _StandIn, quantize_files

# Dense; experts that files keep one by one; stacks; weights that lie [in, out].
NAMES = ["llama", "qwen3-moe", "llama4", "gpt2"]


@pytest.fixture(params=NAMES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if missing := ARCHITECTURES[request.param].missing:
        pytest.skip(missing)
    tiny_model(request.param).save_pretrained(tmp_path)
    return tmp_path


def about(folder: Path) -> ModelConfig:
    return ModelConfig(name="tiny", source=str(folder), fingerprint="tiny")


class Watched(Quantizer):
    """Notes which weights a model has in full width whenever one is put in its place, and at the end."""

    wide: ClassVar[list[list[str]]] = []

    def take(self, model: PreTrainedModel, name: str) -> None:
        self.wide.append(in_full_width(model))
        super().take(model, name)

    def finish(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        self.wide.append(in_full_width(model))
        return super().finish(model)


def in_full_width(model: PreTrainedModel) -> list[str]:
    weights = {name: model.get_parameter(name) for name in _quantizable(model)}
    return [name for name, weight in weights.items() if not (weight.is_meta or isinstance(weight, _StandIn))]


def test_no_two_weights_are_in_full_width_at_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.model.quantizing.Quantizer", Watched)
    Watched.wide.clear()
    quantize_files(files, about(files), packs.NF4, torch.float32, packs.CPU)
    assert max(map(len, Watched.wide)) == 1
    assert Watched.wide[-1] == []


def test_the_numbers_are_those_of_the_whole_model(files: Path) -> None:
    found = quantize_files(files, about(files), packs.NF4, torch.float32, packs.CPU)
    loaded = load_model(files, about(files), torch.float32, packs.CPU)
    expected = Quantizer(packs.NF4, packs.CPU, lambda: None).finish(loaded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_two_layers_of_one_weight_are_quantized_once() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    quantizer = Quantizer(packs.NF4, packs.CPU, lambda: None)
    quantizer.take(model, "model.layers.0.mlp.up_proj.weight")
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    tensors = quantizer.finish(model)
    first = {n: t for n, t in tensors.items() if n.startswith("model.layers.0.mlp.up_proj.weight")}
    assert len(first) > 1
    for name, tensor in first.items():
        assert torch.equal(tensors[name.replace("layers.0", "layers.1")], tensor)


def test_a_stand_in_has_the_memory_of_a_number() -> None:
    weight = _StandIn(torch.ones(300, 200, dtype=torch.bfloat16), "w")
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.untyped_storage().nbytes()) == ((300, 200), torch.bfloat16, 2)
