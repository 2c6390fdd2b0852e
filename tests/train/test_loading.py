"""Models that would be trained wrongly are told by their configuration, names and shapes, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures import ARCHITECTURES, tiny_model
from train.config import ModelConfig
from train.errors import BadInput
from train.model.architecture import NO_DECODER, UNLIKE_LLAMA, check_architecture
from train.model.loading import check_decoder, load_decoder, load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LONGEST = 512


def saved(config: PretrainedConfig, folder: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check(folder: Path, longest: int = LONGEST) -> None:
    check_decoder(folder, ModelConfig(name="m", source=str(folder)), longest)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True),
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=LONGEST),
        Qwen3Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_decoders_like_llama_are_welcome(config: PretrainedConfig, tmp_path: Path) -> None:
    check(saved(config, tmp_path))
    check_architecture(tmp_path, LONGEST)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=128), "data.max_length to at most 128 (now 512)"),
        (CohereConfig(**SIZES), "logit_scale"),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0), "final_logit_softcapping"),
        (PhiConfig(**SIZES), "the output layer of 'phi' has a bias"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "c_attn"),
        (FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}), "attention in 0 of them"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, pad_token_id=0), "MambaForCausalLM"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_architecture_that_would_be_computed_differently_is_refused(
    config: PretrainedConfig, said: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        check(saved(config, tmp_path))
    assert said in str(caught.value)
    assert "https" not in str(caught.value)
    # The login node knows it without transformers.
    with pytest.raises(BadInput):
        check_architecture(tmp_path, LONGEST)


# Those are above.
@pytest.mark.parametrize("kind", sorted(UNLIKE_LLAMA.keys() - {"falcon", "gpt2", "mamba", "phi"}))
def test_what_the_login_node_refuses_by_name_transformers_model_would_be_refused_for(kind: str, tmp_path: Path) -> None:
    if UNLIKE_LLAMA[kind] == NO_DECODER:
        assert kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return
    names = {"d_model": 32, "n_heads": 4, "n_layers": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    kept = SIZES.keys() - ({"intermediate_size"} if kind in {"falcon", "rwkv"} else set())
    config = CONFIG_MAPPING[kind](**{key: SIZES[key] for key in kept} | names)
    with pytest.raises(BadInput):
        check(saved(config, tmp_path))


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
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
