"""What a decoder computes, call by call: the inputs and outputs of its modules and what reaches attention, in one forward of a copy.

A layer's modules do not say how they are wired: a `post_attention_layernorm` stands before the MLP in Llama and behind attention in
OLMo 2. The numbers do. Of a Llama layer with input x and output y a trace holds, in this order,

    input_layernorm            x  -> n
    self_attn.q_proj, ...      n  -> q
    attention                  q, k, v after the rotation, scale, mask -> a
    self_attn.o_proj           a  -> o
    post_attention_layernorm   x + o -> m
    mlp.gate_proj, ...

and `train.nn.reading` finds whose output is whose input. The copy computes in float64, where equal means equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from train.model.anatomy import decoder_layers, text_decoder
from train.model.loading import quiet
from train.nn.attention_calls import TRACED_ATTENTION, AttentionCall, FusedAttention

# A prime, so that no dimension of a model is taken for it.
TRACED_TOKENS = 23


@dataclass(frozen=True)
class Call:
    """One call of a module, by its name within the layer or the decoder: the first tensor that it was given, and that it gave."""

    name: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


@dataclass
class LayerTrace:
    """One decoder layer: its input and output [T, hidden], and what was called in between."""

    layer: nn.Module
    input: torch.Tensor
    output: torch.Tensor
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)


@dataclass(frozen=True)
class RotaryCall:
    """A module that gave cos and sin [T, R] for all tokens; `layer_type` is what it was asked for, where it knows several."""

    name: str
    layer_type: str | None
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class ModelTrace:
    """A whole forward: the embedding's output, the layers, calls outside of them, and the last hidden state [T, hidden]."""

    config: Any
    positions: torch.Tensor
    embedded: torch.Tensor
    layers: list[LayerTrace]
    calls: list[Call]
    rotaries: list[RotaryCall]
    hidden: torch.Tensor


def trace(model: PreTrainedModel) -> ModelTrace:
    """Run the text decoder of a small `model` on random tokens with random weights, and note every call. The model is changed: weights,
    precision, attention.

    Raises:
        Exception: whatever the model's own code raises.
    """
    # transformers warns of models that have attention of their own.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet():
        torch.manual_seed(0)
        # Not a vision tower, which may be large. Drawn as they are, since torch draws float64 slowly.
        _randomize(text_decoder(model))
        text_decoder(model).double()
        tokens = torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (1, TRACED_TOKENS))
        return _Tracer(model.eval()).run(tokens)


