"""Models that also see or hear: the class that transformers loads them as, and their towers for other inputs kept small.

Gemma 3 4B is a `Gemma3ForConditionalGeneration`, whose vision tower of 27 layers no text ever enters. With one layer it takes little
memory, the files' other 26 layers are not read, and every class, module and name stays what stock transformers has.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

# The depth of a tower: num_hidden_layers of SigLIP, depth of Qwen's, encoder_layers of Whisper's.
DEPTH = re.compile(r"^(num_hidden_layers|num_layers|encoder_layers|depth|conf_num_hidden_layers)$")


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' loader for a model that writes text: the one for causal models, and for what that does not know (Mistral Small
    3.1) the one for models that also see.
    """
    known = AutoModelForCausalLM._model_mapping
    if type(config) not in known and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def shallow_towers(config: PretrainedConfig) -> PretrainedConfig:
    """`config` whose parts other than text have one layer; itself if it is of text alone."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PretrainedConfig) and part is not text:
            _make_shallow(part)
    return config


def _make_shallow(part: PretrainedConfig) -> None:
    settings: dict[str, Any] = part.to_dict()
    for key, depth in settings.items():
        if not DEPTH.match(key) or type(depth) is not int or depth < 2:
            continue
        # Lists with an entry per layer.
        for other, value in settings.items():
            if isinstance(value, list) and len(value) == depth:
                setattr(part, other, value[:1])
        setattr(part, key, 1)
