"""Our decoder against transformers': what a description says of an architecture, and that it is computed."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import packs
from architectures import ARCHITECTURES, each, tiny_model
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.lora.parameters import PackedAdapters
from train.lora.targets import Target
from train.model.anatomy import layers_name
from train.nn.description import (
    DecoderDescription,
    LayerDescription,
    MlpDescription,
    ModuleMlp,
    Rotation,
    Undescribable,
)
from train.nn.facts import measure_sizes
from train.nn.kept import activations
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.nn.reading import describe, describe_model
from train.nn.rotation import RotaryTables
from train.nn.varlen import Scores

# In float64, of which transformers' grouped products of experts know nothing.
OURS = [
    name for name, entry in ARCHITECTURES.items() if entry.path == "own" and entry.missing is None and not entry.moe
]
# Mixtures of experts, whose attention is ours.
MIXED = [name for name in ("gpt-oss", "qwen3-moe", "granite-moe") if ARCHITECTURES[name].missing is None]
# Every idea of a description once: norms before, behind and both, 1 + w, windows, two rotations, fused projections, parts of heads,
# multipliers, caps, layers without rotation, parallel branches, layer norms, pairs, plain MLPs, attention of the model's own.
QUICK = [
    "qwen3",
    "gemma2",
    "gemma3-text",
    "phi4-mini",
    "olmo2",
    "granite",
    "smollm3",
    "cohere2",
    "glm4",
    "starcoder2",
    "gpt-oss",
    "falcon-7b",
]
# Sequences of two runs; longer than the windows, shorter, and of one token.
LENGTHS = ((17, 1), (24, 5, 11))
RANK = 4


def each_layer(name: str) -> tuple[LayerDescription, ...]:
    return describe(tiny_model(name)).layers


def sequences(vocabulary: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    drawn = [
        (run, place, random.integers(3, vocabulary, length).astype(np.int32))
        for run, lengths in enumerate(LENGTHS)
        for place, length in enumerate(lengths)
    ]
    return [TokenSequence(run, place, tokens, tokens) for run, place, tokens in drawn]


def random_adapters(base: PackedModel, names: list[str] | None = None) -> PackedAdapters:
    """Adapters of the layers `names`, else of all, of both runs, with all numbers away from zero."""
    targets = [dict.fromkeys(names or base.shapes, Target(RANK, float(RANK), 1.0)) for _ in LENGTHS]
    adapters = PackedAdapters(targets, base.shapes, [0.0] * len(LENGTHS), base.dtype, packs.CPU)
    random = torch.Generator().manual_seed(2)
    for run in range(len(LENGTHS)):
        for both in adapters.tensors(run).values():
            for tensor in both:
                tensor.normal_(std=0.1, generator=random)
    adapters.refresh()
    base.attach(adapters)
    return adapters


def hidden_of_transformers(
    model: PreTrainedModel, adapters: PackedAdapters, run: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last hidden state [length, hidden] of one sequence, and the adapters' tensors that autograd knows."""
    leaves: list[torch.Tensor] = []
    handles = []
    for name, (a, b) in adapters.tensors(run).items():
        mine = [x.clone().requires_grad_() for x in (a, b)]
        leaves += mine
        hook = lambda _m, inputs, out, mine=mine: out + inputs[0] @ mine[0].T @ mine[1].T  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    hidden = model.get_decoder()(tokens[None], use_cache=False)[0][0]
    for handle in handles:
        handle.remove()
    return hidden, leaves


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-6))


@pytest.mark.parametrize(
    "name",
    each(dict.fromkeys(OURS + MIXED), QUICK),
)
def test_our_decoder_computes_hidden_states_and_gradients_of_transformers(name: str) -> None:
    model = tiny_model(name, torch.float64).requires_grad_(False)
    # Before transformers 5.23 its fused attention left soft caps out.
    model.set_attn_implementation("eager")
    # Its grouped products take no float64.
    model.set_experts_implementation("eager")
    base = pack_model(
        copy.deepcopy(model), DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=64), path="own"
    )
    assert base.path == "own"
    adapters = random_adapters(base)
    batch = MicroBatch(sequences(packs.VOCABULARY), len(LENGTHS), packs.CPU)
    hidden = base.hidden_states(batch)
    direction = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward(hidden, direction)
    expected = torch.zeros_like(adapters.gradient)
    start = 0
    for sequence in sequences(packs.VOCABULARY):
        end = start + len(sequence.tokens)
        theirs, leaves = hidden_of_transformers(
            model, adapters, sequence.run_index, torch.from_numpy(sequence.tokens).long()
        )
        # transformers rounds norms and rotations to float32.
        assert difference(hidden[start:end], theirs) < 1e-5
        found = iter(torch.autograd.grad(theirs, leaves, direction[start:end], allow_unused=True))
        for both in adapters.tensors(sequence.run_index, expected).values():
            for place in both:
                gradient = next(found)
                place.add_(0 if gradient is None else gradient)
        start = end
    for run in range(len(LENGTHS)):
        mine, truths = (adapters.tensors(run, each) for each in (adapters.gradient, expected))
        largest = max(float(b.norm()) for _, b in truths.values())
        for module, both in truths.items():
            for found_gradient, truth in zip(mine[module], both, strict=True):
                assert float((found_gradient - truth).norm()) < 1e-5 * max(float(truth.norm()), 0.01 * largest), module
    kept = adapters.gradient.clone()
    adapters.gradient.zero_()
    base.checkpoint_activations()
    torch.autograd.backward(base.hidden_states(batch), direction)
    assert torch.equal(adapters.gradient, kept)


