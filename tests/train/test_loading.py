"""A model is known by its configuration before any weight is loaded: its sizes, and the path by which packs compute it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, PretrainedConfig

from architectures import ARCHITECTURES, each, tiny_model
from train.config import ModelConfig
from train.errors import BadInput
from train.model.facts import ModelFacts, facts_file, read_facts
from train.model.loading import check_files, load_decoder, load_tokenizer
from train.nn import facts
from train.nn.facts import known_facts, longest_of_one_rotation
from train.store.layout import CacheDir

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def saved(config: PretrainedConfig, folder: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig(name="m", source=str(folder))


def check(folder: Path) -> None:
    check_files(folder, model_of(folder))


def measured(config: PretrainedConfig, folder: Path) -> ModelFacts:
    config.save_pretrained(folder / "model")
    return known_facts(folder / "model", model_of(folder / "model"), CacheDir(folder / "cache"))


@pytest.mark.parametrize(("name", "path"), [("llama", "own"), ("falcon-h1", "padded"), ("bloom", "padded")])
def test_the_path_of_an_architecture_is_measured_on_its_configuration(name: str, path: str, tmp_path: Path) -> None:
    found = measured(ARCHITECTURES[name].config(), tmp_path)
    assert found.path == path
    assert found.refusal is None
    assert found.attempts[-1].startswith(f"{path}: ")


def test_a_model_whose_tokens_see_later_ones_is_refused_with_the_difference(tmp_path: Path) -> None:
    found = measured(ARCHITECTURES["doge-window"].config(), tmp_path)
    assert found.path is None
    assert found.refusal is not None
    assert "'doge' is computed by no path as transformers computes it" in found.refusal
    assert "padded: " in found.refusal
    assert "differ by" in found.refusal


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="T5Config"):
        measured(AutoConfig.for_model("t5", d_model=32, num_layers=2, vocab_size=64), tmp_path)
    assert measured(BertConfig(**SIZES), tmp_path).refusal is not None


def test_facts_are_measured_once_and_again_where_anything_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(LlamaConfig(**SIZES), tmp_path)
    folder, cache = tmp_path / "model", CacheDir(tmp_path / "cache")
    model = model_of(folder)
    monkeypatch.setattr(facts, "judge_architecture", lambda _: pytest.fail("judged again"))
    assert known_facts(folder, model, cache) == first == read_facts(folder, model, cache)
    # Damaged: measured again.
    facts_file(folder, model, cache).write_text("{")
    assert read_facts(folder, model, cache) is None
    monkeypatch.undo()
    assert known_facts(folder, model, cache) == first
    # Another configuration is another file.
    before = facts_file(folder, model, cache)
    change_config(folder, rope_theta=1.0)
    assert facts_file(folder, model, cache) != before


def test_sizes_are_kept_when_the_measurement_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "judge_architecture", stop)
    with pytest.raises(KeyboardInterrupt):
        measured(LlamaConfig(**SIZES), tmp_path)
    kept = read_facts(tmp_path / "model", model_of(tmp_path / "model"), CacheDir(tmp_path / "cache"))
    assert kept is not None
    assert (kept.judged, kept.layers, kept.vocabulary) == (False, 2, 64)


@pytest.mark.parametrize(
    ("name", "longest"), [("llama", None), ("phi3-longrope-crossing", 12), ("llama-dynamic-rope", 128), ("bloom", None)]
)
def test_texts_in_which_positions_turn_otherwise_are_told_by_the_angles(name: str, longest: int | None) -> None:
    config = ARCHITECTURES[name].config()
    config.get_text_config().max_position_embeddings = 128
    assert longest_of_one_rotation(AutoModelForCausalLM.from_config(config)) == longest


def test_longer_texts_are_refused_where_a_path_does_not_keep_their_angles_apart(tmp_path: Path) -> None:
    found = measured(LlamaConfig(**SIZES), tmp_path).model_copy(update={"path": "flat", "longest": 4096})
    found.check(4096)
    with pytest.raises(BadInput, match=r"more than 4096 tokens.* at most 4096 \(now 4097\)"):
        found.check(4097)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(LlamaConfig(**SIZES), tmp_path / "llama")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "from_tomorrow"}, "model type `from_tomorrow`"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 64}, "has the shape (32, 48) instead of (32, 64)"),
    ],
)
def test_a_configuration_that_does_not_belong_to_the_weights_is_refused(
    values: dict[str, Any], said: str, llama: Path
) -> None:
    change_config(llama, **values)
    with pytest.raises(BadInput) as caught:
        check(llama)
    assert said in str(caught.value)


def test_missing_weights_are_never_made_up(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"incomplete: model\.layers\.1\.self_attn\.q_proj\.weight"):
        check(llama)
    with pytest.raises(BadInput, match="incomplete"):
        load_decoder(llama, ModelConfig(name="m", source=str(llama)), dtype=torch.float32)


@pytest.mark.parametrize("content", ["", "{", '{"version": 3}', "[" * 100_000])
def test_a_damaged_tokenizer_is_refused(content: str, tiny_model: Any, tmp_path: Path) -> None:
    model, _, folder = tiny_model
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path / "model", model)


QUICK = {"gpt-oss", "gemma2", "gpt2"}


@pytest.mark.parametrize("name", each(ARCHITECTURES, QUICK))
@torch.no_grad()
def test_every_architecture_is_loaded_from_its_files(name: str, tmp_path: Path) -> None:
    """Those too that transformers computes by code of their own alone, without PyTorch's attention."""
    if ARCHITECTURES[name].missing:
        pytest.skip(ARCHITECTURES[name].missing)
    tiny_model(name).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load_decoder(tmp_path, ModelConfig(name="m", source=str(tmp_path)), dtype=torch.float32).eval()
    tokens = torch.arange(3, 15)[None]
    torch.testing.assert_close(loaded(tokens).logits, stock(tokens).logits, atol=1e-4, rtol=1e-4)
