"""4-bit values on every device: each is the nearest of its block's sixteen."""

import pytest
import torch

import packs
from train.model.nf4 import BLOCK_SIZE, dequantize, quantize

# Half of the widest gap between NF4's values, from -1 to -0.6962, as a share of the largest value of a block.
HALF_GAP = 0.152
SINGLE = packs.NF4.model_copy(update={"bnb_4bit_use_double_quant": False})


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Rows of whole blocks, of a part of one, of one and a half, and of odd ones.
@pytest.mark.parametrize("columns", [64, 128, 32, 48, 96, 1056, 40, 33])
def test_a_weight_of_any_width_keeps_its_values(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = dequantize(*quantize(weight, SINGLE))
    assert found.shape == weight.shape
    assert found.dtype == dtype
    blocks = weight.float().view(-1, BLOCK_SIZE)
    errors = (found.float().view(-1, BLOCK_SIZE) - blocks).abs() / blocks.abs().amax(dim=1, keepdim=True)
    # bfloat16 rounds the result by up to 2^-8 of it.
    assert float(errors.max()) < HALF_GAP + (2**-8 if dtype == torch.bfloat16 else 1e-6)
