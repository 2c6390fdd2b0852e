"""What PEFT makes of an adapter's configuration: over every kind of base it loads exactly what was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_targets import lora
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from architectures import ARCHITECTURES, VOCABULARY, each, tiny_model
from train.config import LoraConfig, ModelConfig
from train.errors import BadInput, LorapackError
from train.export import add_product
from train.lora.peft_files import write_adapter
from train.lora.peft_forms import StockPeft
from train.lora.targets import adapted_modules
from train.model.linears import frozen_linears

Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]

TOKENS = torch.arange(3, 27).view(2, 12) % VOCABULARY
LAYER = r"\.\d+\."
# Mamba and Jamba read the weight of dt_proj without calling the layer, so no adapter would act on it, in PEFT or elsewhere.
OTHERS = r"vision|audio|router|mamba\.dt_proj|mixer\.dt_proj"
MODEL = ModelConfig(name="m", source="org/name")


def stock_peft(config: PreTrainedConfig) -> StockPeft:
    def skeleton() -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    return StockPeft(MODEL, skeleton)


def decoder_linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) features of what training may adapt: no vision tower, no router."""
    return {
        name: linear.shape
        for name, linear in frozen_linears(model).items()
        if re.search(LAYER, name) and not re.search(OTHERS, name)
    }


def random_adapter(config: LoraConfig, shapes: dict[str, tuple[int, int]]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            0.15 * torch.randn(target.r, shapes[name][1], generator=generator),
            0.15 * torch.randn(shapes[name][0], target.r, generator=generator),
        )
        for name, target in adapted_modules(config, list(shapes)).items()
    }


@torch.no_grad()
def check_in_peft(architecture: str, config: LoraConfig, folder: Path) -> Any:
    """Write a random adapter and compare stock PEFT's logits with those of the merged base; PEFT's warnings are errors here."""
    model = tiny_model(architecture)
    shapes = decoder_linears(model)
    targets = adapted_modules(config, list(shapes))
    adapter = random_adapter(config, shapes)
    written = stock_peft(model.config).config(config, targets, adapter)
    write_adapter(folder, written, adapter)
    bare = model(TOKENS).logits
    linears = frozen_linears(model)
    for name, (a, b) in adapter.items():
        add_product(linears[name].weight, a, b, targets[name].scaling)
    expected = model(TOKENS).logits
    theirs = PeftModel.from_pretrained(tiny_model(architecture), folder)(TOKENS).logits
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    return written


def loadable(architecture: str) -> list[str] | str:
    """``all-linear``, or what the refusal of that advises."""
    model = tiny_model(architecture)
    everything = lora("all-linear")
    try:
        stock_peft(model.config).check(everything, adapted_modules(everything, list(decoder_linears(model))))
    except BadInput as exc:
        return advised(exc)
    return "all-linear"


def advised(refusal: BadInput) -> list[str]:
    targets = str(refusal).partition("set lora.target_modules=[")[2].partition("]")[0]
    assert targets, refusal
    return targets.split(",")


QUICK = {"llama", "gpt2", "deepseek-v3", "glm4-moe", "ernie4.5-moe", "afmoe", "qwen3-moe", "gemma3"}


@pytest.mark.parametrize(
    "architecture",
    each(ARCHITECTURES, QUICK),
)
def test_stock_peft_loads_all_linear(architecture: str, tmp_path: Path) -> None:
    """Every linear layer that PEFT adapts at all."""
    if ARCHITECTURES[architecture].missing:
        pytest.skip(ARCHITECTURES[architecture].missing)
    check_in_peft(architecture, lora(loadable(architecture)), tmp_path)


CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "o_proj"]},
    "patterns and dropout": {
        "target_modules": "all-linear",
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"mlp.down_proj": 3.0},
        "lora_dropout": 0.1,
        "use_rslora": True,
    },
    "regex": {"target_modules": r".*\.(o_proj|down_proj)"},
    "one layer": {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [0]},
}


# PEFT looks for ranks among modules only, and says so of those that it does give to parameters.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["glm4-moe", "gemma3"])
def test_stock_peft_loads_other_targets(architecture: str, case: str, tmp_path: Path) -> None:
    check_in_peft(architecture, lora(**CASES[case]), tmp_path)


