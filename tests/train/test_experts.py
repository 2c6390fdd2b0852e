"""Mixtures of experts in 4 bit: exchanged modules compute what transformers' own compute with the dequantized weights."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import packs
from architectures import ARCHITECTURES, LONGEST, VOCABULARY, tiny_model
from model_facts import sizes
from train.config import ModelConfig, QuantConfig
from train.model.base_cache import BaseCache, BaseSpec
from train.model.experts import ExpertStack, expert_stacks
from train.model.linears import frozen_linears
from train.model.nf4 import dequantize, quantize, quantize_stack
from train.model.quantized import QuantizedBase, hollow_model, load_model
from train.model.quantizing import Quantizer
from train.nn.backends import EAGER
from train.nn.expert_forms import exchange_experts, experts_form
from train.nn.experts import CHUNK_BYTES, DenseStack, PackedExperts, Stack, mixture
from train.nn.forward_context import ForwardContext
from train.nn.packed_model import DeviceSetup, pack_model
from train.sizing import BaseSize, ExpertsSize, base_bytes, dequantized_bytes
from train.store.layout import CacheDir

MIXTURES = [name for name, entry in ARCHITECTURES.items() if entry.moe]
# Whose modules have a forward of another kind: every expert sees tokens of its own from the start.
OWN_FORWARD = {"llama4"}
TOKENS = torch.randint(0, VOCABULARY, (3, LONGEST), generator=torch.Generator().manual_seed(0))
SINGLE = packs.NF4.model_copy(update={"bnb_4bit_use_double_quant": False})


class Mixture:
    """A tiny model whose stacks have values that NF4 can hold, and the same model with its experts exchanged."""

    def __init__(self, name: str, dtype: torch.dtype, in_four_bits: bool) -> None:
        if missing := ARCHITECTURES[name].missing:
            pytest.skip(missing)
        model = tiny_model(name, torch.float32).requires_grad_(False)
        stacks = expert_stacks(model)
        packed = {name: quantize_stack(stack.matrices, packs.NF4) for name, stack in stacks.items()}
        for name, stack in stacks.items():
            stack.weight.copy_(packed[name].dense(slice(None)).reshape(stack.weight.shape))
        self.theirs = model.to(dtype)
        self.ours = copy.deepcopy(self.theirs)

        def hold(name: str, stack: ExpertStack) -> Stack:
            return packed[name] if in_four_bits else DenseStack(stack.matrices.clone())

        exchange_experts(self.ours, ForwardContext(EAGER), hold)


def computed(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of random inputs, and the gradient of the inputs."""
    random = torch.Generator().manual_seed(1)
    inputs = model.get_input_embeddings().weight[TOKENS].clone().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    (gradient,) = torch.autograd.grad((logits * torch.randn(logits.shape, generator=random)).sum(), inputs)
    return logits.detach(), gradient


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_in_4_bit_computes_what_transformers_does_with_the_dequantized_weights(name: str) -> None:
    model = Mixture(name, torch.float32, in_four_bits=True)
    for found, expected in zip(computed(model.ours), computed(model.theirs), strict=True):
        # Some families amplify rounding; each module is compared more closely below.
        assert difference(found, expected) < 2e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_no_experts_stay_in_full_width(name: str) -> None:
    model = Mixture(name, torch.float32, in_four_bits=True)
    assert expert_stacks(model.theirs)
    assert not expert_stacks(model.ours)
    wide = [n for n, p in model.ours.named_parameters() if p.dim() > 2 and min(p.shape[-2:]) > 1 and "conv" not in n]
    assert wide == []
    assert any(isinstance(module, PackedExperts) for module in model.ours.modules()) == (name not in OWN_FORWARD)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("name", sorted(set(MIXTURES) - OWN_FORWARD))
def test_each_exchanged_module_and_its_gradients_are_exact(name: str, dtype: torch.dtype, within: float) -> None:
    model = Mixture(name, dtype, in_four_bits=dtype == torch.float32)
    for path, ours in packed_experts(model.ours).items():
        inputs = random_inputs(ours, dtype)
        theirs = model.theirs.get_submodule(path)
        # Behind transformers' choice of an implementation, of which the others round otherwise.
        own_forward = inspect.unwrap(type(theirs).forward)
        expected = with_gradients(partial(own_forward, theirs), *inputs)
        for grouped, chunk_bytes in [(False, 2**26), (False, 2**13), (True, 2**26), (True, 2**13)]:
            # float64 has no grouped product.
            if not grouped or dtype == torch.float32:
                found = with_gradients(ways(ours, grouped=grouped, chunk_bytes=chunk_bytes), *inputs)
                for a, b in zip(found, expected, strict=True):
                    assert difference(a, b) < within


