"""A mixture of experts to measure with, whose 16-bit copy fits neither this disk nor this memory: it never exists.

The model folder has configuration, tokenizer and the headers of its weights, in a file that is one hole (`os.truncate`). The quantized
base lies in the cache as if it had been made from them; its weights are random, and quantized one by one as they are drawn.

python -m bench.mixtures FOLDER
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from bench.shapes import WEIGHT_STD, _tokenizer
from train.config import ModelConfig, QuantConfig
from train.model.base_cache import BaseCache, BaseSpec
from train.model.folder import WEIGHTS
from train.model.quantizing import Quantizer
from train.store.layout import CacheDir

# As `bench.ours` names the base of a run.
FINGERPRINT = "bench"
SAFETENSORS_DTYPE = "BF16"
VALUE_BYTES = 2


def qwen3_30b_a3b(
    layers: int = 48, experts: int = 128, hidden: int = 2048, vocabulary: int = 151_936
) -> PreTrainedConfig:
    """Qwen3-30B-A3B, from its config.json."""
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        moe_intermediate_size=3 * hidden // 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )


def mixture_folder(root: Path, config: PreTrainedConfig, device: torch.device, name: str = "qwen3_30b_a3b") -> Path:
    """The folder `name` below `root`, whose base is in the cache next to it; both are made if they are missing."""
    folder = root / name
    if not folder.exists():
        unfinished = root / f"{name}.{os.getpid()}"
        unfinished.mkdir(parents=True)
        config.save_pretrained(unfinished)
        _tokenizer(config.vocab_size).save_pretrained(unfinished)
        _write_hole(hollow(config), unfinished / WEIGHTS)
        unfinished.rename(folder)
    about = ModelConfig(name="bench", source=str(folder), fingerprint=FINGERPRINT)
    spec = RandomBase(folder, about, QuantConfig(load_in_4bit=True), torch.bfloat16, device)
    BaseCache(CacheDir(root / "cache"), lambda: None).open(spec)
    return folder


def hollow(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


@dataclass(frozen=True)
class RandomBase(BaseSpec):
    """A base whose weights are drawn instead of read: normal, and ones for norms."""

    def tensors(self, stop: Callable[[], None]) -> dict[str, torch.Tensor]:
        """Each weight is quantized before the next one is drawn."""
        model = hollow(AutoConfig.from_pretrained(self.model_dir))
        generator = torch.Generator(self.device).manual_seed(0)
        quantizer = Quantizer(self.quant, self.device, stop)
        for name, parameter in list(model.named_parameters()):
            weight = torch.ones(parameter.shape, dtype=self.dtype, device=self.device)
            if weight.dim() > 1:
                weight.normal_(0, WEIGHT_STD, generator=generator)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
            quantizer.take(model, name)
        return quantizer.finish(model)


def _write_hole(model: PreTrainedModel, file: Path) -> None:
    """A safetensors file with the names and shapes of `model`, whose numbers take no room on the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + VALUE_BYTES * tensor.numel()
        header[name] = {"dtype": SAFETENSORS_DTYPE, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


if __name__ == "__main__":
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(mixture_folder(Path(sys.argv[1]), qwen3_30b_a3b(), gpu))
