"""The frozen output head: logits of hidden states, by what the model itself does around its output embedding W [vocab, dim], bias b.

    z        = scale * (W hidden + b)
    logits   = cap * tanh(z / cap)          with a soft cap (Gemma 2, arXiv 2408.00118), else z

    Llama, Mistral, Qwen    scale 1
    Granite                 scale 1 / logits_scaling
    Cohere                  scale logit_scale
    MiniCPM                 scale dim_model_base / hidden_size, applied to the hidden states
    Gemma 2, Gemma 3n       cap final_logit_softcapping
    Phi-2                   a bias

Nobody lists the names of these settings: `measure_logits` lets the model's own forward work on chosen numbers and reads scale and cap
off its results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from train.errors import LorapackError
from train.model.anatomy import text_decoder

# Rows of logits in whole 16 bytes, in half precision.
VOCAB_MULTIPLE = 8
# CPUs with AMX take the inner size of a 16-bit product in blocks of 32 (torch 2.11). The last block of a row reaches into the next row,
# whose numbers meet zeros there, and 0 x NaN is NaN. Of inner sizes from 8 to 232, each above 32 that is not a multiple of 32 let a NaN
# of row i into row i - 1 (40, 104, 200...); 64, 96, 128 and 160 did not. Without a NaN every bit repeated from call to call.
CPU_VOCAB_MULTIPLE = 32

# Logits that `measure_logits` tries: powers of two, which no cast rounds. The first shows the slope, the last whether there is a cap.
PROBES = [2.0**-14, 0.0, -(2.0**-6), 0.5, -1.0, 2.0, 8.0, -32.0, 128.0, -512.0, -(2.0**15), 2.0**15]
# In units of the result's relative precision: the rounding of a few operations.
PROBE_TOLERANCE = 16


class UnknownLogits(LorapackError):
    """A model makes its logits by a formula that `Head` does not have."""


@dataclass(frozen=True)
class LogitFormula:
    """How products with the output embedding become logits, as the module's docstring says; `cap` is None without one."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """The logits of W hidden + b."""
        z = products * self.scale
        return z if self.cap is None else soft_cap(z, self.cap)


