"""What the judge compares: sequences with adapters, and the numbers that stock transformers and a packed model make of them.

Stock transformers is given every sequence alone, and adapters are added by hooks, by PEFT's formula. The packed model is given all of
them in one micro-batch of two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.lora.parameters import PackedAdapters
from train.lora.targets import Target
from train.model.anatomy import decoder_layers, layers_name, text_decoder
from train.nn.gradients import add_gradients
from train.nn.packed_model import PackedModel

# Tokens of each run's sequences: shorter and longer than convolutions, windows and chunks (`train.model.narrowing`).
LENGTHS = ((3, 67), (13, 21, 8))
LONGEST = 67
RANK = 4
# Of an embedding's numbers.
DITHERED_SHARE = 0.05
# How strongly the adapters act, as a share of the layers' own outputs.
ADAPTED_SHARE = 0.1

Adapters = list[dict[str, tuple[torch.Tensor, torch.Tensor]]]


@dataclass
class Results:
    """What one way of computing gave, in float64 on the CPU: a row of `hidden` and `logits` per token, sequence by sequence."""

    hidden: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """The sequences that are laid together, and an adapter per run and linear layer, in float64."""

    sequences: list[TokenSequence]
    adapters: Adapters

    @staticmethod
    def of(
        shapes: dict[str, tuple[int, int]], vocabulary: int, dtype: torch.dtype, longest: int, seed: int = 0
    ) -> Probe:
        """Random tokens and adapters; these are rounded to `dtype`, so that every precision computes with the same numbers."""
        random = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        sequences = [
            TokenSequence(
                run, place, tokens := random.integers(1, vocabulary - 2, min(length, longest)).astype(np.int32), tokens
            )
            for run, lengths in enumerate(LENGTHS)
            for place, length in enumerate(lengths)
        ]
        adapters = [
            {
                name: (
                    (torch.randn(RANK, into, generator=generator) / into**0.5).to(dtype).double(),
                    (torch.randn(out, RANK, generator=generator) * ADAPTED_SHARE / RANK**0.5).to(dtype).double(),
                )
                for name, (out, into) in shapes.items()
            }
            for _ in LENGTHS
        ]
        return Probe(sequences, adapters)


def token_errors(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The relative error [T] of every row of [T, n]; infinite where it is not a number."""
    errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
    return torch.where(errors.isnan(), torch.inf, errors)


def stock_results(model: PreTrainedModel, probe: Probe, dither: int | None = None) -> Results:
    """What stock transformers computes with every sequence alone; adapters are added by hooks, as PEFT's formula says.

    With a seed `dither`, a few numbers of the embeddings are one step of their format too large.
    """
    weight = model.get_input_embeddings().weight
    hidden: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    runs: list[dict[str, list[torch.Tensor]]] = []
    for run, adapters in enumerate(probe.adapters):
        placed = {
            name: tuple(x.to(weight, copy=True).requires_grad_() for x in both) for name, both in adapters.items()
        }
        loss: Any = 0.0
        with _adapted(model, placed), _last_hidden(model, hidden), _dithered(model, dither):
            for sequence in (s for s in probe.sequences if s.run_index == run):
                tokens = torch.from_numpy(sequence.tokens.astype(np.int64)).to(weight.device)[None]
                found = model(tokens, use_cache=False).logits[0]
                logits.append(found.detach().double().cpu())
                wide = found.to(torch.promote_types(found.dtype, torch.float32))
                loss = loss + functional.cross_entropy(wide[:-1], tokens[0, 1:], reduction="sum")
        flat = [x for both in placed.values() for x in both]
        found_gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        runs.append({name: [_double(next(found_gradients), x) for x in both] for name, both in placed.items()})
    together = {name: [x for run in runs for x in run[name]] for name in runs[0]}
    return Results(torch.cat(hidden), torch.cat(logits), together)