def packed_experts(model: PreTrainedModel) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def random_inputs(experts: PackedExperts, dtype: torch.dtype, tokens: int = 9) -> tuple[torch.Tensor, ...]:
    """Hidden states, choices of two experts (never the last one), their weights, and a gradient of the output."""
    random = torch.Generator().manual_seed(2)
    down = experts.held["down_proj"]
    hidden = down.shape[1] if experts.form.transposed else down.shape[0]
    x, g = torch.randn(2, tokens, hidden, generator=random, dtype=dtype)
    chosen = torch.rand(tokens, len(down) - 1, generator=random).topk(2).indices
    return x.requires_grad_(), chosen, torch.rand(tokens, 2, generator=random, dtype=dtype).requires_grad_(), g


def with_gradients(
    module: Callable[..., torch.Tensor], x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, g: torch.Tensor
) -> list[torch.Tensor]:
    """The output, and the gradients of hidden states and of the router's weights."""
    y = module(x, chosen, weights)
    return [y.detach(), *torch.autograd.grad(y, (x, weights), g)]


def ways(experts: PackedExperts, *, grouped: bool, chunk_bytes: int) -> Callable[..., torch.Tensor]:
    """The module with a product per expert or grouped ones, and so many bytes of experts dequantized at once."""

    def module(*inputs: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
            return mixture(*inputs, experts.form.weights(experts.own, experts.held), grouped=grouped)

    return module


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_choices_than_experts_are_grouped_right(tokens: int) -> None:
    model = Mixture("deepseek-v3", torch.float32, in_four_bits=True)
    for experts in packed_experts(model.ours).values():
        inputs = random_inputs(experts, torch.float32, tokens)
        apart = with_gradients(ways(experts, grouped=False, chunk_bytes=2**26), *inputs)
        grouped = with_gradients(ways(experts, grouped=True, chunk_bytes=2**26), *inputs)
        for a, b in zip(grouped, apart, strict=True):
            assert difference(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_a_nan_stays_in_its_token(name: str, dtype: torch.dtype) -> None:
    model = Mixture(name, dtype, in_four_bits=False)
    experts = next(iter(packed_experts(model.ours).values()))
    x, chosen, weights, g = random_inputs(experts, dtype)
    clean = with_gradients(experts, x, chosen, weights, g)
    with torch.no_grad():
        x[3] = torch.nan
        g[5] = torch.inf
    found = with_gradients(experts, x, chosen, weights, g)
    others = [token for token in range(len(x)) if token not in (3, 5)]
    assert found[0][3].isnan().all()
    assert not found[1][5].isfinite().any()
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("quant", [packs.NF4, SINGLE], ids=["double", "single"])
# 64 values are a block, 256 blocks share a second scale: of the last shapes one fills neither, the other both.
@pytest.mark.parametrize("shape", [(3, 8, 24), (4, 5, 7), (2, 256, 64)])
def test_each_expert_is_quantized_for_itself(shape: tuple[int, int, int], quant: QuantConfig) -> None:
    random = torch.Generator().manual_seed(3)
    # Of very different size, so that a shared scale would show.
    weight = torch.randn(shape, generator=random) * 10.0 ** torch.arange(shape[0])[:, None, None]
    stack = quantize_stack(weight, quant)
    dense = stack.dense(slice(None))
    for expert, matrix in enumerate(weight):
        torch.testing.assert_close(dense[expert], dequantize(*quantize(matrix.flatten(), quant)).view(matrix.shape))
    assert torch.equal(stack.dense(torch.tensor([shape[0] - 1, 0])), dense[[-1, 0]])
    assert torch.equal(stack.dense(slice(1, 2)), dense[1:2])


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "llama4"])
def test_experts_come_back_from_the_cache_as_they_were_quantized(name: str, tmp_path: Path) -> None:
    Mixture(name, torch.float32, in_four_bits=False).theirs.save_pretrained(tmp_path / "model")
    about = ModelConfig(name="tiny", source=str(tmp_path / "model"), fingerprint=name)
    spec = BaseSpec(tmp_path / "model", about, packs.NF4, torch.float32, packs.CPU)
    base = BaseCache(CacheDir(tmp_path / "cache"), lambda: None).open(spec)
    again = BaseCache(CacheDir(tmp_path / "cache"), lambda: None).open(spec)
    hollow = hollow_model(spec.model_dir, about, torch.float32, base)
    stored = expert_stacks(load_model(spec.model_dir, about, torch.float32, packs.CPU))
    stacks = expert_stacks(hollow)
    assert stacks.keys() == stored.keys() != set()
    for stack_name, stack in stacks.items():
        assert stack.weight.is_meta
        expected = quantize_stack(stored[stack_name].matrices, packs.NF4).tensors()
        for read in (base, again):
            found = read.stack(stack_name, stack).tensors()
            assert all(torch.equal(found[part], expected[part]) for part in expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_launcher_counts_the_experts_of_a_configuration(name: str, tmp_path: Path) -> None:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    model = tiny_model(name, torch.float32)
    model.config.save_pretrained(tmp_path)
    stacks = expert_stacks(model).values()
    size = sizes(tmp_path).size().experts
    assert size is not None
    assert size.parameters == sum(stack.weight.numel() for stack in stacks)
    assert {size.count} == {stack.experts for stack in stacks}
    assert size.chosen == (1 if name in {"llama4", "zaya"} else 2)


# Modules of other forms: methods of a module above call the stacks, an index beyond the experts returns its input, and parameters have
# the matrices of all experts below each other.
OTHER_FORMS: dict[str, dict[str, Any]] = {
    "jetmoe": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 32,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "longcat_flash": {
        "hidden_size": 64, "num_layers": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FORMS)
def test_other_forms_keep_their_forward_on_dequantized_weights(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **OTHER_FORMS[kind], vocab_size=VOCABULARY)
    theirs: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    quantizer = Quantizer(packs.NF4, packs.CPU, lambda: None)
    tensors = quantizer.finish(copy.deepcopy(theirs))
    base = QuantizedBase(list(tensors), tensors.__getitem__, packs.CPU)
    stacks = expert_stacks(theirs)
    assert stacks
    packed = {name: base.stack(name, stack) for name, stack in stacks.items()}
    for name, stack in stacks.items():
        stack.weight.copy_(packed[name].dense(slice(None)).reshape(stack.weight.shape))
    ours = copy.deepcopy(theirs)
    exchange_experts(ours, ForwardContext(EAGER), lambda name, _: packed[name])
    assert not expert_stacks(ours)
    for found, expected in zip(computed(ours), computed(theirs), strict=True):
        assert difference(found, expected) < 1e-6
    # Nothing in full width is left behind.
    assert all(getattr(stack.module, stack.attribute) is None for stack in of_copy(ours, stacks))


def of_copy(model: PreTrainedModel, stacks: dict[str, ExpertStack]) -> list[ExpertStack]:
    """The same stacks in a copy of their model."""
    names = {name: name.rpartition(".")[0] for name in stacks}
    return [replace(stack, module=model.get_submodule(names[name])) for name, stack in stacks.items()]


def test_a_quantized_mixture_takes_the_bytes_of_the_forecast() -> None:
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stacks = expert_stacks(model).values()
    experts = ExpertsSize(sum(stack.weight.numel() for stack in stacks), 16, 4)
    linears = {name: linear.shape for name, linear in frozen_linears(model).items()}
    base = BaseSize(2, 256, model.num_parameters(), linears, experts)
    quantizer = Quantizer(packs.NF4, packs.CPU, lambda: None)
    held = sum(tensor.nbytes for tensor in quantizer.finish(model).values())
    expected = base_bytes(base, packs.NF4, "nf4", 2) - dequantized_bytes(base, 2)
    # Tables and names of small linear layers are a part of this size, and of no real one.
    assert held == pytest.approx(expected, rel=0.03)
    assert experts.parameters > 0.8 * base.parameters


def test_a_norm_behind_each_expert_is_computed_with_its_gradient() -> None:
    muse_spark = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    sizes = {"num_local_experts": 4, "moe_hidden_size": 24, "moe_intermediate_size": 16, "post_norm_eps": 1e-5}
    torch.manual_seed(0)
    theirs = muse_spark.MuseSparkExperts(SimpleNamespace(**sizes, hidden_act="silu", _experts_implementation="eager"))
    for parameter in theirs.double().requires_grad_(False).parameters():
        parameter.normal_()
    stacks = expert_stacks(theirs)
    form = experts_form(theirs, stacks)
    assert form is not None
    held = {name: DenseStack(stack.matrices) for name, stack in stacks.items()}
    ours = PackedExperts(theirs, form, held, ForwardContext(EAGER))
    inputs = random_inputs(ours, torch.float64)
    expected = with_gradients(theirs, *inputs)
    for a, b in zip(with_gradients(ours, *inputs), expected, strict=True):
        assert difference(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_diverging_run_leaves_the_others_of_a_mixture_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = pack_model(tiny_model("qwen3-moe", dtype), DeviceSetup(packs.NF4, packs.CPU, "nf4", 64), path="flat")
    configs = [packs.run_config(train={"max_steps": 3, "eval_steps": 0, "seed": seed}) for seed in range(3)]
    healthy = packs.train(tmp_path / "healthy", base, configs)
    loop = packs.make_loop(tmp_path / "ill", base, configs)
    sessions: list[packs.Recording] = list(loop.sessions)  # type: ignore[arg-type]
    for a, _ in loop.adapters.tensors(1).values():
        a.fill_(torch.nan)
    loop.run()
    assert not packs.run_dirs(tmp_path / "ill")[1].result.exists()
    for run in (0, 2):
        for name, pair in healthy[run].final.items():
            assert all(torch.equal(*both) for both in zip(pair, sessions[run].final[name], strict=True))
