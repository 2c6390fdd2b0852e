"""What a model's ``config.json`` alone says: enough for the login node to refuse at once most models that cannot be trained.

Light on purpose. `train.model.loading` checks the model itself before anything is submitted, and decides about all others.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from train.errors import BadInput
from train.model.folder import model_config

CHOOSE_ANOTHER = "choose a Llama-like model"

# What some architectures do to their logits, with the neutral value of each key.
LOGIT_KEYS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": 1.0,
}

OWN_MATRICES = "the architecture {!r} keeps its weights in modules of its own kind, which cannot be adapted"
OWN_ATTENTION = "the architecture {!r} mixes tokens in a way of its own, so packed sequences cannot be kept apart"
HEAD_WITH_BIAS = "the output layer of {!r} has a bias, which lorapack does not compute"
NO_DECODER = "the architecture {!r} is not a decoder that predicts the next token"

# Well-known ones by their `model_type`; tests/train/test_loading.py compares them with transformers' own models.
UNLIKE_LLAMA = {
    "bert": HEAD_WITH_BIAS,
    "bloom": OWN_ATTENTION,
    "falcon": OWN_ATTENTION,
    "gpt2": OWN_MATRICES,
    "gpt_oss": OWN_ATTENTION,
    "gptj": OWN_ATTENTION,
    "jamba": OWN_ATTENTION,
    "mamba": OWN_ATTENTION,
    "mpt": OWN_ATTENTION,
    "phi": HEAD_WITH_BIAS,
    "roberta": HEAD_WITH_BIAS,
    "rwkv": OWN_ATTENTION,
    "t5": NO_DECODER,
}


def check_architecture(model_dir: Path, longest: int) -> None:
    """Refuse the model in a folder if its ``config.json`` shows that it cannot be trained on sequences of at most `longest` tokens.

    Raises:
        BadInput: saying why, and what to change.
    """
    config = model_config(model_dir)
    kind = str(config.get("model_type"))
    if kind in UNLIKE_LLAMA:
        raise BadInput(f"{UNLIKE_LLAMA[kind].format(kind)}; {CHOOSE_ANOTHER}.")
    text = config.get("text_config", config)
    refuse_by_config(SimpleNamespace(**{"model_type": kind} | (text if isinstance(text, dict) else {})), longest)


def refuse_by_config(config: Any, longest: int) -> None:
    """Refuse what an architecture's configuration says; `config` is transformers' object or has the same attributes.

    Raises:
        BadInput: attention sees fewer tokens than `longest`, or logits are scaled or capped.
    """
    windowed = getattr(config, "use_sliding_window", True)
    sliding = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    window = min(filter(None, [sliding if windowed else None, chunk]), default=longest)
    if window < longest:
        raise BadInput(
            f"the model attends to a sliding window of {window} tokens; set data.max_length to at most {window} (now {longest})."
        )
    for key, neutral in LOGIT_KEYS.items():
        if getattr(config, key, neutral) not in (None, neutral):
            raise BadInput(
                f"the architecture {config.model_type!r} uses {key}, which lorapack does not compute; {CHOOSE_ANOTHER}."
            )
