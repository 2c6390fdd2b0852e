"""The numeric judge: what computes something else than stock transformers is refused, and what is right is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import architectures
import packs
from train.errors import BadInput
from train.model.anatomy import text_decoder
from train.model.copies import cut_model, randomize, small_model
from train.model.layer_kinds import build
from train.nn.base import judge_architecture, judge_loaded, weight_reader
from train.nn.judge import PATHS, Verdict, judge
from train.nn.linear import DenseWeight
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.sizing import ComputePath

SETUP = DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=128)
Change = Callable[[Any], None]


def llama(**settings: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | settings)
    model = build(config)
    randomize(model)
    return model


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model by transformers' plain code, as `build` makes it."""
    model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def verdict(model: PreTrainedModel, spoil: Change = lambda _: None, **how: Any) -> Verdict:
    """The judge's verdict where every path is computed by a packed model that `spoil` changed."""

    def packed(own: PreTrainedModel, path: ComputePath) -> PackedModel:
        base = pack_model(own, SETUP, path=path)
        spoil(base)
        return base

    return judge(model, packed, **how)


class Convolved(nn.Module):
    """A layer's MLP, and a causal convolution over the tokens beside it."""

    def __init__(self, mlp: nn.Module, weight: float = 0.5) -> None:
        super().__init__()
        self.mlp = mlp
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        out: torch.Tensor = self.mlp(x) + self.weight * before
        return out


class Recurrent(Convolved):
    """A layer's MLP, and a state that each token passes on to the next."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        states = []
        for token in x.unbind(1):
            state = self.weight * state + token
            states.append(state)
        out: torch.Tensor = self.mlp(x) + torch.stack(states, 1)
        return out


@pytest.mark.parametrize("mixer", [Convolved, Recurrent])
def test_a_second_mixer_is_refused_on_flat_tokens_and_right_on_padded_sequences(mixer: type[Convolved]) -> None:
    model = llama()
    model.model.layers[1].mlp = mixer(model.model.layers[1].mlp)
    found = verdict(model)
    assert found.path == "padded"
    # The layer is named, by the first of its parts that is off.
    assert "model.layers.1.mlp" in found.attempts[1].why


def test_a_mask_that_is_added_to_the_scores_is_not_dropped() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn

    class Sloped(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *args: Any, attention_mask: Any = None, **others: Any) -> Any:
            places = torch.arange(hidden_states.shape[1])
            slope = -0.3 * (places[:, None] - places).abs()[None, None].to(hidden_states)
            causal = torch.full_like(slope, float("-inf")).triu(1)
            return super().forward(hidden_states, *args, attention_mask=slope + causal, **others)

    attention.__class__ = Sloped
    found = verdict(model)
    assert found.path == "padded"
    assert [attempt.passed for attempt in found.attempts] == [False, False, True]


def scale_one_layer(base: PackedModel) -> None:
    """Attention of one layer 1 % too sharp, by its queries."""
    name = next(name for name in base.linears if name.endswith("1.self_attn.q_proj"))
    base.linears[name].frozen = DenseWeight(base.linears[name].weight * 1.01)


def shift_positions(base: PackedModel) -> None:
    decoder = base._decoder

    class Shifted:
        def __call__(self, batch: Any) -> torch.Tensor:
            # Of the sequences behind the first, as a pack that counts on.
            batch.positions = torch.where(batch.run_of_token > 0, batch.positions * 2, batch.positions)
            return decoder(batch)

    base._decoder = Shifted()  # type: ignore[assignment]


def leak_into_few_tokens(share: float) -> Change:
    """A sequence's first token sees the last one of the sequence before it."""

    def spoil(base: PackedModel) -> None:
        decoder = base._decoder

        class Leaking:
            def __call__(self, batch: Any) -> torch.Tensor:
                hidden = decoder(batch)
                starts = batch.sequence_starts[1:-1].long()
                leaked = torch.zeros_like(hidden).index_copy(0, starts, hidden[starts - 1])
                return hidden + share * leaked

        base._decoder = Leaking()  # type: ignore[assignment]

    return spoil


def scale_logits(base: PackedModel) -> None:
    logits = base.head.logits
    base.head.logits = lambda hidden: logits(hidden) * 1.01  # type: ignore[method-assign]


def cap_logits(base: PackedModel) -> None:
    logits = base.head.logits
    base.head.logits = lambda hidden: 30 * torch.tanh(logits(hidden) / 30)  # type: ignore[method-assign]


def forget_a_gradient(base: PackedModel) -> None:
    """An adapter that acts but does not learn: right in every output."""
    attach = base.attach

    def without_one(adapters: Any) -> None:
        attach(adapters)
        if adapters is not None:
            stack = adapters.stacks[next(name for name in adapters.stacks if name.endswith("up_proj"))]
            object.__setattr__(stack, "grad_a", torch.zeros_like(stack.grad_a))

    base.attach = without_one  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "spoil",
    [scale_one_layer, leak_into_few_tokens(1e-3), scale_logits, cap_logits, forget_a_gradient],
    ids=lambda spoil: spoil.__qualname__.split(".")[0],
)
def test_a_wrong_computation_is_refused_on_every_path(spoil: Change) -> None:
    found = verdict(llama(), spoil)
    assert found.path is None
    with pytest.raises(BadInput, match=r"'llama' is computed by no path as .*own: .* differ by .*flat: .*padded: "):
        found.checked("llama")
    assert verdict(llama()).path == "own"