def test_names_stay_short_where_they_can(tmp_path: Path) -> None:
    plain = check_in_peft("llama", lora(r".*\.(q|v)_proj"), tmp_path)
    assert plain.target_modules == r".*\.(q|v)_proj"
    mixture = check_in_peft("glm4-moe", lora("all-linear"), tmp_path)
    assert mixture.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert mixture.target_parameters == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    with_vision_tower = check_in_peft("gemma3", lora(["q_proj"]), tmp_path)
    assert with_vision_tower.target_modules[0] == "model.language_model.layers.0.self_attn.q_proj"


def test_a_transposed_weight_is_said() -> None:
    model = tiny_model("gpt2")
    config, targets = lora("all-linear"), adapted_modules(lora("all-linear"), list(decoder_linears(model)))
    written = stock_peft(model.config).config(config, targets, random_adapter(config, decoder_linears(model)))
    assert written.fan_in_fan_out is True
    assert written.target_modules == ["c_attn", "c_fc", "c_proj"]


def test_targets_that_peft_cannot_load_are_refused_with_others_that_it_can() -> None:
    """PEFT adapts no output projection of a Mamba mixer."""
    model = tiny_model("falcon-h1")
    everything = lora("all-linear")
    with pytest.raises(BadInput, match=r"PEFT says .*out_proj") as caught:
        stock_peft(model.config).check(everything, adapted_modules(everything, list(decoder_linears(model))))
    others = lora(advised(caught.value))
    assert {"in_proj", "q_proj", "down_proj"} <= set(others.target_modules)
    stock_peft(model.config).check(others, adapted_modules(others, list(decoder_linears(model))))


def test_one_skeleton_serves_all_questions() -> None:
    """PEFT changes a model: what an earlier form adapted must not be counted against a later one."""
    model = tiny_model("gemma3")
    peft = StockPeft(MODEL, lambda: model)
    for targets in (["q_proj"], ["k_proj"], "all-linear"):
        peft.check(lora(targets), adapted_modules(lora(targets), list(decoder_linears(model))))
    assert not [name for name in model.state_dict() if "lora" in name]


def test_a_sweep_of_ranks_asks_peft_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    peft, names = stock_peft(model.config), list(decoder_linears(model))
    trials = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal trials
        trials += 1
        return get_peft_model(*arguments, **options)

    monkeypatch.setattr("peft.get_peft_model", counted)
    for r in (2, 4, 8):
        for config in (lora(["q_proj"], r=r, lora_dropout=r / 10), lora("all-linear", r=r, use_rslora=True)):
            peft.check(config, adapted_modules(config, names))
    assert trials == 2


def llama_adapter() -> tuple[LoraConfig, dict[str, Any], Tensors]:
    shapes = decoder_linears(tiny_model("llama"))
    config = lora(["q_proj", "up_proj"])
    return config, adapted_modules(config, list(shapes)), random_adapter(config, shapes)


def test_a_lost_tensor_is_an_error() -> None:
    config, targets, adapter = llama_adapter()
    del adapter["model.layers.1.mlp.up_proj"]
    with pytest.raises(
        LorapackError, match=r"model\.layers\.1\.mlp\.up_proj\.lora_A.* is expected and not in the file"
    ):
        stock_peft(tiny_model("llama").config).config(config, targets, adapter)


def test_a_tensor_too_many_is_an_error() -> None:
    config, targets, adapter = llama_adapter()
    adapter["model.layers.1.mlp.down_proj"] = (torch.ones(8, 96), torch.ones(64, 8))
    with pytest.raises(LorapackError, match=r"down_proj\.lora_A.* is in the file and not expected"):
        stock_peft(tiny_model("llama").config).config(config, targets, adapter)


def test_a_tensor_of_another_shape_is_an_error() -> None:
    config, targets, adapter = llama_adapter()
    a, b = adapter["model.layers.1.mlp.up_proj"]
    adapter["model.layers.1.mlp.up_proj"] = (a[:2], b[:, :2])
    with pytest.raises(LorapackError, match=r"up_proj\.lora_A.*size mismatch|size mismatch.*up_proj\.lora_A"):
        stock_peft(tiny_model("llama").config).config(config, targets, adapter)


def test_another_scaling_is_an_error() -> None:
    config, targets, adapter = llama_adapter()
    louder = config.model_copy(update={"lora_alpha": 2 * config.lora_alpha})
    with pytest.raises(BadInput, match="would have rank"):
        stock_peft(tiny_model("llama").config).config(louder, targets, adapter)
