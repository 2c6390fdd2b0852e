"""The compiler and its assembler need no GPU: every kernel compiles for every generation, and fits its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import packs

pytestmark = pytest.mark.slow

if packs.LACKS_TRITON is not None:
    pytest.skip(packs.LACKS_TRITON, allow_module_level=True)

# What a block may take of a multiprocessor's memory (CUDA's programming guide, compute capabilities).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
SHAPES = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from train.nn.activations import ACTIVATIONS
from train.nn.triton import activations, attention, functional, grouped_mm, heads

CAPABILITY = int(sys.argv[1])
NARROW = {
    "bounds": "*i32", "starts": "*i32", "targets": "*i64", "weights": "*fp32", "losses": "*fp32", "correct": "*i1",
    "applies": "*i1", "log_sums": "*fp32", "deltas": "*fp32", "eps": "fp32", "scale": "fp32", "factor": "fp32", "multiplier": "fp32",
} | {name: "i32" for name in (
    "groups parts total columns K N M x_row stack_group stack_k stack_n left_row right_row row_stride gradient_stride "
    "q_row k_row v_row out_row gradient_row q_grad_row k_grad_row v_grad_row grad_row gate_row up_row"
).split()}
UNKNOWN = {"groups", "parts", "total"}  # of which nothing is promised
found = {}

def compiled(kernel, dtype, num_warps=4, num_stages=3, types={}, **constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, NARROW.get(n, "*" + dtype)) for n in names}
    aligned = [n for n in names if signature[n] not in ("constexpr", "fp32") and n not in UNKNOWN]
    source = ASTSource(
        kernel, signature, {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    shared = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options).metadata.shared
    name = kernel.fn.__name__
    found[name] = max(found.get(name, 0), shared)

for rank in (16, 128):
    for K, N, whole_rows in ((4096, rank, "stack_k"), (rank, 4096, "stack_k"), (4096, rank, "stack_n"), (rank, 4096, "stack_n")):
        blocks = grouped_mm.bmm_blocks(K, N) | {"GROUPS": grouped_mm.LEAST_GROUPS, whole_rows: 1}
        compiled(grouped_mm._bmm, "bf16", **blocks)
    for M, N in ((4096, rank), (rank, 4096), (4096, 4096)):
        compiled(grouped_mm._outer_grad, "bf16", types={"out": "*fp32"}, **grouped_mm.outer_grad_blocks(M, N))
for (dim, of_values), window, cap in (
    ((32, 32), None, None), ((64, 64), None, None), ((96, 96), None, None), ((128, 128), None, None), ((192, 128), None, None),
    ((512, 512), None, None), ((128, 128), "i32", None), ((256, 256), "i32", "fp32"),
):
    constants = {"GROUP": 2, "DIM": dim, "WIDTH": triton.next_power_of_2(dim)}
    constants |= {"V_DIM": of_values, "V_WIDTH": triton.next_power_of_2(of_values)}
    types = {name: kind for name, kind in (("window", window), ("cap", cap)) if kind}
    constants |= {name: None for name in ("window", "cap") if name not in types}
    for kernel, launches in (
        (attention._forward, attention.FORWARD),
        (attention._backward_queries, attention.QUERIES),
        (attention._backward_keys, attention.KEYS),
    ):
        compiled(kernel, "bf16", types=types, **constants, **attention.launch_for(launches, dim))
for dtype in ("bf16", "fp32"):
    whole = functional._whole_row(3584)
    for centered, weight, bias in ((False, "*fp32", None), (True, "*" + dtype, "*" + dtype), (True, None, None)):
        types = {name: kind for name, kind in (("weight", weight), ("bias", bias)) if kind}
        constants = {name: None for name in ("weight", "bias") if name not in types}
        constants |= {"CENTERED": centered, "DIM": 3584} | whole
        compiled(functional._normalize, dtype, types=types, **constants)
        compiled(functional._add_normed, dtype, types=types, NORMED=True, **constants)
        next_weights = {"next_weight": "*fp32", "next_eps": "fp32"}
        compiled(functional._renorm, dtype, types=types | next_weights, NEXT_CENTERED=False, next_bias=None, **constants)
        constants.pop("bias", None)
        types.pop("bias", None)
        compiled(functional._renorm_backward, dtype, types=types | next_weights, NEXT_CENTERED=False, **constants)
        compiled(functional._normalize_backward, dtype, types=types, multiplier=None, **constants)
        compiled(functional._normalize_backward, dtype, types=types, passed=None, **constants)
    for activation in ACTIVATIONS:
        constants = {"ACTIVATION": activation, "DIM": 11008, "BLOCK": activations.BLOCK}
        alone = [{}, {}] if dtype == "bf16" else [{"up": None}, {"up": None, "up_grad": None}]
        compiled(activations._gated, dtype, **alone[0], **constants)
        compiled(activations._gated_backward, dtype, **alone[1], **constants)
    compiled(heads._rotary, dtype, HEADS=9, HALF=48, BACK=True, HEAD_BLOCK=16, HALF_BLOCK=64)
    shape = {"HEADS": 32, "DIM": 96, "HEAD_BLOCK": 32, "DIM_BLOCK": 128, "num_warps": 8}
    for rotary, over_all, centered, interleaved, first in (
        (96, False, False, False, False), (96, True, False, False, False), (48, False, True, True, True),
        (0, False, False, False, False),
    ):
        constants = {"NORMED": True, "CENTERED": centered, "OVER_ALL": over_all, "WEIGHT_HEAD": 96 * over_all, "ROTARY": rotary}
        constants |= {"INTERLEAVED": interleaved, "ROTATE_FIRST": first, **shape}
        if not rotary:
            constants |= {"cos": None, "sin": None}
        compiled(heads._prepare_heads, dtype, bias=None, types={"weight": "*" + dtype}, **constants)
        compiled(heads._prepare_heads_backward, dtype, types={"weight": "*" + dtype}, **constants)
    for cap in (0.0, 30.0):
        compiled(functional._cross_entropy, dtype, VOCAB=152_064, BLOCK=functional.VOCAB_BLOCK, CAP=cap, num_warps=8)
    choices = {"types": {"inverse": "*i64"}, "CHOICES": 8, "DIM": 2048, "BLOCK": functional.BLOCK}
    compiled(functional._sum_by_token, dtype, **choices)
    compiled(functional._sum_by_token, dtype, factors=None, **choices)
factors = dict.fromkeys("rate decay clip beta1 beta2 correction1 root_correction2 eps".split(), "*fp32")
compiled(functional._adamw, "fp32", types=factors, BLOCK=functional.BLOCK)
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_for_every_gpu_and_fit_it(capability: int, tmp_path: Path) -> None:
    """By ranks 16 to 128, heads of 32 to 512 features, rows of no power of two."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # In front of what this process was given: on a rented machine packages may lie in a folder of their own.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SHAPES, str(capability)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    shared = json.loads(said.stdout)
    assert len(shared) == 18
    assert {name: size for name, size in shared.items() if size > SHARED_BYTES[capability]} == {}
