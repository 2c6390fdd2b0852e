"""The process that the launcher asks for models and data: one JSON answer on stdout, whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from architectures import ARCHITECTURES
from launcher.submit.prepare import unprepared
from train.config import DataConfig, LoraConfig, ModelConfig, QuantConfig, RunConfig, TrainConfig
from train.data.source import data_fingerprint, read_dataset_stats
from train.errors import BadInput
from train.model.source import model_fingerprint
from train.prepare import prepare
from train.store.layout import CacheDir

pytestmark = pytest.mark.slow

TINY = ModelConfig(name="tiny", source="builtin:tiny")
MODEL = TINY.model_copy(update={"fingerprint": model_fingerprint(TINY)})


def data_config(source: Path, **values: Any) -> DataConfig:
    data = DataConfig(name="rows", source=str(source), **values)
    return data.model_copy(update={"fingerprint": data_fingerprint(data)})


def write_rows(path: Path, *answers: str) -> Path:
    rows = [{"instruction": f"Say {i}", "output": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(document: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    process = subprocess.run(
        [sys.executable, "-m", "train.prepare"], input=document, capture_output=True, text=True, check=False
    )
    assert process.stdout.count("\n") == 1, process.stdout
    return json.loads(process.stdout), process


def document(cache: Path, *requests: DataConfig, target: str = "q_proj") -> str:
    loras = [LoraConfig(r=4, lora_alpha=8.0, target_modules=[name]).model_dump() for name in ("v_proj", target)]
    items = [{"model": MODEL.model_dump(), "data": data.model_dump(), "loras": loras} for data in requests]
    return json.dumps({"cache": str(cache), "requests": items})


def test_models_and_tokens_are_there_afterwards_and_the_stats_are_returned(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *["yes"] * 30)
    several = [data_config(path, eval_rows=10), data_config(path, eval_rows=5, response_only=False)]
    answer, process = ask(document(tmp_path / "cache", *several))
    assert answer["ok"], answer
    assert process.returncode == 0
    assert [stats["train_rows"] for stats in answer["prepared"]] == [20, 25]
    for data, stats in zip(several, answer["prepared"], strict=True):
        model_dir = stats.pop("model_dir")
        assert (Path(model_dir) / "config.json").is_file()
        assert read_dataset_stats(data, MODEL, CacheDir(tmp_path / "cache")) == stats
    assert "20 rows to train on, 10 held out; 0 truncated to 512 tokens, 0 dropped" in process.stderr


def test_a_users_mistake_is_an_answer(tmp_path: Path) -> None:
    answer, process = ask(document(tmp_path / "cache", data_config(write_rows(tmp_path / "rows.jsonl", "yes", ""))))
    assert answer["ok"] is False
    assert (answer["error"], answer["exit_code"], process.returncode) == ("BadInput", 2, 2)
    assert f"{tmp_path}/rows.jsonl:2: output is empty" in answer["message"]
    assert "Traceback" not in process.stderr


def test_a_target_that_the_fetched_model_lacks_is_refused_before_the_tokenizing(tmp_path: Path) -> None:
    data = data_config(write_rows(tmp_path / "rows.jsonl", *["yes"] * 30), eval_rows=10)
    answer, _ = ask(document(tmp_path / "cache", data, target="c_attn"))
    assert (answer["error"], answer["exit_code"]) == ("BadInput", 2)
    assert "'c_attn', which is not a linear layer of the model that can be adapted; it has q_proj" in answer["message"]
    assert not (tmp_path / "cache" / "tokens").exists()


def test_targets_that_peft_cannot_load_are_refused_before_the_tokenizing(
    tmp_path: Path, tiny_model: tuple[ModelConfig, CacheDir, Path]
) -> None:
    """PEFT adapts no output projection of a Mamba mixer."""
    architecture = ARCHITECTURES["falcon-h1"].config()
    architecture.vocab_size = 300
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model[2]).save_pretrained(tmp_path / "model")
    model = ModelConfig(name="m", source=str(tmp_path / "model"))
    model = model.model_copy(update={"fingerprint": model_fingerprint(model)})
    data = data_config(write_rows(tmp_path / "rows.jsonl", *["yes"] * 30), eval_rows=10)
    cache = CacheDir(tmp_path / "cache")

    def lora(targets: list[str] | str) -> LoraConfig:
        return LoraConfig(r=4, lora_alpha=8.0, target_modules=targets)

    def ask_for(targets: list[str] | str) -> dict[str, Any]:
        request = {"model": model.model_dump(), "data": data.model_dump(), "loras": [lora(targets).model_dump()]}
        return prepare(request, cache)

    def left(targets: list[str] | str) -> bool:
        train = TrainConfig(learning_rate=1e-3, batch_size=1)
        run = RunConfig(model=model, data=data, lora=lora(targets), quant=QuantConfig(load_in_4bit=True), train=train)
        return unprepared([run], cache.path) == [run]

    with pytest.raises(BadInput, match=r"PEFT would not load .*out_proj.*set lora\.target_modules=\[.*q_proj"):
        ask_for("all-linear")
    assert not (tmp_path / "cache" / "tokens").exists()
    assert left(["q_proj", "down_proj"])
    assert ask_for(["q_proj", "down_proj"])["train_rows"] == 20
    # Model and data are there now, and of other targets nothing is known yet.
    assert not left(["q_proj", "down_proj"])
    assert left("all-linear")


def test_a_mistake_of_the_caller_is_an_answer_too() -> None:
    answer, process = ask("{")
    assert (answer["ok"], answer["exit_code"], process.returncode) == (False, 1, 1)
    assert "Traceback" in process.stderr


def test_what_libraries_print_goes_to_stderr() -> None:
    code = """
import os
from train.prepare import guarded_stdout
with guarded_stdout() as out:
    os.system("echo from a library")
    print("from Python")
    out.write("the answer\\n")
print("afterwards")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines() == ["the answer", "afterwards"]
    assert set(process.stderr.splitlines()) == {"from a library", "from Python"}
