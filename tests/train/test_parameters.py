"""The layout of a pack's matrix."""

import torch

import packs
from train.lora.parameters import PackedAdapters
from train.lora.targets import Target


def test_the_example_of_the_docstring_is_how_adapters_are_placed() -> None:
    """Two runs over q (in 64, out 32) and v (in 64, out 16), of ranks 4 and 4, and 10 on q alone."""
    targets = [{"q": Target(4, 8.0, 2.0), "v": Target(4, 8.0, 2.0)}, {"q": Target(10, 10.0, 1.0)}]
    shapes = {"q": (32, 64), "v": (16, 64)}
    adapters = PackedAdapters(targets, shapes, [0.0, 0.0], torch.bfloat16, packs.CPU)
    assert (adapters.b_columns_start, adapters.theta.shape) == (1536, (2, 2176))
    starts = {
        name: (stack.grad_a.storage_offset(), stack.grad_b.storage_offset()) for name, stack in adapters.stacks.items()
    }
    assert starts == {"q": (0, 1536), "v": (1024, 2048)}
    assert {name: tuple(stack.lora_a.shape[1:]) for name, stack in adapters.stacks.items()} == {
        "q": (16, 64),
        "v": (8, 64),
    }
    assert adapters.stacks["v"].members == (0,)
    adapters.initialize(0, seed=0)
    adapters.refresh()
    in_use = adapters.stacks["q"].lora_a[0].abs().amax(dim=1) > 0
    assert in_use.tolist() == [True] * 4 + [False] * 12, "run 0's A is in the first rows, zeros are below"
    assert {name: tuple(a.shape) for name, (a, _) in adapters.tensors(1).items()} == {"q": (10, 64)}
