"""How an instruction becomes text: the same words in training, in evaluation and in ``chat``."""

from __future__ import annotations

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(instruction: str, input: str) -> str:
    """Stanford Alpaca's prompt (``train.py`` of tatsu-lab/stanford_alpaca), for tokenizers without a chat template."""
    template = ALPACA_WITH_INPUT if input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def user_content(instruction: str, input: str) -> str:
    """What the user says in a chat: the instruction and, after a blank line, its input."""
    return f"{instruction}\n\n{input}" if input else instruction
