"""Times the kernels of decoders besides Llama's, one by one, with shapes of real models: see README.md in this folder.

Each line is forward + backward of one layer in microseconds, and how fast the forward moves its bytes. `--launches 32,32,4,2
64,16,8,2` times attention of 256 features with these launches too: BLOCK, STEP, num_warps and num_stages of all three kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.rows import table
from train.nn import activations, functional, heads
from train.nn.functional import Norm, dispatch
from train.nn.heads import HeadTransform
from train.nn.varlen import Flash, Scores, Triton, VarlenKernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if FUSED else torch.float32
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """One kernel: what runs forward and backward, and the bytes that the forward reads and writes."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    forward_bytes: int


def numbers(*shape: int) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def lengths_of(tokens: int) -> list[int]:
    """The lengths of the rows that everyone trains on, until there are `tokens`."""
    lengths = np.diff(table(32_000).offsets)
    return [int(n) for n in lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]]


def head_cases(tokens: int) -> Iterator[Case]:
    """Norms and rotations of queries."""
    for name, count, dim, rotated, transform in (
        ("Llama-2-7B, rotated", 32, 128, 128, HeadTransform()),
        ("Qwen3-8B, normed and rotated", 32, 128, 128, HeadTransform(Norm(numbers(128), 1e-6))),
        ("Gemma-3-4B, normed and rotated", 8, 256, 256, HeadTransform(Norm(numbers(256), 1e-6))),
        ("OLMo-2-7B, normed over all heads", 32, 128, 128, HeadTransform(Norm(numbers(4096), 1e-6), over_all_heads=True)),
        ("Phi-4-mini, a part rotated", 24, 128, 96, HeadTransform()),
    ):  # fmt: skip
        x, gradient = numbers(tokens, count, dim), numbers(tokens, count, dim)
        cos, sin = numbers(tokens, rotated), numbers(tokens, rotated)
        of_llama = transform.norm is None and rotated == dim
        formulas: tuple[Any, Any] = (
            (heads.apply_rotary, heads.apply_rotary_backward)
            if of_llama
            else (heads.prepare_heads, heads.prepare_heads_backward)
        )
        forward = (x, cos, sin) if of_llama else (x, cos, sin, transform)
        backward = (gradient, cos, sin) if of_llama else (gradient, x, cos, sin, transform)
        yield Case(
            name,
            lambda f=formulas[0], given=forward: dispatch(f, FUSED, *given),
            lambda f=formulas[1], given=backward: dispatch(f, FUSED, *given),
            2 * x.nbytes,
        )


def row_cases(tokens: int) -> Iterator[Case]:
    """Norms before and behind a branch, and activations."""
    for hidden in (2560, 4096):
        x, y, gradient = (numbers(tokens, hidden) for _ in range(3))
        norm = Norm(numbers(hidden).float(), 1e-6)
        yield Case(
            f"norm before, {hidden}",
            lambda x=x, n=norm: dispatch(functional.normalize, FUSED, x, n),
            lambda x=x, y=y, g=gradient, n=norm: dispatch(functional.normalize_backward, FUSED, g, y, x, n),
            2 * x.nbytes,
        )
        yield Case(
            f"norm behind, {hidden}",
            lambda x=x, y=y, n=norm: dispatch(functional.add_normed, FUSED, x, y, n, 1.0),
            lambda y=y, g=gradient, n=norm: dispatch(functional.add_normed_backward, FUSED, g, y, n, 1.0),
            3 * x.nbytes,
        )
        yield Case(
            f"norm behind and norm before, {hidden}",
            lambda x=x, y=y, n=norm: dispatch(functional.renorm, FUSED, x, y, n, 1.0, n),
            lambda x=x, y=y, g=gradient, n=norm: dispatch(functional.renorm_backward, FUSED, g, g, x, y, n, 1.0, n),
            4 * x.nbytes,
        )
    for inner, activation in ((11_008, "silu"), (10_240, "gelu_tanh")):
        joined, gradient = numbers(tokens, 2 * inner), numbers(tokens, inner)
        gate, up = (x.contiguous() for x in joined.chunk(2, 1))
        yield Case(
            f"{activation}(gate) * up, {inner}",
            lambda gate=gate, up=up, a=activation: dispatch(activations.gated, FUSED, gate, up, a),
            lambda gate=gate, up=up, g=gradient, a=activation: dispatch(
                activations.gated_backward, FUSED, g, gate, up, a
            ),
            3 * gate.nbytes,
        )
        yield Case(
            f"the same, of one matrix, {inner}",
            lambda x=joined, a=activation: dispatch(activations.split_gated, FUSED, x, a),
            lambda x=joined, g=gradient, a=activation: dispatch(activations.split_gated_backward, FUSED, g, x, a),
            3 * gate.nbytes,
        )