def _randomize(model: nn.Module) -> None:
    """Weights of which each matters: initial norms, biases and scalars are neutral, and would hide what they do."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        # Such as Gemma 4's factor of a layer's output.
        if name in saved and buffer.is_floating_point() and buffer.numel() == 1:
            buffer.add_(0.5 * torch.rand_like(buffer))


class _Tracer:
    """Hooks on every module, and an attention that notes its arguments."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = text_decoder(model)
        self._layers: list[LayerTrace] = []
        self._open: LayerTrace | None = None
        # The modules of a layer whose code runs now, the innermost last.
        self._running: list[nn.Module] = []
        self._fused: list[AttentionCall] = []
        self._calls: list[Call] = []
        self._rotaries: list[RotaryCall] = []
        self._embedded = torch.empty(0)

    def run(self, tokens: torch.Tensor) -> ModelTrace:
        """Trace one sequence [1, T]."""
        config = self._model.config.get_text_config(decoder=True)
        positions = _first_position(config) + torch.arange(tokens.shape[1])[None]
        with self._hooked(), FusedAttention(self._innermost, self._fused.append):
            # Those with attention of their own keep what they were made with.
            self._model.set_attn_implementation(TRACED_ATTENTION)
            # Grouped products of experts take no float64.
            if hasattr(self._model, "set_experts_implementation"):
                self._model.set_experts_implementation("eager")
            output = self._decoder(input_ids=tokens, position_ids=positions, use_cache=False)
        return ModelTrace(
            config, positions[0], self._embedded, self._layers, self._calls, self._rotaries, flat(output[0])
        )

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        layers = decoder_layers(self._model)
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(self._open_layer, with_kwargs=True))
            for name, module in layer.named_modules():
                # transformers passes the module to the attention function, and nothing of ours.
                module.note_attention = self._note_attention
                if module is not layer:
                    handles.append(module.register_forward_pre_hook(self._enter))
                    handles.append(module.register_forward_hook(partial(self._leave, name), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._close_layer))
        for name, module in self._decoder.named_modules():
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in _names_of(self._decoder, layers)):
                handles.append(module.register_forward_hook(partial(self._note, name), with_kwargs=True))
        embedding = self._model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(self._note_embedding))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _open_layer(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._open = LayerTrace(layer, flat(_first_tensor((*arguments, *named.values()))), torch.empty(0))
        self._layers.append(self._open)

    def _close_layer(self, _layer: nn.Module, _arguments: Any, output: Any) -> None:
        assert self._open is not None
        self._open.output = flat(_first_tensor(output))
        # What takes the place of exchanged attention calls PyTorch's as well.
        self._open.attention = self._open.attention or self._fused.copy()
        self._fused.clear()
        self._open = None

    def _enter(self, module: nn.Module, _arguments: Any) -> None:
        self._running.append(module)

    def _leave(self, name: str, module: nn.Module, *call: Any) -> None:
        self._running.pop()
        self._note(name, module, *call)

    def _innermost(self) -> nn.Module | None:
        return self._running[-1] if self._running else None

    def _note_embedding(self, _module: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        self._embedded = flat(output)

    def _note(
        self, name: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        given = (*arguments, *named.values())
        if isinstance(output, tuple) and len(output) == 2 and _are_tables(*output):
            layer_type = next((value for value in given if isinstance(value, str)), None)
            self._rotaries.append(RotaryCall(name, layer_type, *(flat(table) for table in output)))
            return
        read, wrote = _first_tensor(given), _first_tensor(output)
        if read is None or wrote is None:
            return
        # Copies, since later operations may work in place.
        calls = self._calls if self._open is None else self._open.calls
        calls.append(Call(name, module, read.clone(), wrote.clone()))

    def _note_attention(self, call: AttentionCall) -> None:
        if self._open is not None:
            self._open.attention.append(call)


def _first_position(config: Any) -> int:
    """The first of positions around the length that the model was first trained on, since some things change beyond it."""
    settings = getattr(config, "rope_parameters", None) or {}
    lengths = [
        each["original_max_position_embeddings"]
        for each in (settings, *settings.values())
        if isinstance(each, dict) and "original_max_position_embeddings" in each
    ]
    return max(0, int(lengths[0]) - TRACED_TOKENS // 2) if lengths else 0


def flat(x: torch.Tensor | None) -> torch.Tensor:
    """[1, T, ...] -> [T, ...], as a copy."""
    if x is None:
        return torch.empty(0)
    return x[0].clone() if x.shape[0] == 1 else x.clone()


def _names_of(decoder: nn.Module, layers: nn.ModuleList) -> list[str]:
    return [name for name, module in decoder.named_modules() if module is layers]


def _first_tensor(values: Any) -> torch.Tensor | None:
    """A tensor, or the first in a tuple or list."""
    if isinstance(values, torch.Tensor):
        return values
    if not isinstance(values, tuple | list):
        values = getattr(values, "values", tuple)()
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


def _are_tables(cos: Any, sin: Any) -> bool:
    """Whether two results are cos and sin of the tokens' rotations."""
    if not (isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor)):
        return False
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1] != TRACED_TOKENS or not cos.is_floating_point():
        return False
    # Up to a factor that both may have (yarn, longrope).
    square = cos.square() + sin.square()
    return bool(torch.allclose(square, square.flatten()[0].expand_as(square), rtol=1e-3))
