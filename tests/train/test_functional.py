"""Written-out gradients against autograd's of the same formulas, in float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from train.nn.activations import ACTIVATIONS, activate, activate_autograd, gated, gated_autograd, gated_backward
from train.nn.attention import _seen
from train.nn.functional import (
    CHUNK_NUMEL,
    Norm,
    add_normed,
    add_normed_autograd,
    dispatch,
    masked_attention,
    norm_residual,
    normalize,
    normalize_backward,
    renorm_autograd,
)
from train.nn.heads import HeadTransform, apply_rotary, heads_autograd, prepare_heads, rotary_autograd


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHT, BIAS, COS, SIN = numbers(8), numbers(7)[:1] + numbers(8), numbers(5, 8), numbers(5, 9)[:, 1:]
NORMS = {
    "rms": Norm(WEIGHT, 1e-6),
    "layer": Norm(WEIGHT, 1e-6, BIAS, centered=True),
    "rms without weight": Norm(None, 1e-6),
    "layer without weight": Norm(None, 1e-6, centered=True),
}
Case = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], int]


def _sum(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0] * 2 + pair[1]


def _cases() -> Iterator[tuple[str, Case]]:
    """A formula, which autograd differentiates; the same with the gradient written out; and how many matrices both take."""
    for name, norm in NORMS.items():
        yield name, (lambda x, n=norm: normalize(x, n) * 2 + x, lambda x, n=norm: _sum(norm_residual(x, n, False)), 1)
        added = (
            partial(add_normed, norm=norm, multiplier=0.3),
            partial(add_normed_autograd, norm=norm, multiplier=0.3, fused=False),
        )
        yield f"{name} behind", (*added, 2)
        yield (
            f"{name} behind and layer before",
            (
                lambda x, y, n=norm: normalize(h := add_normed(x, y, n, 0.3), NORMS["layer"]) * 2 + h,
                lambda x, y, n=norm: _sum(renorm_autograd(x, y, n, 0.3, NORMS["layer"], False)),
                2,
            ),
        )
    for multiplier in (1.0, 0.3):
        added = (
            partial(add_normed, norm=None, multiplier=multiplier),
            partial(add_normed_autograd, norm=None, multiplier=multiplier, fused=False),
        )
        yield f"sum with {multiplier}", (*added, 2)
    for name in ACTIVATIONS:
        yield name, (partial(activate, activation=name), partial(activate_autograd, activation=name, fused=False), 1)
        yield (
            f"gated {name}",
            (
                partial(gated, activation=name),
                lambda gate, up, name=name: gated_autograd((gate, up), name, False),
                2,
            ),
        )
        yield (
            f"gated {name}, joined",
            (
                partial(gated, activation=name),
                lambda gate, up, name=name: gated_autograd((torch.cat([gate, up], 1),), name, False),
                2,
            ),
        )
    yield (
        "rotation",
        (
            lambda x: apply_rotary(x.view(5, 2, 4), COS[:, :4], SIN[:, :4]),
            lambda x: rotary_autograd(x.view(5, 2, 4), COS[:, :4], SIN[:, :4], False),
            1,
        ),
    )


CASES = dict(_cases())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_autograds(case: str, checkpointed: bool) -> None:
    """Checkpointed too, where a backward may read what it kept a single time."""
    formula, ours, inputs = CASES[case]
    given = [numbers(5, 8).mul(i + 1) for i in range(inputs)]
    if checkpointed:
        ours = partial(checkpoint, ours, use_reentrant=False)
    results = [_value_and_gradients(f, given) for f in (formula, ours)]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


TRANSFORMS = {
    "none": HeadTransform(),
    "per head": HeadTransform(Norm(numbers(4), 1e-6)),
    "layer norm per head, each its own": HeadTransform(Norm(numbers(2, 4), 1e-6, numbers(2, 4) + 1, centered=True)),
    "all heads": HeadTransform(Norm(numbers(8), 1e-6), over_all_heads=True),
    "all heads, centered": HeadTransform(Norm(numbers(8), 1e-6, centered=True), over_all_heads=True),
}


@pytest.mark.parametrize("rotated", [0, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotate_first", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_of_heads_are_autograds(transform: str, rotate_first: bool, interleaved: bool, rotated: int) -> None:
    taken = replace(TRANSFORMS[transform], rotate_first=rotate_first, interleaved=interleaved)
    cos_sin = (COS[:, :rotated], SIN[:, :rotated]) if rotated else None
    results = [
        _value_and_gradients(f, [numbers(5, 8)])
        for f in (
            lambda x: prepare_heads(x.view(5, 2, 4), *(cos_sin or (None, None)), taken),
            lambda x: heads_autograd(x.view(5, 2, 4), cos_sin, taken, False),
        )
    ]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_norms_and_activations_are_torchs() -> None:
    x = numbers(5, 8)
    torch.testing.assert_close(normalize(x, NORMS["rms"]), torch.rms_norm(x, (8,), WEIGHT, 1e-6))
    torch.testing.assert_close(normalize(x, NORMS["layer"]), torch.layer_norm(x, (8,), WEIGHT, BIAS, 1e-6))
    for name, theirs in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu2", "relu2")):
        torch.testing.assert_close(activate(x, name), ACT2FN[theirs](x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_fused_norms_are_ours(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, by weights as wide as x and wider."""
    gradient, passed, x = (numbers(5, 8).mul(i + 1).to(dtype) for i in range(3))
    tolerance = 5e-3 if dtype == torch.float16 else 1e-5
    for weights in (dtype, torch.float32):
        results = []
        for device in ("cpu", "cuda"):
            norm = _moved(NORMS[name], device, weights)
            moved = [each.to(device) for each in (gradient, passed, x)]
            results.append((normalize(moved[2], norm).cpu(), normalize_backward(*moved, norm).cpu()))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def _moved(norm: Norm, device: str, dtype: torch.dtype) -> Norm:
    weight, bias = (None if each is None else each.to(device, dtype) for each in (norm.weight, norm.bias))
    return Norm(weight, norm.eps, bias, norm.centered)


