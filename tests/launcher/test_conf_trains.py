"""Every YAML in conf/ is composed and trained for one step, each run of each sweep, by the real trainer.

Two stand-ins, where the real thing is out of reach without a hub: a model of the hub is a random one of its own architecture (2 layers
of 64), and a data set of the hub is a small file in the same form.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.compose.composer import compose
from launcher.estimate.catalogue import CATALOGUE
from launcher.estimate.model_table import shipped_models
from launcher.installation import shipped_conf
from launcher.records import Sweep
from train.config import ModelConfig
from train.job import PackJob
from train.lora.peft_files import read_adapter
from train.runtime.signals import STOP_SIGNALS
from train.store.layout import CacheDir
from train.store.storage import make_folder, read_json, write_json, write_text

pytestmark = pytest.mark.slow

Tiny = tuple[ModelConfig, CacheDir, Path]

OPTIONS = [(path.parent.name, path.stem) for path in sorted(shipped_conf().glob("*/*.yaml"))]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Made or fetched without a hub.
HERE = {"tiny", "smollm2"}
QUICK = [
    "train.max_steps=1",
    "train.warmup_ratio=0",
    "train.batch_size=2",
    "data.train_rows=8",
    "data.eval_rows=4",
    "train.sample_tokens=2",
]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A job sets its own signal handlers; in this process they are pytest's again afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def small_model(option: str, tokenizer: Path, folder: Path) -> Path:
    """A random model of the architecture of a shipped one, with the tiny model's tokenizer."""
    shipped = CATALOGUE[shipped_models()[option]] if option != "own" else CATALOGUE["meta-llama/Llama-2-7b-hf"]
    sizes = SMALL | (EXPERTS if shipped.experts else {})
    if shipped.prefix != "model":
        sizes = {"text_config": sizes, "vision_config": TOWER, "mm_tokens_per_image": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(shipped.architecture, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def rows_file(folder: Path) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(30)]))
    return file


def overrides(group: str, option: str, folder: Path, tiny: Path) -> list[str]:
    chosen = [f"{group}={option}", *QUICK]
    if group == "model" and option not in HERE:
        chosen.append(f"model.source={small_model(option, tiny, folder / option)}")
        if option in shipped_models() and CATALOGUE[shipped_models()[option]].fused:
            chosen.append("lora.target_modules=[qkv_proj]")
    elif group != "model":
        chosen.append("model=tiny")
    if group == "data" and option in {"alpaca", "file"}:
        chosen.append(f"data.source={rows_file(folder)}")
    return chosen


def train_here(sweep: Sweep, folder: Path) -> None:
    """Train the runs of a sweep as one job, in this process."""
    for run in sweep.runs:
        make_folder(sweep.run_dir(run).path)
        write_text(sweep.run_dir(run).config, yaml.safe_dump(run.config.model_dump()))
    pack = folder / "pack.json"
    names = [run.folder for run in sweep.runs]
    write_json(pack, {"id": "p", "sweep_dir": str(sweep.dir.path), "cache": str(sweep.cache), "runs": names})
    assert PackJob(str(pack))() == "done"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_trains_a_step(group: str, option: str, tmp_path: Path, tiny_model: Tiny) -> None:
    _, cache, tiny = tiny_model
    words = overrides(group, option, tmp_path, tiny)
    sweep = compose([*words, f"root={tmp_path}/runs", f"cache={cache.path}"])
    train_here(sweep, tmp_path)
    for run in sweep.runs:
        result = read_json(sweep.run_dir(run).result)
        assert result["steps"] == 1
        assert result["run_id"] == run.id
        adapter = read_adapter(sweep.run_dir(run).adapter)
        assert all(float(b.abs().max()) > 0 for _, b in adapter.values()), "the step moved nothing"
