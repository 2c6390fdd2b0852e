"""Model folders to measure with: real shapes, random weights, written once and read by every peer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHARD_BYTES = 2e9
# transformers' initializer_range. Losses start at log(vocabulary), as for any untrained model.
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A Llama by its numbers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of a layer's linears, by name below ``model.layers.<i>``."""
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        attention = {f"self_attn.{name}_proj": square for name in "qkvo"}
        return attention | {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}

    @property
    def flop_parameters(self) -> int:
        """How many weights each token is multiplied with: linears and head. Each takes 4 FLOP per token over a frozen base."""
        layer = sum(rows * columns for rows, columns in self.linears.values())
        return self.layers * layer + self.vocabulary * self.hidden

    def config(self) -> LlamaConfig:
        """The configuration of such a model."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )


SHAPES = {
    "llama2_7b": Shape(layers=32, hidden=4096, intermediate=11_008, heads=32, vocabulary=32_000),
    "tiny": Shape(layers=2, hidden=64, intermediate=128, heads=4, vocabulary=320),
}
SPECIALS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def model_folder(name: str, root: Path) -> Path:
    """The folder of shape `name` below `root`; if it does not exist it is written, with weights drawn on the GPU if there is one."""
    folder = root / name
    if not folder.exists():
        unfinished = root / f"{name}.{os.getpid()}"
        unfinished.mkdir(parents=True)
        _write_weights(SHAPES[name], unfinished)
        SHAPES[name].config().save_pretrained(unfinished)
        _tokenizer(SHAPES[name].vocabulary).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def _write_weights(shape: Shape, folder: Path) -> None:
    """bfloat16 safetensors in shards of about `SHARD_BYTES`, with their index."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = filled = 0
    for name, size in _tensors(shape).items():
        if filled > SHARD_BYTES:
            save_file(shards[-1], folder / _shard(len(shards)), metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
            filled = 0
        tensor = torch.ones(size, device=device, dtype=torch.bfloat16)
        if len(size) == 2:
            tensor.normal_(0, WEIGHT_STD, generator=generator)
        shards[-1][name] = tensor.cpu()
        weight_map[name] = _shard(len(shards))
        filled += tensor.nbytes
        total += tensor.nbytes
    save_file(shards[-1], folder / _shard(len(shards)), metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor of the model, by its name in a checkpoint."""
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        for name, size in shape.linears.items():
            sizes[f"model.layers.{layer}.{name}.weight"] = size
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
    return sizes | {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocabulary, shape.hidden)}


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
