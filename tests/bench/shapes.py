"""Model folders to measure with: real shapes, random weights, written once and read by every peer."""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from bench.measuring import QV, TARGETS_FILE
from train.model.base_cache import BaseSpec, base_key, write_base
from train.model.experts import expert_stacks
from train.model.linears import frozen_linears
from train.model.quantizing import Quantizer
from train.store.layout import CacheDir
from train.store.storage import make_folder

SHARD_BYTES = 2e9
# transformers' initializer_range. Losses start at log(vocabulary), as for any untrained model.
WEIGHT_STD = 0.02
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Shape:
    """A base by its architecture and its numbers.

    Attributes:
        model_type: transformers' name of the architecture.
        numbers: fields of its configuration.
        targets: the linears that correspond to Llama's q_proj and v_proj.
    """

    model_type: str
    numbers: dict[str, Any]
    targets: tuple[str, ...] = QV

    def config(self) -> PreTrainedConfig:
        """The configuration of such a model, for a tokenizer of `_tokenizer`."""
        tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        return AutoConfig.for_model(self.model_type, **self.numbers, **tokens, dtype="bfloat16")

    def hollow(self) -> PreTrainedModel:
        """The model without numbers, on the device ``meta``."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        return model

    @cached_property
    def flop_parameters(self) -> int:
        """How many weights each token is multiplied with: linears, experts that it chooses, and head. Each takes 4 FLOP per token."""
        model = self.hollow()
        chosen = getattr(model.config, "num_experts_per_tok", 0)
        experts = sum(chosen * stack.matrices[0].numel() for stack in expert_stacks(model).values())
        head = model.get_output_embeddings().weight.numel()
        return head + experts + sum(linear.weight.numel() for linear in frozen_linears(model).values())

    def twin(self) -> Shape:
        """A plain Llama with linears and a head of the same sizes: what the architecture would cost without its own ideas."""
        config = self.config()
        same = {key: getattr(config, key) for key in TWIN_KEYS}
        targets = QKV if "qkv_proj" in self.targets else QV
        return Shape("llama", same | {"head_dim": getattr(config, "head_dim", None)}, targets)


TWIN_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def _numbers(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], vocabulary: int, **others: Any
) -> dict[str, Any]:
    """Fields of a configuration; `heads` of queries, and of keys and values."""
    usual = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    return usual | dict(zip(TWIN_KEYS, (vocabulary, hidden, intermediate, layers, *heads), strict=False)) | others


# From the config.json of the models named.
SHAPES = {
    "llama2_7b": Shape("llama", _numbers(32, 4096, 11_008, (32, 32), 32_000)),
    "llama3_1_8b": Shape("llama", _numbers(32, 4096, 14_336, (32, 8), 128_256)),
    "qwen2_5_7b": Shape("qwen2", _numbers(28, 3584, 18_944, (28, 4), 152_064)),
    "qwen3_8b": Shape("qwen3", _numbers(36, 4096, 12_288, (32, 8), 151_936, head_dim=128)),
    "gemma3_4b": Shape(
        "gemma3_text",
        _numbers(34, 2560, 10_240, (8, 4), 262_208, head_dim=256, sliding_window=1024, tie_word_embeddings=True),
    ),
    "gemma3_12b": Shape(
        "gemma3_text",
        _numbers(48, 3840, 15_360, (16, 8), 262_208, head_dim=256, sliding_window=1024, tie_word_embeddings=True),
    ),
    "phi4": Shape("phi3", _numbers(40, 5120, 17_920, (40, 10), 100_352), ("qkv_proj",)),
    "olmo2_7b": Shape("olmo2", _numbers(32, 4096, 11_008, (32, 32), 100_352)),
    "granite3_3_8b": Shape(
        "granite",
        _numbers(
            40, 4096, 12_800, (32, 8), 49_159, tie_word_embeddings=True, embedding_multiplier=12.0,
            residual_multiplier=0.22, attention_multiplier=0.0078125, logits_scaling=16.0,
        ),
    ),
    "smollm3_3b": Shape("smollm3", _numbers(36, 2048, 11_008, (16, 4), 128_256, tie_word_embeddings=True)),
    "falcon_7b": Shape(
        "falcon",
        {
            "vocab_size": 65_024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
            "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False,
        },
        ("query_key_value",),
    ),
    "qwen3_30b_a3b": Shape(
        "qwen3_moe",
        _numbers(
            48, 2048, 6144, (32, 4), 151_936, head_dim=128, moe_intermediate_size=768, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
    "tiny": Shape("llama", _numbers(2, 64, 128, (4, 4), 320)),
}  # fmt: skip
SPECIALS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def model_folder(name: str, root: Path, *, twin: bool = False, weights: bool = True) -> Path:
    """The folder of shape `name` below `root`, or of its `twin`; if it does not exist it is written.

    Without `weights` there is a hole in their file, which is enough for a base that is in the cache (`quantized_base`).
    """
    folder = root / f"{name}{'-twin' * twin}{'-bare' * (not weights)}"
    if not folder.exists():
        shape = SHAPES[name].twin() if twin else SHAPES[name]
        unfinished = root / f"{folder.name}.{os.getpid()}"
        unfinished.mkdir(parents=True)
        (_write_weights if weights else _write_hole)(shape.hollow(), unfinished)
        config = shape.config()
        config.architectures = [type(shape.hollow()).__name__]
        config.save_pretrained(unfinished)
        _tokenizer(config.vocab_size).save_pretrained(unfinished)
        (unfinished / TARGETS_FILE).write_text(json.dumps(shape.targets))
        unfinished.rename(folder)
    return folder


def quantized_base(model_dir: Path, spec: BaseSpec, cache: CacheDir) -> None:
    """Put a random quantized base into the cache, weight by weight: no 16-bit copy is ever in memory or on the disk."""
    about = spec.about()
    folder = cache.base(base_key(about))
    if folder.path.exists():
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir), dtype=spec.dtype)
    random = RandomTensors(spec.device)
    quantizer = Quantizer(spec.quant, spec.device, lambda: None)
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        drawn = nn.Parameter(random.like(parameter), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, drawn)
        quantizer.take(model, name)
    model.tie_weights()
    make_folder(folder.path.parent)
    write_base(folder, about, quantizer.finish(model))


class RandomTensors:
    """Weights as of an untrained model: normal with `WEIGHT_STD`, and ones for vectors; drawn on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and dtype."""
        drawn = torch.ones(tensor.shape, device=self._device, dtype=tensor.dtype)
        return drawn.normal_(0, WEIGHT_STD, generator=self._generator) if tensor.dim() > 1 else drawn


def _write_weights(hollow: PreTrainedModel, folder: Path) -> None:
    """bfloat16 safetensors in shards of about `SHARD_BYTES`, with their index."""
    random = RandomTensors(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = filled = 0
    for name, shape in hollow.named_parameters():
        if filled > SHARD_BYTES:
            save_file(shards[-1], folder / _shard(len(shards)), metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
            filled = 0
        tensor = random.like(shape).cpu()
        shards[-1][name] = tensor
        weight_map[name] = _shard(len(shards))
        filled += tensor.nbytes
        total += tensor.nbytes
    save_file(shards[-1], folder / _shard(len(shards)), metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_hole(hollow: PreTrainedModel, folder: Path) -> None:
    """A safetensors file with the header of such a model, and a hole for its weights: it takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in hollow.named_parameters():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape.shape),
            "data_offsets": [end, end := end + 2 * shape.numel()],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _shard(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token per byte, three special tokens, and unused tokens up to `vocabulary`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: i for i, symbol in enumerate([*alphabet, *SPECIALS])}
    words |= {f"<unused{i}>": i for i in range(len(words), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=CHAT_TEMPLATE
    )


# python -m bench.shapes SHAPE FOLDER
if __name__ == "__main__":
    print(model_folder(sys.argv[1], Path(sys.argv[2])))
