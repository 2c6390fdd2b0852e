"""What the trainer chooses for a device, on Llama-2-7B's numbers."""

from dataclasses import replace
from typing import Any

from train.config import QuantConfig, TrainConfig
from train.sizing import (
    FULL_GPU_TOKENS,
    BaseSize,
    Device,
    ExpertsSize,
    Fit,
    base_bytes,
    choose_fit,
    kept_values,
    token_bytes,
)

GIB = 2**30
HIDDEN, MLP = 4096, 11_008
LAYER = {
    **{f"self_attn.{name}": (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": (MLP, HIDDEN) for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": (HIDDEN, MLP),
}
LLAMA_7B = BaseSize(
    32, HIDDEN, 6_738_415_616, {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in LAYER.items()}
)
H200, T4, LAPTOP = Device("cuda", 139.8 * GIB), Device("cuda", 15 * GIB), Device("cpu", 16 * GIB)


def chosen(device: Device, longest: int = 512, *, load_in_4bit: bool = True, **train: Any) -> Fit:
    settings = TrainConfig(learning_rate=1e-3, batch_size=4, **train)
    return choose_fit(settings, QuantConfig(load_in_4bit=load_in_4bit), LLAMA_7B, 2, device, longest)


def test_a_large_gpu_holds_the_base_in_full_width_and_keeps_activations() -> None:
    fit = chosen(H200)
    assert (fit.residency, fit.checkpoint_activations) == ("resident", False)
    assert fit.micro_batch_tokens >= FULL_GPU_TOKENS
    assert fit.graphs


def test_graphs_need_room_for_another_micro_batch() -> None:
    assert not chosen(Device("cuda", 40 * GIB), gradient_checkpointing=False).graphs


def test_a_small_gpu_holds_nf4_and_recomputes() -> None:
    fit = chosen(T4)
    assert (fit.residency, fit.checkpoint_activations) == ("nf4", True)
    # More would be no faster there.
    assert fit.micro_batch_tokens == 1920
    assert not fit.graphs


def test_a_sequence_longer_than_what_fits_is_recomputed() -> None:
    kept = chosen(H200).micro_batch_tokens
    assert chosen(H200, longest=kept + 1).checkpoint_activations


def test_a_cpu_never_recomputes_and_what_is_not_quantized_is_resident() -> None:
    assert not chosen(LAPTOP, longest=100_000).checkpoint_activations
    assert chosen(T4, load_in_4bit=False, residency="nf4").residency == "resident"


def test_the_user_has_the_last_word() -> None:
    fit = chosen(H200, residency="nf4", gradient_checkpointing=True, micro_batch_tokens=7)
    assert fit == Fit("nf4", True, 7, graphs=False)


def test_what_a_layer_keeps_is_what_its_backward_reads() -> None:
    query_and_value = [name for name in LLAMA_7B.linears if name.endswith(("q_proj", "v_proj"))]
    # both residual inputs, q, k, v, attention's result, what q and v read; gate and up
    assert kept_values(LLAMA_7B, query_and_value) == 32 * (7 * HIDDEN + 2 * MLP)
    # also what gate and up read, and what down reads
    assert kept_values(LLAMA_7B) == 32 * (8 * HIDDEN + 3 * MLP)


def test_recomputing_keeps_the_layers_inputs_and_one_layer() -> None:
    kept, again = (token_bytes(LLAMA_7B, 2, recomputed=recomputed) for recomputed in (False, True))
    assert kept - again == 2 * (31 * (8 * HIDDEN + 3 * MLP) - 32 * HIDDEN)


def test_the_example_of_the_docstring() -> None:
    quant = QuantConfig(load_in_4bit=True)
    assert f"{base_bytes(LLAMA_7B, quant, 'resident', 2) / GIB:.2f}" == "12.55"
    assert f"{base_bytes(LLAMA_7B, quant, 'nf4', 2) / GIB:.2f}" == "3.60"
    assert kept_values(LLAMA_7B) == 32 * 65_792 == 2_105_344
    assert [token_bytes(LLAMA_7B, 2, recomputed=recomputed) for recomputed in (False, True)] == [4_317_696, 500_736]
    for gib, residency, kept, recomputed, recomputes, tokens in (
        (80, "resident", 8386, 72_316, False, 8386),
        (40, "resident", 3413, 29_429, True, 5120),
        (15, "nf4", 1417, 12_222, True, 1920),
    ):
        fit = chosen(Device("cuda", gib * GIB))
        assert (fit.residency, fit.checkpoint_activations, fit.micro_batch_tokens) == (residency, recomputes, tokens)
        room = (gib * GIB - base_bytes(LLAMA_7B, quant, fit.residency, 2)) / 2
        found = [int(room / token_bytes(LLAMA_7B, 2, recomputed=again)) for again in (False, True)]
        assert found == [kept, recomputed]


# Qwen3-30B-A3B: 48 layers of 128 experts of 768 features, 8 of which each token chooses.
ATTENTION = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)}
QWEN3_30B = BaseSize(
    48,
    2048,
    30_532_122_624,
    {f"model.layers.{i}.self_attn.{name}": shape for i in range(48) for name, shape in ATTENTION.items()},
    ExpertsSize(48 * 128 * 3 * 768 * 2048, 128, 8),
)


def test_experts_are_held_in_4_bit_and_a_token_uses_those_that_it_chose() -> None:
    assert QWEN3_30B.used_parameters == 48 * (18_874_368 + 8 * 3 * 768 * 2048)
    assert QWEN3_30B.expert_width == 8 * 768
    held = base_bytes(QWEN3_30B, QuantConfig(load_in_4bit=True), "nf4", 2)
    # 29.9e9 weights in 4 bit, embeddings and head in 16, and 768 MiB for the dequantized gate and up of one layer.
    assert 15.6 < held / GIB < 16.6
    assert base_bytes(QWEN3_30B, QuantConfig(load_in_4bit=False), "resident", 2) == 2 * QWEN3_30B.parameters


def test_experts_keep_the_input_of_their_activation() -> None:
    without = replace(QWEN3_30B, experts=None)
    assert kept_values(QWEN3_30B) - kept_values(without) == 48 * 2 * 8 * 768
    # A row at both ends for each of eight experts is more than attention's backward holds.
    assert token_bytes(QWEN3_30B, 2, recomputed=True) > token_bytes(without, 2, recomputed=True) + 2 * 16 * 2048
