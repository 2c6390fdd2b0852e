"""Our decoder where it computes what transformers' does, transformers' own elsewhere; and every way of the kernels gives the same."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import sequences_of
from train.nn.backends import EAGER, Kernels
from train.nn.gradients import add_gradients, token_multiple
from train.nn.judge import Attempt, judge
from train.nn.linear import PackedLinear
from train.nn.loss import sums_per_run
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.sizing import ComputePath

NEEDS_TRITON = pytest.mark.skipif(packs.LACKS_TRITON is not None, reason=str(packs.LACKS_TRITON))
SHAPE: dict[str, Any] = {
    "vocab_size": packs.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
OPT_SHAPE: dict[str, Any] = {
    name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
} | {"word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 128, "dropout": 0.0}


def random_model(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.mul_(3).add_(0.1 * torch.randn_like(parameter))
    return model.double()


@pytest.mark.parametrize(
    ("model", "ours"),
    [
        (random_model(LlamaForCausalLM, LlamaConfig(**SHAPE)), True),
        (random_model(LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)), True),
        (random_model(Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"})), True),
        (random_model(Qwen3ForCausalLM, Qwen3Config(**SHAPE)), True),
        (
            random_model(StableLmForCausalLM, StableLmConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"})),
            True,
        ),
        (
            random_model(OPTForCausalLM, OPTConfig(**OPT_SHAPE)),
            False,
        ),
    ],
    ids=[
        "llama",
        "llama with biases",
        "qwen2",
        "qwen3",
        "stablelm, which rotates a part of each head",
        "opt, without batch",
    ],
)
def test_hidden_states_are_those_of_transformers(model: PreTrainedModel, ours: bool) -> None:
    """Whichever decoder was chosen, against the model as transformers computes it, sequence by sequence."""

    plain = copy.deepcopy(model)
    base = pack_model(model, DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=64))
    assert base.path == ("own" if ours else "flat")
    table = packs.random_table(3, 0)
    batch = MicroBatch(sequences_of(0, table, range(3)), 1, packs.CPU)
    hidden = base.hidden_states(batch)
    at = 0
    for row in range(3):
        tokens, _ = table.example(row)
        expected = plain.base_model(torch.from_numpy(tokens).long()[None]).last_hidden_state[0]
        # transformers rounds norms to float32.
        torch.testing.assert_close(hidden[at : at + len(tokens)], expected, rtol=1e-4, atol=1e-5)
        at += len(tokens)


def packed_llama(kernels: Kernels, device: torch.device = packs.CPU) -> PackedModel:
    """A small Llama in float32 that uses `kernels`."""
    return pack_model(packs.tiny_llama(torch.float32), DeviceSetup(packs.SIXTEEN_BIT, device, "resident", 64, kernels))


def losses_and_gradient(base: PackedModel, folder: Path, token_multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    configs = [
        packs.run_config({"r": r, **targets})
        for r, targets in ((4, {}), (8, {}), (16, {"target_modules": "all-linear"}))
    ]
    loop = packs.make_loop(folder, base, configs)
    for row in range(len(configs)):
        for _, b in loop.adapters.tensors(row).values():
            b.fill_(0.01)
    table = packs.random_table(9, 3)
    sequences = [s for run in range(3) for s in sequences_of(run, table, range(3 * run, 3 * run + 3))]
    batch = MicroBatch(sequences, 3, base.device, token_multiple)
    losses = add_gradients(base, batch, torch.tensor([0.1, 0.2, 0.3, 0.0], device=base.device), None)
    return sums_per_run(losses[: batch.num_targets], batch), loop.adapters.gradient


@pytest.mark.slow
@NEEDS_TRITON
@pytest.mark.parametrize(
    "kernels", [Kernels(grouped_lora=True), Kernels(fused_elementwise=True)], ids=["grouped", "fused"]
)
def test_our_kernels_give_the_same(kernels: Kernels, tmp_path: Path) -> None:
    device = packs.DEVICES[-1]
    expected = losses_and_gradient(packed_llama(EAGER, device), tmp_path / "plain")
    found = losses_and_gradient(packed_llama(kernels, device), tmp_path / "kernels")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert float(expected[1].norm()) > 0.1


def judged_with_kernels() -> Attempt:
    kernels = DeviceSetup(packs.SIXTEEN_BIT, packs.DEVICES[-1], "resident", 64, Kernels(fused_elementwise=True))
    stock = packs.tiny_llama(torch.float32).to(kernels.device).requires_grad_(False)
    return judge(stock, lambda copy, path: pack_model(copy, kernels, path=path)).attempts[0]


@NEEDS_TRITON
def test_an_error_of_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("train.nn.triton.activations.gated", broken)
    assert "no kernel image" in judged_with_kernels().why


@NEEDS_TRITON
def test_a_kernel_that_computes_anything_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.nn.triton.activations.gated", lambda gate, up, _activation: gate * up)
    attempt = judged_with_kernels()
    assert attempt.path == "own"
    assert not attempt.passed
    assert attempt.difference is not None


def test_fillers_change_nothing(tmp_path: Path) -> None:
    base = packed_llama(EAGER)
    expected = losses_and_gradient(base, tmp_path / "bare")
    found = losses_and_gradient(base, tmp_path / "filled", token_multiple=32)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_becomes_another_of_its_shape() -> None:
    table = packs.random_table(8, 0)
    batches = []
    for rows in (range(4), range(4, 8)):
        sequences = [s for run in range(2) for s in sequences_of(run, table, list(rows)[2 * run : 2 * run + 2])]
        batches.append(MicroBatch(sequences, 2, packs.CPU, token_multiple=256))
    one, other = batches
    groups = [(0, 1), (0,)]
    one.prefetch_routes(groups)
    one.copy_indices_from(other)
    for name in (
        "tokens",
        "positions",
        "sequence_starts",
        "target_positions",
        "targets",
        "run_of_target",
        "run_of_token",
    ):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for members in groups:
        mine, others = (batch.route(members) for batch in batches)
        assert mine is not None
        assert others is not None
        assert torch.equal(mine.bounds, others.bounds)


@pytest.mark.slow
@NEEDS_TRITON
def test_a_micro_batch_that_became_another_computes_as_the_other(tmp_path: Path) -> None:
    """What a CUDA graph replays: kernels over the tensors of the first micro-batch, whose host knows only the first one's lengths."""
    base = packed_llama(Kernels(grouped_lora=True), packs.DEVICES[-1])
    targets = ({}, {"target_modules": ["gate_proj"]}, {"target_modules": "all-linear"})
    loop = packs.make_loop(tmp_path, base, [packs.run_config({"r": 8, **which}) for which in targets])
    for row in range(len(targets)):
        for _, b in loop.adapters.tensors(row).values():
            b.fill_(0.01)
    table, weights = packs.random_table(12, 0), torch.tensor([0.1, 0.2, 0.3, 0.0], device=base.device)
    batches = []
    for first in (0, 6):
        sequences = [
            s for run in range(3) for s in sequences_of(run, table, np.arange(first + 2 * run, first + 2 * run + 2))
        ]
        batches.append(MicroBatch(sequences, 3, base.device, token_multiple=256))
    one, other = batches
    assert one.total == other.total
    one.prefetch_routes(base.members())
    one.copy_indices_from(other)
    # With graphs attention takes `sequence_starts`, which a CPU has no kernel for.
    one.attention = other.attention
    found = []
    for batch in (one, other):
        loop.adapters.gradient.zero_()
        found.append((add_gradients(base, batch, weights, None).clone(), loop.adapters.gradient.clone()))
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)
    assert all(float(row.norm()) > 0.01 for row in found[0][1])


def test_layers_of_a_fallback_are_packed_too() -> None:
    base = pack_model(
        random_model(Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
        DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=64),
    )
    assert all(isinstance(layer, PackedLinear) for layer in base.linears.values())
    assert len(base.linears) == 14


@pytest.mark.parametrize("path", ["flat", "padded"])
def test_every_path_gives_the_same_losses_and_gradients(path: ComputePath, tmp_path: Path) -> None:
    expected = losses_and_gradient(packs.tiny_base(), tmp_path / "own")
    found = losses_and_gradient(packs.tiny_base(path=path), tmp_path / path)
    for mine, other in zip(found, expected, strict=True):
        # transformers rounds the rotation to float32.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("tokens", "multiple"), [(1, 32), (527, 32), (1023, 32), (1024, 64), (2048, 128), (6000, 128)])
def test_fillers_are_a_sixteenth_at_most(tokens: int, multiple: int) -> None:
    assert token_multiple(tokens) == multiple
    assert multiple <= max(32, tokens / 16)