def soft_cap(z: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(z / cap), which stays within -cap and cap; but -inf, a word that there is not, stays -inf."""
    return torch.where(z == -math.inf, z, torch.tanh(z / cap) * cap)


class Head:
    """A frozen output head [vocab, dim] whose vocabulary is padded with entries whose logits are -inf.

    These entries are never predicted, and change no probability and no gradient. They are there because of vocabularies like GPT-2's
    50,257, or 32,000 and a padding token:

    - Matrix units are slow with rows of logits that are not a multiple of 16 bytes (NVIDIA's guide to matrix multiplication).
    - The rounding of such a product changed with the number of tokens. Measured on an H200 with 97 words: in three of eight runs
      one number in 5,000 of the gradient differed between the pack and the same run alone, while all that came before was
      bit-identical.
    - On CPUs with AMX a NaN would spread to the row before it (`CPU_VOCAB_MULTIPLE`), and so to another run.

    Attributes:
        vocab_size: without the padding; logits have columns for the padding too.
        cap: of `soft_cap`, None without one.
    """

    def __init__(
        self, weight: nn.Parameter, bias: torch.Tensor | None = None, formula: LogitFormula | None = None
    ) -> None:
        formula = formula or LogitFormula()
        self.vocab_size = len(weight)
        self.dtype = weight.dtype
        self.device = weight.device
        self.cap = formula.cap
        self._scale = formula.scale
        half_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        # 97 words need 7 more: -97 % 8 = 7; in half precision on a CPU 31 more.
        missing = -self.vocab_size % (CPU_VOCAB_MULTIPLE if half_on_cpu else VOCAB_MULTIPLE)
        self._weight = functional.pad(weight.data, (0, 0, 0, missing)) if missing else weight.data
        self._bias = None if bias is None else functional.pad(bias.detach() * self._scale, (0, missing))
        # The parameter becomes a view of the padded copy, so nothing is in memory twice, whatever else it is tied to.
        weight.data = self._weight[: self.vocab_size]

    def uncapped(self, hidden: torch.Tensor) -> torch.Tensor:
        """z of the module's docstring, [N, dim] -> [N, vocab and padding]: the logits, but for the cap."""
        if self._scale == 1:
            z = functional.linear(hidden, self._weight, self._bias)
        else:
            z = _scaled_product(hidden, self._weight.t(), self._scale, self._bias)
        if len(self._weight) > self.vocab_size:
            z[:, self.vocab_size :] = -math.inf
        return z

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, dim] -> [N, vocab and padding]."""
        z = self.uncapped(hidden)
        return z if self.cap is None else soft_cap(z, self.cap)

    def hidden_grad(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient of `uncapped` to that of the hidden states [N, dim]."""
        return gradient @ self._weight if self._scale == 1 else _scaled_product(gradient, self._weight, self._scale)


def _scaled_product(
    left: torch.Tensor, right: torch.Tensor, scale: float, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """scale * left right + addend, rounded once: the factor is part of the product, and costs nothing."""
    if addend is not None:
        return torch.addmm(addend, left, right, alpha=scale)
    # With beta 0 the addend is not read.
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def model_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model.

    Raises:
        UnknownLogits: the model makes its logits by another formula.
    """
    embedding: Any = model.get_output_embeddings()
    return Head(embedding.weight, getattr(embedding, "bias", None), measure_logits(model))


@torch.no_grad()
def measure_logits(model: PreTrainedModel) -> LogitFormula:
    """What a model does to its hidden states before the output embedding and to the products behind it.

    The decoder and the output embedding are exchanged for stubs that return chosen numbers, so this costs no forward of the model, and
    the weights of its layers may be anywhere.

    Raises:
        UnknownLogits: it is neither a factor nor a soft cap, and what was measured.
    """
    device = model.get_input_embeddings().weight.device
    words, width = model.get_output_embeddings().weight.shape
    # Signs and powers of two, of which nothing but a factor makes the same multiple.
    hidden = 2.0 ** (torch.arange(len(PROBES) * width) % 5 - 2) * (1 - 2 * (torch.arange(len(PROBES) * width) % 3 % 2))
    hidden = hidden.double().view(1, len(PROBES), width).to(device)
    z = torch.tensor(PROBES, dtype=torch.float64, device=device)
    seen: list[torch.Tensor] = []

    def embed(states: torch.Tensor, *_: Any, **_others: Any) -> torch.Tensor:
        seen.append(states)
        return z[:, None].expand(len(PROBES), words).view(1, len(PROBES), words).clone()

    def decode(*_: Any, **_others: Any) -> _StubOutput:
        return _StubOutput(last_hidden_state=hidden)

    tokens = torch.ones((1, len(PROBES)), dtype=torch.long, device=device)
    with _forward_as(text_decoder(model), decode), _forward_as(model.get_output_embeddings(), embed):
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        # Layers with weights of their own, which do not take float64.
        except RuntimeError as exc:
            raise UnknownLogits(
                f"the architecture {model.config.model_type!r} has more between its decoder and its logits than an output embedding"
            ) from exc
    if len(seen) != 1 or seen[0].shape != hidden.shape or logits.shape != (1, len(PROBES), words):
        raise UnknownLogits(
            f"the architecture {model.config.model_type!r} does not make its logits from one output embedding"
        )
    before = _factor(hidden[0], seen[0][0].double())
    after = _scale_and_cap(z, logits[0])
    if before is None or after is None:
        what = "hidden states" if before is None else f"logits, {PROBES} to {logits[0, :, 0].tolist()},"
        raise UnknownLogits(
            f"the architecture {model.config.model_type!r} changes its {what} in another way than by a factor or a soft cap"
        )
    return LogitFormula(_exactly_one(before * after.scale), after.cap)


@dataclass
class _StubOutput(ModelOutput):  # type: ignore[misc]
    """An output of a decoder that has nothing but its last hidden state: whatever else a model asks for is None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _forward_as(module: Any, stub: Any) -> Iterator[None]:
    """Let calls of `module` go to `stub`."""
    own = vars(module).get("forward")
    module.forward = stub
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _factor(given: torch.Tensor, found: torch.Tensor) -> float | None:
    """c where found = c * given; None where it is not."""
    ratio = found / given
    factor = float(ratio.flatten().median())
    return factor if bool(((ratio - factor).abs() <= 2**-7 * abs(factor)).all()) else None


def _scale_and_cap(z: torch.Tensor, found: torch.Tensor) -> LogitFormula | None:
    """The formula that makes of z [n] what was found [n, vocab]; None where there is none."""
    values = found[:, 0].double()
    scale = float((values[0] - values[1]) / z[0])
    # The last number is far above any cap: tanh is 1 there. Without a cap it is not tried as one.
    for cap in (None, float(values[-1]) or None):
        formula = LogitFormula(_exactly_one(scale), cap)
        tolerance = PROBE_TOLERANCE * torch.finfo(found.dtype).eps
        expected = formula(z)[:, None].expand_as(found)
        if scale != 0 and torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance * 2**-14):
            return formula
    return None


def _exactly_one(scale: float) -> float:
    """A scale, where rounding alone may make it differ from 1: plain products keep their bits."""
    return 1.0 if abs(scale - 1) < 2**-20 else scale