def test_norms_stand_where_the_numbers_say() -> None:
    def names(layer: LayerDescription) -> list[str | None]:
        norms = (layer.attention_norm, layer.attention_out_norm, layer.mlp_norm, layer.mlp_out_norm)
        return [None if norm is None else norm.name for norm in norms]

    assert names(each_layer("llama")[0]) == ["input_layernorm", None, "post_attention_layernorm", None]
    # The same name, and another place.
    assert names(each_layer("olmo2")[0]) == [None, "post_attention_layernorm", None, "post_feedforward_layernorm"]
    assert names(each_layer("gemma3-text")[0]) == [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ]  # fmt: skip
    cohere = each_layer("cohere")[0]
    assert cohere.parallel
    assert cohere.shares_norm
    assert cohere.attention_norm is not None
    assert cohere.attention_norm.centered


def test_layers_of_one_model_differ() -> None:
    gemma = each_layer("gemma3-text")
    assert [layer.attention.window is not None for layer in gemma] == [True, True, False, True]
    kinds = [layer.attention.query.rotation.layer_type for layer in gemma if layer.attention.query.rotation]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.attention.query.rotation is None for layer in each_layer("smollm3")] == [False, False, True, False]
    assert [type(layer.mlp) for layer in each_layer("qwen3-moe")] == [ModuleMlp, MlpDescription, ModuleMlp]


def test_numbers_are_named_by_where_the_model_keeps_them() -> None:
    layer = each_layer("granite")[0]
    assert (layer.attention_multiplier.attribute, layer.attention_multiplier.value) == ("residual_multiplier", 0.6)
    assert layer.attention.scale.attribute == "scaling"
    description = describe(tiny_model("granite"))
    assert (description.embedding_multiplier.owner, description.embedding_multiplier.attribute) == (
        "config",
        "embedding_multiplier",
    )
    norm = each_layer("gemma")[0].attention_norm
    assert norm is not None
    assert norm.offset == 1.0


def test_a_model_is_described_by_a_smaller_copy() -> None:
    """By kinds of layers: the copy may have fewer."""
    model = tiny_model("gemma3-text")
    weights = copy.deepcopy(model.state_dict())
    found: DecoderDescription = describe_model(model)
    assert [layer.attention.window is None for layer in found.layers] == [False, False, True, False]
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("diffllama", "attention 2 times"),
        ("mamba", "attention 0 times"),
        ("gptj", "attention 0 times"),
        ("falcon-alibi", "attention takes attn_mask"),
        ("gpt2", "first layer's input"),
        ("bitnet", "no linear layer reads"),
        ("deepseek-v3", "do not read the same"),
    ],
)
def test_what_no_description_says_is_refused_with_its_place(name: str, reason: str) -> None:
    with pytest.raises(Undescribable, match=reason):
        describe(tiny_model(name))


def test_a_planted_factor_is_found() -> None:
    """A multiplier that no attribute holds would be lost in another size."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda _m, _i, out: (out[0] * 1.37, out[1]))
    with pytest.raises(Undescribable, match=r"1\.37"):
        describe(model)


def test_sequences_turn_by_their_own_lengths() -> None:
    """LongRoPE's frequencies change at 12 tokens here: sequences of 17 and 5 tokens in one micro-batch take different ones."""
    test_our_decoder_computes_hidden_states_and_gradients_of_transformers("phi3-longrope-crossing")


