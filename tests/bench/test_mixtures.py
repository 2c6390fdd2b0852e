"""The mixture whose 16-bit copy never exists, made small: it has to open the first time on a GPU that is lent for minutes."""

from pathlib import Path

import packs
from bench.measuring import Setting
from bench.mixtures import mixture_folder, qwen3_30b_a3b
from bench.ours import run_config
from train.model.base_cache import BaseCache
from train.model.folder import check_model_folder, experts_size
from train.nn.experts import PackedExperts
from train.store.layout import CacheDir
from train.trainer.base import fit_to_device, open_base


def test_a_job_opens_a_mixture_that_never_existed_in_16_bit(tmp_path: Path) -> None:
    config = qwen3_30b_a3b(layers=2, experts=16, hidden=256, vocabulary=320)
    folder = mixture_folder(tmp_path, config, packs.CPU)
    # On a disk that has holes the weights take a few blocks for their header.
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_blocks * 512 < weights.stat().st_size / 10
    check_model_folder(folder)
    size = experts_size(folder)
    assert size is not None
    assert (size.parameters, size.count, size.chosen) == (2 * 16 * 3 * 96 * 256, 16, 8)
    kept = [*(tmp_path / "cache" / "bases").glob("*/about.json")]
    run = run_config(folder, Setting(), seed=0)
    run = run.model_copy(update={"train": run.train.model_copy(update={"dtype": "bfloat16", "residency": "nf4"})})
    base = open_base(
        run, folder, fit_to_device(run, folder, 64), 64, BaseCache(CacheDir(tmp_path / "cache"), lambda: None)
    )
    assert [*(tmp_path / "cache" / "bases").glob("*/about.json")] == kept
    experts = [module for module in base.model.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == 2
    assert base.parameters > size.parameters
