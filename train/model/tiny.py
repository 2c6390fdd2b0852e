"""``builtin:tiny``: a random 4-layer Llama with a byte tokenizer, made here in a second, so that tests need no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train.model.folder import save_model

SEED = 0
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path) -> None:
    """Write model and tokenizer to `folder`; the same bytes every time, and torch's global random state is left as it was.

    Raises:
        StorageError: the disk is full or read-only.
    """
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # About 1/sqrt(hidden_size): signals keep their size from layer to layer.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    save_model(model, tokenizer, folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and three for the turns of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (TURN_START, TURN_END, PADDING)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PADDING, chat_template=CHAT_TEMPLATE
    )
