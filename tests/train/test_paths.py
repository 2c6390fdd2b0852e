"""transformers' decoder in packs: losses and every adapter's gradient are those of stock transformers, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import packs
from architectures import ARCHITECTURES, LONGEST, VOCABULARY, WINDOW, each, tiny_model
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.lora.parameters import PackedAdapters
from train.lora.targets import Target
from train.nn.gradients import add_gradients
from train.nn.loss import sums_per_run
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.nn.stock_attention import StockAttention
from train.nn.windows import UnknownAttention
from train.sizing import ComputePath

RANK, SCALING = 8, 0.5
# Rows of three runs; one sequence is a single token, which predicts nothing.
LENGTHS = [(5, LONGEST - 3), (LONGEST,), (1, 9)]
# float32 through some hundred operations; the largest of all adapters' relative errors.
TOLERANCE = 5e-5
# Where stock transformers is further than that from its own float64: 1.1e-4 to 2.4e-4, and we are 7e-5 from stock.
ROUGH = {"qwen3.5-moe": 1e-4}


def sequences(lengths: list[tuple[int, ...]] = LENGTHS) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    rows = [random.integers(0, VOCABULARY, LONGEST).astype(np.int32) for own in lengths for _ in own]
    return [
        TokenSequence(run, index, tokens := rows.pop(0)[:length], tokens)
        for run, own in enumerate(lengths)
        for index, length in enumerate(own)
    ]


def random_adapters(base: PackedModel, runs: int) -> PackedAdapters:
    targets = [dict.fromkeys(base.shapes, Target(RANK, SCALING * RANK, SCALING))] * runs
    adapters = PackedAdapters(targets, base.shapes, [0.0] * runs, base.dtype, base.device)
    adapters.theta.copy_(0.1 * torch.randn(adapters.theta.shape, generator=torch.Generator().manual_seed(0)))
    base.attach(adapters)
    return adapters


class AdaptedLinear(nn.Module):
    """Stock transformers' layer, and the adapter beside it."""

    def __init__(self, layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.bias = layer, layer.bias
        self.a, self.b = (x.clone().requires_grad_() for x in (a, b))

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + SCALING * (x @ self.a.T @ self.b.T)


def stock_results(name: str, adapters: PackedAdapters, rows: list[TokenSequence], run: int) -> tuple[float, Any]:
    """One run's loss, and the gradient of its adapters by module, by stock transformers."""
    model = tiny_model(name).requires_grad_(False)
    adapted = {}
    for module, (a, b) in adapters.tensors(run).items():
        adapted[module] = AdaptedLinear(model.get_submodule(module), a, b)
        model.set_submodule(module, adapted[module])
    losses = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens).long()
        if row.run_index == run and len(tokens) > 1:
            logits = model(tokens[None], use_cache=False).logits[0]
            losses.append(cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
    torch.stack(losses).sum().backward()
    return float(sum(losses).detach()), {module: (layer.a.grad, layer.b.grad) for module, layer in adapted.items()}


def built(name: str, path: ComputePath) -> PackedModel:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    return pack_model(tiny_model(name), DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", LONGEST), path=path)


def check(name: str, path: ComputePath, recompute: bool, lengths: list[tuple[int, ...]] = LENGTHS) -> None:
    base = built(name, path)
    rows = sequences(lengths)
    adapters = random_adapters(base, len(lengths))
    if recompute:
        base.checkpoint_activations()
    batch = MicroBatch(rows, len(lengths), packs.CPU)
    losses = sums_per_run(add_gradients(base, batch, torch.ones(len(lengths) + 1), None), batch)
    for run in range(len(lengths)):
        loss, expected = stock_results(name, adapters, rows, run)
        assert float(losses[run]) == pytest.approx(loss, rel=1e-6)
        found = adapters.tensors(run, adapters.gradient)
        largest = max(float(g.norm()) for pair in expected.values() for g in pair if g is not None)
        for module, gradients in expected.items():
            for mine, other in zip(found[module], gradients, strict=True):
                other = torch.zeros_like(mine) if other is None else other
                error = float((mine - other).norm()) / (float(other.norm()) + 1e-3 * largest)
                assert error < ROUGH.get(name, TOLERANCE), f"{module}: {error:.1e}"


COMPUTED = [name for name, entry in ARCHITECTURES.items() if entry.causal]
# Falcon calls PyTorch's attention itself, which our decoder reads and nobody can exchange.
EXCHANGED = [
    name
    for name in COMPUTED
    if ARCHITECTURES[name].path in ("own", "flat") and ARCHITECTURES[name].model_type != "falcon"
]
# Rotation in place, ALiBi, Conv1D, recurrence, a router, a layer called once a sequence, weights read directly, vision.
SHORT = {"falcon-7b", "bloom", "gpt2", "qwen3.5", "mixtral", "zaya", "jamba", "gemma3"}


def briefly(names: list[str]) -> list[Any]:
    return each(names, SHORT)


RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@RECOMPUTE
@pytest.mark.parametrize("name", briefly(COMPUTED))
def test_padded_sequences(name: str, recompute: bool) -> None:
    check(name, "padded", recompute)


@RECOMPUTE
@pytest.mark.parametrize("name", briefly(EXCHANGED))
def test_flat_tokens(name: str, recompute: bool) -> None:
    check(name, "flat", recompute)


@pytest.mark.parametrize("lengths", [[(LONGEST,)], [(5, LONGEST)]], ids=["one sequence", "one run"])
@pytest.mark.parametrize(("name", "path"), [("olmo", "flat"), ("olmo", "padded"), ("falcon-7b", "padded")])
def test_projections_of_a_single_run_may_be_changed_in_place(
    name: str, path: ComputePath, lengths: list[tuple[int, ...]]
) -> None:
    check(name, path, recompute=False, lengths=lengths)


@RECOMPUTE
@pytest.mark.parametrize("name", ["gpt2", "qwen3.5", "mixtral"])
def test_padded_sequences_in_buckets(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.buckets.length_buckets.__defaults__", (6,))
    batch = MicroBatch(sequences(), len(LENGTHS), packs.CPU)
    assert [bucket.total for bucket in batch.buckets[0]] == [2 * LONGEST - 3, 14, 1]
    check(name, "padded", recompute)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doge", "makes its own attention mask"),
        ("falcon-7b", "attention by code of its own"),
        # Its chunks are of 8 tokens.
        ("llama4", "other tokens than those before it or a sliding window"),
    ],
)
def test_attention_that_flat_tokens_do_not_compute_is_named(name: str, reason: str) -> None:
    with pytest.raises(UnknownAttention, match=reason):
        built(name, "flat")


def test_a_key_that_all_heads_share_is_expanded_for_fused_kernels() -> None:
    base = built("falcon-7b", "padded")
    random_adapters(base, len(LENGTHS))
    heads: list[set[int]] = []

    class Noting(TorchFunctionMode):
        """Sees what the mode within it calls."""

        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention:
                heads.append({x.shape[1] for x in args[:3]})
            return func(*args, **(kwargs or {}))

    with Noting():
        for _ in range(2):
            add_gradients(base, MicroBatch(sequences(), len(LENGTHS), packs.CPU), torch.ones(len(LENGTHS) + 1), None)
    assert len(heads) == 2 * len(base.model.transformer.h)
    assert all(len(kinds) == 1 for kinds in heads)


def test_windows_are_measured_at_the_longest_sequence() -> None:
    """Far beyond what the probe's few tokens would show; a window as long as the longest sequence is none."""
    model = tiny_model("gemma3-text")
    sliding = model.config.layer_types.count("sliding_attention")
    setup = DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", WINDOW + 1)
    windows = list(pack_model(model, setup, path="flat").context.windows.values())
    assert windows.count(WINDOW) == sliding > 0
    assert windows.count(None) == len(windows) - sliding > 0
    setup = DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", WINDOW)
    assert set(pack_model(tiny_model("gemma3-text"), setup, path="flat").context.windows.values()) == {None}


@pytest.mark.parametrize("name", briefly(COMPUTED))
def test_a_nan_of_one_run_reaches_no_other(name: str) -> None:
    base = built(name, "padded")
    adapters = random_adapters(base, len(LENGTHS))
    found = []
    for broken in (False, True):
        if broken:
            adapters.theta[1] = torch.nan
            adapters.gradient.zero_()
        batch = MicroBatch(sequences(), len(LENGTHS), packs.CPU)
        losses = sums_per_run(add_gradients(base, batch, torch.ones(len(LENGTHS) + 1), None), batch)
        found.append((losses[[0, 2]], adapters.gradient[[0, 2]].clone()))
    assert losses[1].isnan()
    for mine, other in zip(*found, strict=True):
        # A router sends a NaN's tokens elsewhere, and products of other sizes round otherwise.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_an_index_by_a_single_number_is_a_slice() -> None:
    """Falcon's queries, keys and values: a list would make the host wait, and sort in the backward."""
    x = torch.arange(24.0).view(2, 3, 4).requires_grad_()
    attention = StockAttention()
    for index in ((..., [-1]), (..., [-2], slice(None)), ([0], slice(1, 3))):
        with attention.watched():
            found = x[index]
        names = {node.name() for node, _ in found.grad_fn.next_functions} if found.grad_fn else set()
        assert "SliceBackward0" in names
        found.add_(0)
        assert torch.equal(found, x[index])
        assert torch.equal(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (found, x[index])))
    with attention.watched():
        assert x[..., [0, 2]].grad_fn is not None
