"""What counts as a linear layer: judged against what the modules compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PhimoeConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import packs
from train.model.linears import frozen_linears, is_linear
from train.model.nf4 import dequantize
from train.model.quantized import QuantizedBase
from train.model.quantizing import Quantizer


class Renamed(nn.Linear):
    """Its own forward, and the same result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class Doubled(nn.Linear):
    """Another result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Choosing(nn.Linear):
    """A router."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x).topk(1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_what_computes_one(bias: bool) -> None:
    assert is_linear(nn.Linear(6, 4, bias=bias))
    assert is_linear(Renamed(6, 4, bias=bias))
    assert is_linear(Conv1D(4, 6))
    assert not is_linear(Doubled(6, 4, bias=bias))
    assert not is_linear(Choosing(6, 4, bias=bias))
    assert not is_linear(nn.Embedding(6, 4))


def phimoe() -> PreTrainedModel:
    config = PhimoeConfig(
        vocab_size=packs.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def test_a_router_that_subclasses_linear_is_none() -> None:
    names = frozen_linears(phimoe())
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=packs.VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    ).eval()


def test_the_weights_of_conv1d_are_read_as_out_in() -> None:
    model = gpt2()
    linears = frozen_linears(model)
    assert linears["transformer.h.0.attn.c_attn"].shape == (192, 64)
    x = torch.randn(3, 64)
    for linear in linears.values():
        if linear.shape[1] == 64:
            torch.testing.assert_close(linear.module(x), functional.linear(x, linear.weight, linear.bias))


def test_a_quantized_conv1d_is_packed_as_out_in() -> None:
    model = gpt2()
    expected = frozen_linears(model)["transformer.h.0.attn.c_attn"].weight
    tensors = Quantizer(packs.NF4, packs.CPU, lambda: None).finish(model)
    base = QuantizedBase(list(tensors), tensors.__getitem__, packs.CPU)
    dense = dequantize(*base.linear("transformer.h.0.attn.c_attn"))
    assert dense.shape == expected.shape
    # Within the largest step of NF4 between two values of a block.
    assert (dense - expected).abs().max() < 0.2 * expected.abs().max()
