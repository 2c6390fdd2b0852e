"""What a decoder computes, as data: one description per architecture, whose layers say what stands where.

A layer with input x [T, hidden] computes, where each norm may be missing and each multiplier is mostly 1,

    a    = attention(attention_norm(x))
    h    = x + attention_multiplier * attention_out_norm(a)
    m    = mlp(mlp_norm(h))                                       `parallel`: mlp_norm(x)
    y    = (h + mlp_multiplier * mlp_out_norm(m)) * output_multiplier

so that Llama has norms before, OLMo 2 behind, Gemma 3 both, and Cohere one norm for attention and MLP, which run in parallel.

Modules are named relative to their layer (``self_attn.q_proj``), numbers by where the model keeps them: a description read off a small
copy of a model (`train.nn.reading`) is bound to the model itself, with its widths and weights (`train.nn.binding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from train.errors import LorapackError

# How the outputs of a fused projection are laid out: all queries, then all keys, then all values; or in groups, each with the queries
# of one key-value head, its key and its value.
FusedLayout = Literal["blocks", "groups"]
TableLayout = Literal["halves", "pairs", "once"]


class Undescribable(LorapackError):
    """A decoder computes something that no description says; the message names the module."""


@dataclass(frozen=True)
class Scalar:
    """A number of a model, and where it is kept.

    Attributes:
        value: in the copy that the description was read off.
        owner: the module's name within the layer, ``config``, or None where `value` is the same in all sizes of the model.
        attribute: of the owner.
        exponent: of the attribute's value: Gemma multiplies its embedding by hidden_size ** 0.5.
    """

    value: float
    owner: str | None = None
    attribute: str = ""
    exponent: float = 1.0

    def read(self, layer: nn.Module, config: Any) -> float:
        """The number in another model of this architecture.

        Raises:
            AttributeError, KeyError: it is not there.
        """
        if self.owner is None:
            return self.value
        owner = config if self.owner == "config" else layer.get_submodule(self.owner)
        # rope_parameters.original_max_position_embeddings is an entry of a dictionary.
        outer, _, entry = self.attribute.partition(".")
        number = getattr(owner, outer)[entry] if entry else getattr(owner, outer)
        power: float = float(number) ** self.exponent
        return power


ONE = Scalar(1.0)


@dataclass(frozen=True)
class NormDescription:
    """A norm: module and formula.

    Attributes:
        centered: layer norm instead of root-mean-square norm.
        offset: what is added to the weight: 1 in Gemma.
        over_all_heads: of queries or keys: one norm over the features of all heads.
    """

    name: str
    eps: Scalar
    centered: bool = False
    offset: float = 0.0
    over_all_heads: bool = False


@dataclass(frozen=True)
class Rotation:
    """How a layer's queries and keys are rotated.

    Attributes:
        module: the module of the decoder that gives cos and sin.
        layer_type: what it is asked for, where it knows several kinds of layers.
        interleaved: each even feature turns with the next one, instead of the two halves with each other.
        tables: how the module gives the angles a, b, ... of a token: as halves (a b a b), in pairs (Cohere: a a b b), or each once
            (GPT-OSS: a b).
    """

    module: str
    layer_type: str | None = None
    interleaved: bool = False
    tables: TableLayout = "halves"


@dataclass(frozen=True)
class PositionScale:
    """Queries at position p are multiplied by 1 + beta * log(1 + floor(p / length)) (Ministral 3)."""

    beta: Scalar
    length: Scalar


@dataclass(frozen=True)
class HeadsDescription:
    """What becomes of the queries or keys between projection and products."""

    norm: NormDescription | None = None
    rotation: Rotation | None = None
    rotate_first: bool = False
    position_scale: PositionScale | None = None


@dataclass(frozen=True)
class AttentionDescription:
    """Attention of one layer.

    Attributes:
        projections: q, k and v; q and k where the values are projected as the keys; or one for all.
        layout: of one projection for all.
        clip: the projections' outputs are cut at plus and minus this (OLMo).
        window: tokens that a token sees, itself included; None for all before it.
        sinks: the parameter with a score per head that no value belongs to (GPT-OSS).
    """

    projections: tuple[str, ...]
    output: str
    head_dim: Scalar
    query: HeadsDescription
    key: HeadsDescription
    scale: Scalar
    layout: FusedLayout | None = None
    value_norm: NormDescription | None = None
    clip: Scalar | None = None
    window: Scalar | None = None
    softcap: Scalar | None = None
    sinks: str | None = None


@dataclass(frozen=True)
class MlpDescription:
    """activation(gate) * up, or activation(up) alone, projected back.

    Attributes:
        projections: gate and up; or one, of both where `gated`.
    """

    projections: tuple[str, ...]
    output: str
    activation: str
    gated: bool


@dataclass(frozen=True)
class ModuleMlp:
    """A module that is called as it is: a mixture of experts, or an activation of its own."""

    name: str


@dataclass(frozen=True)
class LayerDescription:
    """One decoder layer; see the module's docstring."""

    attention: AttentionDescription
    mlp: MlpDescription | ModuleMlp
    attention_norm: NormDescription | None = None
    attention_out_norm: NormDescription | None = None
    mlp_norm: NormDescription | None = None
    mlp_out_norm: NormDescription | None = None
    parallel: bool = False
    attention_multiplier: Scalar = ONE
    mlp_multiplier: Scalar = ONE
    output_multiplier: Scalar = ONE

    @property
    def shares_norm(self) -> bool:
        """Whether attention and MLP read the same norm."""
        return self.parallel and self.attention_norm == self.mlp_norm


@dataclass(frozen=True)
class DecoderDescription:
    """Embedding, layers and the last norm; `embedding_multiplier` comes after what the embedding's module does itself."""

    layers: tuple[LayerDescription, ...]
    norm: NormDescription
    embedding_multiplier: Scalar = ONE

    @property
    def rotations(self) -> frozenset[Rotation]:
        """All kinds of rotation of its layers."""
        found = (layer.attention.query.rotation for layer in self.layers)
        return frozenset(rotation for rotation in found if rotation is not None)

    @property
    def calls_modules(self) -> bool:
        """Whether some MLP is a module of the model: nobody knows then whether it asks the host."""
        return any(isinstance(layer.mlp, ModuleMlp) for layer in self.layers)
