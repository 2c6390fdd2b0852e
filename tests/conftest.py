"""What every test may use. No test reaches a model hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read once, when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# What tracking.mode=auto follows; tests of tracking say what they want.
os.environ["WANDB_MODE"] = "disabled"
# Likewise, by torch: the models here are too small to share out.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Likewise, by Triton, which is imported after this: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import model_facts
from launcher.estimate import checking
from train.config import ModelConfig
from train.model.source import model_fingerprint
from train.store.layout import CacheDir


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Chromium by its fixture, and say loudly that tests for a GPU did not run where there is none."""
    no_gpu = pytest.mark.skip(reason="NOT TESTED ON A GPU: torch finds none here")
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session", autouse=True)
def measured_in_this_process() -> Iterator[None]:
    """Let plans made in this process measure models in it: the process of its own would import torch again for every fresh cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checking, "measured_facts", model_facts.measured_here)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, CacheDir, Path]:
    """``builtin:tiny``, staged: its configuration with fingerprint, the cache that holds it, its folder."""
    # Here, so that torch is loaded only for tests that ask for a model.
    from train.model.staging import stage_model

    cache = CacheDir(tmp_path_factory.mktemp("cache"))
    model = ModelConfig(name="tiny", source="builtin:tiny")
    model = model.model_copy(update={"fingerprint": model_fingerprint(model)})
    return model, cache, stage_model(model, cache)