def _double(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return (torch.zeros_like(like) if gradient is None else gradient).detach().double().cpu()


@contextmanager
def _adapted(model: PreTrainedModel, adapters: dict[str, tuple[torch.Tensor, ...]]) -> Iterator[None]:
    """Add each layer's adapter to its output."""

    def hook(a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda _module, inputs, output: output + inputs[0] @ a.T @ b.T

    with ExitStack() as stack:
        for name, (a, b) in adapters.items():
            handle = model.get_submodule(name).register_forward_hook(hook(a, b))
            stack.callback(handle.remove)
        yield


@contextmanager
def _dithered(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Move the embeddings by chance, without a `seed` by nothing."""
    if seed is None:
        yield
        return
    random = torch.Generator().manual_seed(seed)

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        moved = (torch.rand(output.shape, generator=random) < DITHERED_SHARE).to(output.device)
        return torch.where(moved, output * (1 + torch.finfo(output.dtype).eps), output)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _last_hidden(model: PreTrainedModel, found: list[torch.Tensor]) -> Iterator[None]:
    """Collect the text decoder's outputs [length, hidden] while the whole model runs."""

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0][0].detach().double().cpu())

    handle = text_decoder(model).register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def packed_results(base: PackedModel, probe: Probe) -> Results:
    """What a packed model computes with all sequences laid together, in one micro-batch."""
    adapters = _packed_adapters(base, probe)
    base.attach(adapters)
    try:
        batch = MicroBatch(probe.sequences, len(probe.adapters), base.device)
        with torch.no_grad():
            hidden = base.hidden_states(batch)
            logits = base.head.logits(hidden)[:, : base.head.vocab_size]
        weights = torch.tensor([1.0] * len(probe.adapters) + [0.0], device=base.device)
        add_gradients(base, batch, weights.to(torch.promote_types(base.dtype, torch.float32)), None)
    finally:
        base.attach(None)
    runs = [adapters.tensors(run, adapters.gradient) for run in range(len(probe.adapters))]
    gradients = {name: [x.double().cpu() for run in runs for x in run[name]] for name in base.shapes}
    return Results(hidden.double().cpu(), logits.double().cpu(), gradients)


def _packed_adapters(base: PackedModel, probe: Probe) -> PackedAdapters:
    target = Target(RANK, float(RANK), 1.0)
    targets = [dict.fromkeys(adapters, target) for adapters in probe.adapters]
    adapters = PackedAdapters(targets, base.shapes, [0.0] * len(targets), base.dtype, base.device)
    for run, wanted in enumerate(probe.adapters):
        for name, own in adapters.tensors(run).items():
            for mine, theirs in zip(own, wanted[name], strict=True):
                mine.copy_(theirs)
    adapters.refresh()
    return adapters


@torch.no_grad()
def first_difference(stock: PreTrainedModel, base: PackedModel, probe: Probe, allowed: float) -> str | None:
    """The first module, in the order of the results, of the first decoder layer whose output is off; with its class."""
    watched = _watched_modules(stock)
    theirs: dict[str, list[torch.Tensor]] = {}
    with _watching(stock, watched, lambda name, out: theirs.setdefault(name, []).append(out[0])):
        for sequence in probe.sequences:
            tokens = torch.from_numpy(sequence.tokens.astype(np.int64)).to(base.device)[None]
            stock(tokens, use_cache=False)
    batch = MicroBatch(probe.sequences, len(probe.adapters), base.device)
    mine: dict[str, torch.Tensor] = {}
    order: list[str] = []

    def note(name: str, out: torch.Tensor) -> None:
        order.append(name)
        mine[name] = out[0] if base.path == "flat" else batch.attention.unpad(out, batch.total)

    with _watching(base.model, watched, note):
        base.hidden_states(batch)
    layers = len(decoder_layers(stock))
    prefix = layers_name(stock)
    wrong = [name for name in order if name in theirs and _is_off(mine[name], theirs[name], allowed)]
    for index in range(layers):
        layer = f"{prefix}.{index}"
        if layer in wrong:
            inside = [name for name in wrong if name == layer or name.startswith(f"{layer}.")]
            return f"{inside[0]} ({type(stock.get_submodule(inside[0])).__name__})"
    return f"{wrong[0]} ({type(stock.get_submodule(wrong[0])).__name__})" if wrong else None


def _watched_modules(model: PreTrainedModel) -> list[str]:
    inside = layers_name(model).rpartition(".")[0]
    return [name for name, _ in model.named_modules() if name.startswith(inside)]


@contextmanager
def _watching(model: nn.Module, names: list[str], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `note` with the first tensor of each module's output, if it has rows of tokens [rows, tokens, ...]."""

    def hook(name: str) -> Callable[..., None]:
        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.dim() == 3:
                note(name, first)

        return read

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield


def _is_off(mine: torch.Tensor, theirs: list[torch.Tensor], allowed: float) -> bool:
    """Whether an output [T, ...] differs; outputs that are not rows of tokens cannot be compared."""
    expected = torch.cat(theirs) if len({x.shape[1:] for x in theirs}) == 1 else mine[:0]
    if expected.shape != mine.shape:
        return False
    return bool(token_errors(mine.double(), expected.double()).max() > allowed)
