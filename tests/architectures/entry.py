"""What one tiny architecture is, and the keys that many families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import transformers
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY = 97
# No sequence of the conformance tests is longer; most are longer than WINDOW.
LONGEST = 24
WINDOW = 8

PathName = Literal["own", "flat", "padded"]


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        settings: keys of the family's configuration that differ from transformers' defaults.
        path: how a pack has to compute it: by our decoder, by transformers' on flat tokens, or by its on padded
            sequences; None if it has to refuse it.
        causal: no token's logits depend on later ones.
        since: the first release of transformers that is known to compute it right.
        moe: some layers choose experts per token.
        idle: a regular expression of parameters that cannot change the logits: a vision tower's, the bias of keys that
            nothing rotates (it shifts all scores of a query alike), or a scale right before a norm.
        not_adapted: a regular expression of linear layers that stock PEFT refuses to adapt, or whose weight the model
            reads without calling them, so that an adapter never acts.
    """

    name: str
    model_type: str
    path: PathName | None
    settings: dict[str, Any]
    moe: bool = False
    idle: str | None = None
    not_adapted: str | None = None
    causal: bool = True
    since: str | None = None

    @property
    def missing(self) -> str | None:
        """Why this transformers has no such model to compare with; None if it has."""
        if self.model_type not in CONFIG_MAPPING_NAMES:
            return f"transformers {transformers.__version__} has no {self.model_type!r}"
        if self.since is not None and Version(transformers.__version__) < Version(self.since):
            return (
                f"transformers {transformers.__version__} computes {self.model_type!r} wrongly; {self.since} does not"
            )
        return None

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.settings)


# Every name a configuration may have for a token id; beyond the vocabulary, embeddings of padding would not fit.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def model(
    name: str,
    model_type: str,
    path: PathName | None,
    *,
    moe: bool = False,
    idle: str | None = None,
    not_adapted: str | None = None,
    causal: bool = True,
    since: str | None = None,
    **own: Any,
) -> Architecture:
    """An entry with the sizes that most families name alike."""
    return Architecture(name, model_type, path, SIZES | TOKENS | own, moe, idle, not_adapted, causal, since)


def rope(kind: str = "default", theta: float = 10_000.0, **own: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **own}


def experts(inner: int = 48, count: int = 4, chosen: int = 2) -> dict[str, Any]:
    """Experts under the names that most families use."""
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
    }


LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
}