def widen_window(model: Any) -> None:
    model.config.sliding_window += 1
    for module in model.modules():
        if hasattr(module, "sliding_window") and module.sliding_window is not None:
            module.sliding_window += 1


def drop_head_bias(model: Any) -> None:
    model.lm_head.bias.zero_()


def drop_soft_cap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def drop_attention_cap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    model.config.attn_logit_softcapping = None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", widen_window),
        ("phi", drop_head_bias),
        ("gemma2", drop_soft_cap),
        ("gemma2", drop_attention_cap),
    ],
)
def test_a_part_that_is_read_wrongly_is_refused_on_every_path(name: str, change: Change) -> None:
    def packed(own: PreTrainedModel, path: ComputePath) -> PackedModel:
        change(own)
        return pack_model(own, SETUP, path=path)

    model = reference_of(architectures.tiny_model(name))
    found = judge(model, packed)
    assert found.path is None
    assert all(attempt.difference is not None for attempt in found.attempts), found.attempts
    assert verdict(model).path is not None


def test_positions_that_go_on_from_one_sequence_to_the_next_are_refused() -> None:
    found = verdict(llama(), shift_positions)
    # Padded sequences take none of ours.
    assert [attempt.passed for attempt in found.attempts] == [False, False, True]


def test_an_error_in_the_models_own_code_is_a_difference() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise IndexError("no such place. More about it")

    def spoil(base: PackedModel) -> None:
        base._decoder = Broken()  # type: ignore[assignment]

    found = verdict(llama(), spoil)
    assert str(found.attempts[1]) == "flat: IndexError: no such place"


@pytest.mark.parametrize("share", [0.02, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_leak_of_two_percent_is_refused(share: float, dtype: torch.dtype) -> None:
    found = verdict(llama().to(dtype), leak_into_few_tokens(share))
    assert (found.path is None) == (share > 0), found.attempts


def test_a_cut_copy_has_the_real_weights_of_each_kind_of_layer() -> None:
    model = architectures.tiny_model("gemma3-text")
    cut = cut_model(model, weight_reader(model, None), torch.float32, packs.CPU)
    # Layers: sliding, sliding, full, sliding.
    assert len(cut.model.layers) == 2
    theirs = model.model.layers[2].state_dict()
    for name, tensor in cut.model.layers[1].state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", ["llama", "deepseek-v3", "gemma3", "falcon-h1", "qwen3-next", "gpt2"])
def test_a_small_copy_has_every_kind_of_layer_and_few_numbers(name: str) -> None:
    full = build(architectures.ARCHITECTURES[name].config(), "meta")
    small = small_model(full)
    assert {type(m) for m in small.modules()} == {type(m) for m in full.modules()}
    assert small.num_parameters() < 1_000_000
    # Every part matters that text goes through.
    assert all(float(p.abs().max()) > 0 for p in text_decoder(small).parameters())


def as_fast(path: ComputePath | None, listed: ComputePath | None) -> bool:
    """Whether a path is the one that the list names or a faster one; what has to be refused has none."""
    if path is None or listed is None:
        return path is listed
    return PATHS.index(path) <= PATHS.index(listed)


@pytest.mark.parametrize("name", architectures.each(sorted(architectures.ARCHITECTURES)))
def test_the_small_copy_of_an_architecture_is_judged_as_its_own_tiny_model(name: str) -> None:
    entry = architectures.ARCHITECTURES[name]
    if entry.missing:
        pytest.skip(entry.missing)
    model = architectures.tiny_model(name)
    own = judge_loaded(model, weight_reader(model, None), torch.float32, SETUP)
    small = judge_architecture(build(entry.config(), "meta"))
    assert own.path == small.path, (own.attempts, small.attempts)
    assert as_fast(own.path, entry.path), own.attempts


@pytest.mark.parametrize("name", architectures.each(sorted(architectures.ARCHITECTURES)))
def test_no_architecture_that_is_right_is_refused_in_16_bits(name: str) -> None:
    entry = architectures.ARCHITECTURES[name]
    if entry.missing:
        pytest.skip(entry.missing)
    model = architectures.tiny_model(name).to(torch.bfloat16)
    found = judge_loaded(model, weight_reader(model, None), torch.bfloat16, SETUP)
    assert as_fast(found.path, entry.path), found.attempts


@pytest.mark.slow
def test_kernels_that_need_a_gpu_are_not_taken_for_a_copy_on_the_cpu(tmp_path: Path) -> None:
    """As of flash-linear-attention, which transformers takes where it is installed: here one that fails, as it does on CPUs."""
    package = tmp_path / "fla/ops/gated_delta_rule"
    package.mkdir(parents=True)
    for folder in (tmp_path / "fla", tmp_path / "fla/ops"):
        (folder / "__init__.py").touch()
    kernel = "def chunk_gated_delta_rule(*args, **options):\n    raise ValueError('cannot be accessed from Triton')\n"
    (package / "__init__.py").write_text(kernel)
    script = """
import architectures
from train.model.layer_kinds import build
from train.nn.base import judge_architecture
import fla.ops.gated_delta_rule
full = build(architectures.ARCHITECTURES["qwen3.5"].config(), "meta")
print(judge_architecture(full).path)
model = build(full.config)
try:
    model(model.dummy_inputs["input_ids"])
except ValueError as exc:
    print(exc)
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert found.stdout.split("\n", 1) == ["padded", "cannot be accessed from Triton\n"], found.stderr