def test_a_wide_weight_keeps_its_bits_in_half_precision() -> None:
    """Gemma's 1 + w: in bfloat16 1.003 would be 1."""
    x = torch.full((1, 8), 300.0, dtype=torch.bfloat16)
    weight = torch.full((8,), 1.003)
    found = normalize(x, Norm(weight, 0.0))
    assert found.dtype == torch.bfloat16
    assert torch.equal(add_normed(x, x, Norm(torch.full((8,), 2.0 + 1e-3), 0.0), 1.0), (x.float() + 2.001).bfloat16())


def test_rotations_are_those_of_llama_phi_and_cohere() -> None:
    x = numbers(5, 16).view(5, 2, 8)
    halves, pairs = COS[:, :2].repeat(1, 2), COS[:, :2].repeat_interleave(2, 1)
    as_theirs = x.transpose(0, 1)[None]
    for theirs, cos, sin, interleaved in (
        (modeling_llama, COS[:, :4].repeat(1, 2), SIN[:, :4].repeat(1, 2), False),
        (modeling_phi3, halves, halves.sin(), False),
        (modeling_cohere, COS[:, :4].repeat_interleave(2, 1), SIN[:, :4].repeat_interleave(2, 1), True),
        (modeling_glm, pairs, pairs.sin(), True),
    ):
        # GLM repeats angles as halves, and orders them anew itself.
        given = (halves, halves.sin()) if theirs is modeling_glm else (cos, sin)
        expected = theirs.apply_rotary_pos_emb(as_theirs, as_theirs, *(y[None] for y in given))[0]
        torch.testing.assert_close(
            apply_rotary(x, cos, sin, interleaved), expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_soft_capped_attention_is_gemma2s(window: int | None) -> None:
    q, k, v = numbers(1, 4, 7, 8), numbers(1, 2, 7, 8) * 2, numbers(1, 2, 7, 8) + 1
    mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    config = modeling_gemma2.Gemma2Config(sliding_window=window)
    config._attn_implementation = "sdpa"
    positions = torch.arange(7)[None]
    seen = mask(
        config=config, inputs_embeds=numbers(1, 7, 8), attention_mask=None, past_key_values=None, position_ids=positions
    )
    # Transformers makes no mask where causality alone does.
    assert (seen is None) == (window in (None, 9))
    seen = _seen(7, None, q.device) if seen is None else seen
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=8)
    expected = modeling_gemma2.eager_attention_forward(
        module, q, k, v, torch.where(seen, 0.0, -torch.inf).double(), scaling=0.7, softcap=2.0
    )[0]
    torch.testing.assert_close(
        masked_attention(q, k, v, _seen(7, window, q.device), 0.7, 2.0).transpose(1, 2), expected, rtol=1e-5, atol=1e-5
    )


def _value_and_gradients(f: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in given]
    value = f(*inputs)
    value.backward(numbers(*value.shape))
    return [value.detach(), *(x.grad for x in inputs if x.grad is not None)]


def test_rows_at_a_time_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in whole vectors: torch's sigmoid rounds what is left over of a vector in another way (2.13, on a CPU)."""
    x, up, gradient = (numbers(37, 64).float() * factor for factor in (1, 2, 3))
    cos, sin = numbers(37, 32).float(), numbers(37, 32).float() * 2
    calls = [
        (gated, x, up, "silu"),
        (gated_backward, gradient, x, up, "silu"),
        (normalize, x, Norm(up[0].contiguous(), 1e-6)),
        (add_normed, x, up, Norm(up[0].contiguous(), 1e-6), 0.5),
        (apply_rotary, x.view(37, 2, 32), cos, sin),
    ]
    whole = [dispatch(formula, False, *arguments) for formula, *arguments in calls]
    # Six rows of 64.
    monkeypatch.setitem(CHUNK_NUMEL, "cpu", 400)
    for (formula, *arguments), expected in zip(calls, whole, strict=True):
        seen: list[int] = []
        found = dispatch(_noting_rows(formula, seen), False, *arguments)
        assert seen == [6] * 6 + [1]
        assert all(torch.equal(*pair) for pair in zip(_tuple(found), _tuple(expected), strict=True))


def test_rows_at_a_time_are_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_NUMEL, "cpu", 50)
    matrix, rows = torch.ones(37, 8), torch.arange(37.0)[:, None]
    assert dispatch(torch.Tensor.mul_, False, matrix[:, 2:], rows) is not None
    assert torch.equal(matrix[:, 2:], rows.expand(37, 6))
    assert torch.equal(matrix[:, :2], torch.ones(37, 2))


def _noting_rows(formula: Callable[..., object], seen: list[int]) -> Callable[..., object]:
    def noting(first: torch.Tensor, *others: object) -> object:
        seen.append(len(first))
        return formula(first, *others)

    return noting


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