@pytest.mark.parametrize(("name", "trained"), [("phi3-longrope-crossing", 12), ("llama-dynamic-rope", 16)])
def test_tables_are_those_of_each_sequence_alone(name: str, trained: int) -> None:
    """Sequences of 17, 1, 24, 5 and 11 tokens, on both sides of the length where frequencies change."""
    config = ARCHITECTURES[name].config()
    if "dynamic" in name:
        config.max_position_embeddings = trained

    def decoder() -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model.model

    rotation = Rotation("rotary_emb")
    batch = MicroBatch(sequences(packs.VOCABULARY), len(LENGTHS), packs.CPU)
    x = torch.zeros(batch.total, 8)
    found = RotaryTables([rotation], decoder())(x, batch)[rotation]
    start = 0
    for length in (length for lengths in LENGTHS for length in lengths):
        # A module remembers the longest sequence that it saw, so each gets a fresh one.
        expected = decoder().rotary_emb(x[None], torch.arange(length)[None])
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[start : start + length], theirs[0], rtol=1e-5, atol=1e-6)
        start += length
    # The third tokens of the sequences of 17 and of 5 tokens.
    long, short = found[0][2], found[0][17 + 1 + 24 + 2]
    assert not torch.allclose(short, long, rtol=1e-3)


class NoAttention:
    """A kernel for flat sequences that keeps what all of them keep, and computes nothing."""

    def forward(self, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, _scores: Scores) -> tuple[torch.Tensor, ...]:
        return (q.new_zeros(*q.shape[:2], v.shape[-1]),)


def kept_per_token(base: PackedModel, monkeypatch: pytest.MonkeyPatch) -> float:
    """Numbers that the layers leave in memory for their backward, per token, without weights, tables and adapters' products."""
    batch = MicroBatch(sequences(packs.VOCABULARY), len(LENGTHS), packs.CPU)
    found: dict[int, int] = {}
    tables: list[int] = []
    make_tables = RotaryTables.__call__

    def noted_tables(self: RotaryTables, *arguments: Any) -> Any:
        made = make_tables(self, *arguments)
        tables.extend(table.untyped_storage().data_ptr() for both in made.values() for table in both)
        return made

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dim() > 1 and len(tensor) == batch.total and storage.data_ptr() not in tables:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    monkeypatch.setattr(RotaryTables, "__call__", noted_tables)
    # So that the first layer is as the others, whose input has a gradient.
    base.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = base.hidden_states(batch)
    # The last norm's input is no layer's.
    return sum(found.values()) / batch.total - hidden.shape[1]


@pytest.mark.parametrize("adapted", [["q_proj", "qkv_proj", "query_key_value"], None], ids=["queries", "all"])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "phi4-mini",
        "olmo2",
        "gemma3-text",
        "gemma4-dense",
        "cohere",
        "stablelm-parallel",
        "arcee",
        "gpt-neox",
        "falcon-7b",
        "falcon-40b",
    ],
)
def test_what_is_kept_for_the_backward_is_what_the_forecast_counts(
    name: str, adapted: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Padded attention would keep padded copies; GPUs have kernels for flat sequences.
    monkeypatch.setattr("train.nn.attention._varlen_kernel", lambda *_: NoAttention())
    model = tiny_model(name)
    description = describe_model(model)
    base = pack_model(model, DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=64), path="own")
    names = [n for n in base.shapes if adapted is None or n.endswith(tuple(adapted))]
    random_adapters(base, names)
    counted = activations(description, layers_name(model), base.shapes, model.config.hidden_size)
    assert kept_per_token(base, monkeypatch) == counted.values(names)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "mamba"])
def test_forecasts_count_what_the_description_says(name: str) -> None:
    size = measure_sizes(tiny_model(name)).size()
    by_names = replace(size, activations=None)
    # Two norms more in each of 3 layers, with inputs of 64 features, which the names of linear layers do not tell.
    assert size.kept_values() - by_names.kept_values() == (3 * 2 * 64 if name == "gemma2" else 0)
    assert (size.activations is None) == (name == "mamba")


def test_a_configuration_that_fails_is_no_description() -> None:
    """Sizes that fit nowhere, as a user's own config.json may have them."""
    model = tiny_model("llama")
    model.config.num_attention_heads = 0
    with pytest.raises(Undescribable):
        describe_model(model)


@pytest.mark.parametrize("model_type", ["mistral", "starcoder2", "qwen3", "ministral"])
def test_a_window_is_read_by_its_name_where_another_number_is_as_large(model_type: str) -> None:
    """A window of 6 in the small copy, and 6 queries for a key."""
    config = AutoConfig.for_model(
        model_type, vocab_size=97, hidden_size=48 * 16, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=48, num_key_value_heads=8, head_dim=16, sliding_window=4096, use_sliding_window=True,
        layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [layer.attention.window.attribute for layer in describe_model(model).layers] == ["sliding_window"] * 2
