"""Targets against PEFT itself: the same modules, ranks, scalings and counts for the same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from model_facts import linear_shapes
from train.config import LoraConfig, ModelConfig
from train.errors import BadInput
from train.lora.targets import adapted_modules, parameter_line, trainable_parameters
from train.store.layout import CacheDir

Tiny = tuple[ModelConfig, CacheDir, Path]

CASES: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "a part of the path": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "a name in full": {"target_modules": ["model.layers.2.self_attn.k_proj"]},
    "a name in full outside the layers": {
        "target_modules": ["model.layers.2.self_attn.k_proj", "q_proj"],
        "layers_to_transform": [0],
    },
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "ALL-LINEAR"},
    "regex": {"target_modules": r".*\.(0|2)\.self_attn\.[qk]_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3, 1]},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 16, "^model.layers.0.mlp.down_proj": 5},
        "alpha_pattern": {"v_proj": 64, r".*\.mlp\..*": 1.5},
    },
    "the first pattern counts": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 16, r"layers.2.self_attn.q_proj": 2},
    },
}


def lora(target_modules: list[str] | str, **values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16} | values, target_modules=target_modules)


def peft_model(config: LoraConfig, folder: Path) -> PeftModel:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return get_peft_model(base, PeftLoraConfig(**config.model_dump(exclude={"loraplus_lr_ratio"})))


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_the_same_modules_ranks_and_scalings_as_peft(values: dict[str, Any], tiny_model: Tiny) -> None:
    config, folder = lora(**values), tiny_model[2]
    theirs = peft_model(config, folder)
    adapted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = {
        name: (target.r, target.scaling)
        for name, target in adapted_modules(config, list(linear_shapes(folder))).items()
    }
    assert ours == adapted
    assert trainable_parameters(config, linear_shapes(folder)) == theirs.get_nb_trainable_parameters()[0]


def test_modules_come_in_the_order_given(tiny_model: Tiny) -> None:
    names = list(linear_shapes(tiny_model[2]))[::-1]
    assert list(adapted_modules(lora("all-linear"), names)) == names


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, r"'c_attn'.*q_proj"),
        ({"target_modules": ["proj"]}, r"'proj'.*down_proj"),
        ({"target_modules": "q_proj"}, r"whole name.*q_proj"),
        ({"target_modules": "(q_proj"}, "not a valid regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 4, 9]}, r"\[4, 9\].*layers 0 to 3"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "as a list"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, r"lora.rank_pattern has 'v_proj'.*q_proj"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q": 4.0}}, r"lora.alpha_pattern has 'q'"),
    ],
)
def test_what_would_adapt_nothing_is_refused(values: dict[str, Any], told: str, tiny_model: Tiny) -> None:
    with pytest.raises(BadInput, match=told):
        adapted_modules(lora(**values), list(linear_shapes(tiny_model[2])))


@pytest.mark.parametrize(("r", "trainable"), [(8, 4_194_304), (16, 8_388_608)])
def test_trainable_parameters_of_llama_2_7b(r: int, trainable: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    base_total = base.num_parameters()
    shapes = {n: tuple(m.weight.shape) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    adapter = lora(["q_proj", "v_proj"], r=r)
    assert trainable_parameters(adapter, shapes) == trainable
    with torch.device("meta"):
        get_peft_model(base, PeftLoraConfig(r=r, target_modules=["q_proj", "v_proj"])).print_trainable_parameters()
    assert capsys.readouterr().out.strip() == parameter_line(trainable, base_total)


def test_the_line_that_peft_prints() -> None:
    expected = "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"
    assert parameter_line(4_194_304, 6_738_415_616) == expected