def attention_cases(tokens: int, kernel: VarlenKernel, who: str) -> Iterator[Case]:
    """Attention within rows of some 130 tokens, and within one long one."""
    rows = lengths_of(tokens)
    for of_queries, of_keys, dim, lengths, window, softcap in (
        (32, 32, 128, rows, None, None),
        (16, 16, 128, rows, None, None),
        (8, 4, 256, rows, None, None),
        (16, 8, 256, rows, None, None),
        (8, 4, 256, rows, None, 50.0),
        (40, 10, 128, rows, None, None),
        (32, 8, 96, rows, None, None),
        (8, 4, 256, [tokens], None, None),
        (8, 4, 256, [tokens], 1024, None),
        (32, 8, 128, [tokens], None, None),
        (32, 8, 128, [tokens], 1024, None),
    ):
        if softcap is not None and isinstance(kernel, Flash):
            continue
        starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        scores = Scores(starts, -(-max(lengths) // 128) * 128, dim**-0.5, window, softcap)
        q, k, v, gradient = (numbers(sum(lengths), n, dim) for n in (of_queries, of_keys, of_keys, of_queries))
        kept = kernel.forward(q, k, v, scores)
        options = "".join([f", window {window}" if window else "", f", cap {softcap}" if softcap else ""])
        yield Case(
            f"{who}, {of_queries} / {of_keys} heads of {dim}, {len(lengths)} rows{options}",
            lambda given=(q, k, v, scores): kernel.forward(*given),
            lambda given=(gradient, q, k, v, kept, scores): kernel.backward(*given),
            2 * q.nbytes + k.nbytes + v.nbytes,
        )


def microseconds(call: Callable[[], Any]) -> float:
    """The median of a call, replayed as a CUDA graph, so that no launch is waited for."""
    call()
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    found = []
    for _ in range(7):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        found.append(1e3 * first.elapsed_time(last) / REPEATS)
    return statistics.median(found)


def show(cases: Iterator[Case]) -> None:
    """Print a line for each case."""
    for case in cases:
        forward, backward = microseconds(case.forward), microseconds(case.backward)
        gb = case.forward_bytes / forward / 1e3
        print(f"{case.name:62} {forward:8.1f} + {backward:8.1f} us {gb:8.0f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096 if FUSED else 64)
    parser.add_argument(
        "--only", choices=("heads", "rows", "attention"), nargs="*", default=("heads", "rows", "attention")
    )
    parser.add_argument("--launches", nargs="*", default=[])
    arguments = parser.parse_args()
    if "heads" in arguments.only:
        show(head_cases(arguments.tokens))
    if "rows" in arguments.only:
        show(row_cases(arguments.tokens))
    # Attention's kernels need a GPU.
    if "attention" not in arguments.only or not FUSED:
        return
    show(attention_cases(arguments.tokens, Flash(), "FlashAttention-2"))
    show(attention_cases(arguments.tokens, Triton(), "ours"))
    from train.nn.triton import attention

    for launch in arguments.launches:
        names = ("BLOCK", "STEP", "num_warps", "num_stages")
        for launches in (attention.FORWARD, attention.QUERIES, attention.KEYS):
            launches[256] = dict(zip(names, map(int, launch.split(",")), strict=True))
        cases = attention_cases(arguments.tokens, Triton(), f"ours by {launch}")
        show(case for case in cases if " of 256" in case.name)


if __name__ == "__main__":
    main()
