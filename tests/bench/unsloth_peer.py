"""A peer: Unsloth, as its notebooks load it, under the same `Trainer`, rows and clock as the plain script."""

# ruff: noqa: I001
from __future__ import annotations

# First, since it patches transformers while it is imported.
import unsloth  # noqa: F401

from pathlib import Path
from typing import Any

import torch
from unsloth import FastLanguageModel

from bench.measuring import ALPHA, RANK, Setting
from bench.plain import main
from bench.rows import LONGEST


def load_unsloth(folder: Path, setting: Setting) -> Any:
    """NF4 with Unsloth's kernels, and its own checkpointing if the setting wants it."""
    model, _tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=True
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=setting.targets_in(folder),
        use_gradient_checkpointing="unsloth" if setting.checkpointing is True else False,
        random_state=0,
    )


if __name__ == "__main__":
    main(name="Unsloth", load=load_unsloth)
