"""Which of a GPU's ways are taken, with torch's answer to its compute capability standing in for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import packs
from train import kernels
from train.config import TrainConfig
from train.errors import BadInput
from train.kernels import PLAIN, Kernels, choose_kernels, lacks_a_compiler

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with an A100, Triton, gcc and Python's headers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return monkeypatch


def train_config(**values: object) -> TrainConfig:
    return packs.run_config(train=values).train


def test_what_each_precision_takes(gpu: pytest.MonkeyPatch) -> None:
    assert choose_kernels(GPU, torch.bfloat16) == Kernels(varlen=True, grouped=True, fused=True, graphs=True)
    assert choose_kernels(GPU, torch.float16) == Kernels(varlen=True, grouped=True, fused=True)
    assert choose_kernels(GPU, torch.float32) == Kernels(fused=True)
    assert choose_kernels(GPU, torch.bfloat16, compiles=False) == Kernels(varlen=True)
    assert choose_kernels(GPU, torch.bfloat16, graphs=False) == Kernels(varlen=True, grouped=True, fused=True)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernels(GPU, torch.float16) == choose_kernels(packs.CPU, torch.float32) == PLAIN


def test_a_machine_with_a_compiler_lacks_nothing(gpu: pytest.MonkeyPatch) -> None:
    assert lacks_a_compiler(GPU, train_config()) is None


@pytest.mark.parametrize("lost", ["triton", "gcc", "CC", "Python.h"])
def test_what_is_missing_is_named_and_a_user_who_insists_is_refused(
    gpu: pytest.MonkeyPatch, tmp_path: Path, lost: str
) -> None:
    if lost == "triton":
        gpu.setattr(kernels, "find_spec", lambda name: None)
    elif lost == "CC":
        gpu.setenv("CC", "icx")
    else:
        (tmp_path / lost).unlink()
    missing = lacks_a_compiler(GPU, train_config())
    assert missing is not None
    named = {"triton": "pip install triton", "gcc": "gcc and clang", "CC": "icx", "Python.h": "python3-dev"}[lost]
    assert named in missing
    with pytest.raises(BadInput, match=r"train\.compile=true, but "):
        lacks_a_compiler(GPU, train_config(compile=True))
    assert lacks_a_compiler(GPU, train_config(compile=False)) is None
    assert lacks_a_compiler(packs.CPU, train_config(compile=True)) is None
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert lacks_a_compiler(GPU, train_config()) is None
