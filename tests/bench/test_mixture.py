"""A mixture whose 16-bit copy never exists, made small: it has to open the first time on a GPU that is lent for minutes."""

from pathlib import Path

import pytest

from bench.measuring import Setting
from bench.ours import run_config
from bench.shapes import SHAPES, Shape, model_folder, quantized_base
from model_facts import sizes
from train.model.base_cache import BaseCache, BaseSpec
from train.model.folder import check_model_folder
from train.nn.backends import resolve_dtype
from train.nn.experts import PackedExperts
from train.store.layout import CacheDir
from train.trainer.base import fit_to_device, open_base, this_device


def test_a_job_opens_a_mixture_that_never_existed_in_16_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SHAPES["qwen3_30b_a3b"]
    small = {"hidden_size": 256, "num_hidden_layers": 2, "num_experts": 16, "moe_intermediate_size": 96}
    monkeypatch.setitem(SHAPES, "small", Shape(real.model_type, real.numbers | small | {"vocab_size": 320}))
    folder = model_folder("small", tmp_path, weights=False)
    check_model_folder(folder)
    facts = sizes(folder)
    size = facts.size().experts
    assert size is not None
    assert (size.parameters, size.count, size.chosen) == (2 * 16 * 3 * 96 * 256, 16, 8)
    run = run_config(folder, Setting(residency="nf4"), seed=0)
    fit = fit_to_device(run, facts, 64)
    cache = CacheDir(tmp_path / "cache")
    dtype = resolve_dtype(run.train, this_device())
    quantized_base(folder, BaseSpec(folder, run.model, run.quant, dtype, this_device()), cache)
    kept = [*(tmp_path / "cache" / "bases").glob("*/about.json")]
    base = open_base(run, folder, fit, 64, BaseCache(cache, lambda: None))
    assert [*(tmp_path / "cache" / "bases").glob("*/about.json")] == kept
    assert len([module for module in base.model.modules() if isinstance(module, PackedExperts)]) == 2
    assert base.parameters > size.parameters


def test_its_shape_is_that_of_qwen3_30b_a3b() -> None:
    shape = SHAPES["qwen3_30b_a3b"]
    # The card of the model: 30.5 billion parameters, of which 3.3 are used; embeddings of 0.3 are looked up, not multiplied.
    assert sum(parameter.numel() for parameter in shape.hollow().parameters()) == 30_532_122_624
    assert shape.flop_parameters == pytest.approx(3.03e9, rel=0.01)
