"""Which of a GPU's ways are taken, with torch's answer to its compute capability standing in for the GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch

import packs
from train.config import TrainConfig
from train.errors import BadInput
from train.nn.backends import EAGER, Kernels, choose_kernels, missing_compiler

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An A100 by torch's answer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return monkeypatch


class Driver:
    """Triton's own, as far as it is asked, or its error."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    @property
    def active(self) -> Driver:
        if self._error is not None:
            raise self._error
        return self

    def get_current_target(self) -> str:
        return "sm_80"


def train_config(**values: object) -> TrainConfig:
    return packs.run_config(train=values).train


def test_what_each_precision_takes(gpu: pytest.MonkeyPatch) -> None:
    sixteen_bit = Kernels(
        flash_varlen=True, efficient_varlen=True, triton_attention=True, grouped_lora=True, fused_elementwise=True
    )
    assert choose_kernels(GPU, torch.bfloat16) == replace(sixteen_bit, cuda_graphs=True)
    assert choose_kernels(GPU, torch.float16) == sixteen_bit
    assert choose_kernels(GPU, torch.float32) == Kernels(efficient_varlen=True, fused_elementwise=True)
    assert choose_kernels(GPU, torch.float64) == EAGER
    assert choose_kernels(GPU, torch.bfloat16, compiles=False) == Kernels(flash_varlen=True, efficient_varlen=True)
    assert choose_kernels(GPU, torch.bfloat16, graphs=False) == sixteen_bit
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernels(GPU, torch.float16) == Kernels(efficient_varlen=True)
    assert choose_kernels(GPU, torch.float64) == choose_kernels(packs.CPU, torch.float32) == EAGER


def test_a_machine_with_a_compiler_lacks_nothing(gpu: pytest.MonkeyPatch) -> None:
    gpu.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=Driver()))
    assert missing_compiler(GPU, train_config()) is None


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (None, "ModuleNotFoundError: "),
        (
            SimpleNamespace(driver=Driver(RuntimeError("Failed to find C compiler."))),
            "RuntimeError: Failed to find C compiler.",
        ),
        (SimpleNamespace(driver=Driver(CalledProcessError(1, ["gcc", "main.c"]))), "gcc"),
    ],
    ids=["no Triton", "no compiler", "no headers"],
)
def test_what_is_missing_is_named_and_a_user_who_insists_is_refused(
    gpu: pytest.MonkeyPatch, runtime: SimpleNamespace | None, words: str
) -> None:
    # None is how Python remembers that there is no such module.
    gpu.setitem(sys.modules, "triton.runtime", runtime)
    missing = missing_compiler(GPU, train_config())
    assert missing is not None
    assert words in missing
    with pytest.raises(BadInput, match=r"train\.compile=true, but Triton cannot build here"):
        missing_compiler(GPU, train_config(compile=True))
    assert missing_compiler(GPU, train_config(compile=False)) is None
    assert missing_compiler(packs.CPU, train_config(compile=True)) is None
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert missing_compiler(GPU, train_config()) is None


@pytest.mark.skipif(packs.LACKS_TRITON is not None or len(packs.DEVICES) > 1, reason="wants Triton and no GPU")
def test_triton_itself_says_that_there_is_no_gpu(gpu: pytest.MonkeyPatch) -> None:
    assert "0 active drivers" in str(missing_compiler(GPU, train_config()))
