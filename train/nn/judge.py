"""Which path computes a model, decided by numbers: sequences laid together in a pack against transformers given each one alone.

Random sequences of two runs are one micro-batch of the packed model. Stock transformers is given each of them alone. Compared are the
last hidden states, the logits, and the gradient of a random adapter on every linear layer, each as a relative error:

    hidden states, logits   of each token; the largest of a sequence's first tokens counts, of the next seven, and of all others, since
                            rounding is least at the start, where few tokens are attended to. A leak into a few tokens is not averaged
    gradients               of A and B of each run and layer, and the largest of each kind of layer (q_proj, down_proj) counts

Errors are against stock transformers in float64. A path passes if its errors are at most twice those of stock transformers in the
judged precision, or below a floor: 1e-5 in float32, half a step of the number format in 16 bits (`FLOORS`). So float32 is allowed
1e-5, and more only where transformers itself is further from float64 than half of that. A path that fails narrowly is judged again with
other numbers (`CHANCE`): what leaks or is left out does so again.

A mixture of experts in 16 bits sends some tokens to other experts than float64 does, in the stock model as in the packed one, and which
tokens is chance. There the largest error says nothing, so the median and the three quarters of the tokens with the least error count
instead (`ROUTED_QUANTILES`), and the gradients are allowed as much more as the stock model's hidden states are off. What rests on few
tokens is then seen by the float32 copy alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from train.errors import BadInput, LorapackError
from train.model.copies import first_sentence, run_as_loaded
from train.model.loading import quiet
from train.model.reference_code import reference_code
from train.nn.packed_model import PackedModel
from train.nn.probing import (
    LENGTHS,
    LONGEST,
    Probe,
    Results,
    first_difference,
    packed_results,
    stock_results,
    token_errors,
)
from train.sizing import ComputePath

PATHS: tuple[ComputePath, ...] = ("own", "flat", "padded")
# Errors below are rounding: relative, by precision.
FLOORS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TWICE = 2.0
ROUTED_QUANTILES = (0.5, 0.75)
# Positions at which the second and the third group of tokens begin.
POSITION_GROUPS = (1, 8)
# In 16 bits some models amplify rounding in a token now and then (a norm of what is almost zero), so stock transformers is measured so
# many times more, each time with a few numbers of its embeddings rounded up.
DITHERED = 2
# A path whose error is at most this many times what is allowed, by bytes per number, is judged again, with other tokens and adapters:
# the rounding of stock transformers is measured on few numbers.
CHANCE = {8: 2.0, 4: 2.0, 2: 10.0}
MOST_TRIES = 3
# A gradient smaller than this share of the largest is compared with that share: it is made of rounding alone.
SMALLEST_GRADIENT = 1e-3


@dataclass(frozen=True)
class Attempt:
    """What a path gave.

    Attributes:
        difference: the largest relative error, in what it was measured (``hidden states``, ``gradient of q_proj``); None if the path
            raised an error.
        allowed: how large it might have been.
        why: the module whose output differs first, or the error's first sentence; empty if the path passed.
    """

    path: ComputePath
    passed: bool
    difference: float | None = None
    allowed: float = 0.0
    measured: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.path}: {self.why}"
        found = f"{self.path}: {self.measured} differ by {self.difference:.1e}, at most {self.allowed:.1e} is rounding"
        return f"{self.path}: {self.difference:.1e}" if self.passed else found + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True)
class Verdict:
    """The first path that passed, None where none did, and what every path tried before gave."""

    path: ComputePath | None
    attempts: tuple[Attempt, ...]

    def checked(self, kind: str) -> ComputePath:
        """The path that passed, for the architecture `kind`.

        Raises:
            BadInput: none did.
        """
        if self.path is None:
            raise BadInput(refusal(kind, [str(attempt) for attempt in self.attempts]))
        return self.path


def refusal(kind: str, attempts: list[str]) -> str:
    """Why an architecture is not trained, from what its paths gave."""
    return (
        f"the architecture {kind!r} is computed by no path as transformers computes it ({'; '.join(attempts)}); "
        "choose a model of another architecture."
    )


def judge(
    stock: PreTrainedModel,
    packed: Callable[[PreTrainedModel, ComputePath], PackedModel],
    reference: torch.device | None = None,
    paths: tuple[ComputePath, ...] = PATHS,
    longest: int = LONGEST,
    seed: int = 0,
) -> Verdict:
    """Take the first of `paths` that computes what `stock` does.

    Args:
        stock: transformers' model, in the precision to be judged.
        packed: packs a copy of it by a path.
        reference: where the same model is computed in float64, if not on its own device.
        longest: no sequence of the pack has more tokens, so none that is longer is compared.
    """
    examiners = [_Examiner(stock, packed, reference, longest, seed + other) for other in range(MOST_TRIES)]
    attempts: list[Attempt] = []
    with quiet():
        for path in paths:
            attempts.append(_best_of(examiners, path))
            if attempts[-1].passed:
                return Verdict(path, tuple(attempts))
    return Verdict(None, tuple(attempts))


def _best_of(examiners: list[_Examiner], path: ComputePath) -> Attempt:
    """The attempt with the first numbers, or one with other numbers that passed where those may have failed by chance."""
    first = examiners[0].attempt(path)
    for examiner in examiners[1:]:
        if first.passed or first.difference is None or first.difference > examiner.chance * first.allowed:
            break
        again = examiner.attempt(path)
        if again.passed:
            return again
    return first


class _Examiner:
    """Compares paths with one stock model, whose own results are computed once."""

    def __init__(
        self,
        stock: PreTrainedModel,
        packed: Callable[[PreTrainedModel, ComputePath], PackedModel],
        reference: torch.device | None,
        longest: int,
        seed: int,
    ) -> None:
        self._stock = stock
        self._packed = packed
        self._reference = stock.device if reference is None else reference
        self._longest = longest
        self._seed = seed
        self._dtype = stock.get_input_embeddings().weight.dtype
        self._routed = self._dtype.itemsize == 2 and has_experts(stock)
        self.chance = CHANCE[self._dtype.itemsize]
        self._known: tuple[dict[str, tuple[int, int]], Probe, list[Results], Results] | None = None

    def attempt(self, path: ComputePath) -> Attempt:
        """What `path` gives. Whatever the model's own code raises counts as a difference, as a job would not survive it either."""
        try:
            base = self._packed(run_as_loaded(copy.deepcopy(self._stock)), path)
            probe, stocks, exact = self._stock_results(base.shapes)
            found = packed_results(base, probe)
        except Exception as exc:
            return Attempt(path, passed=False, why=_reason(exc))
        worst = max(self._errors(found, stocks, exact), key=lambda error: error[1] / error[2])
        measured, difference, allowed = worst
        if difference <= allowed:
            return Attempt(path, True, difference, allowed, measured)
        return Attempt(path, False, difference, allowed, measured, self._culprit(base, probe, allowed))

    def _stock_results(self, shapes: dict[str, tuple[int, int]]) -> tuple[Probe, list[Results], Results]:
        if self._known is None or self._known[0] != shapes:
            vocabulary = self._stock.get_input_embeddings().weight.shape[0]
            probe = Probe.of(shapes, vocabulary, self._dtype, self._longest, self._seed)
            with reference_code():
                exact = self._exact_results(probe)
            dithered = range(DITHERED if self._dtype.itemsize == 2 else 0)
            stocks = [stock_results(self._stock, probe)]
            stocks += [stock_results(self._stock, probe, dither=seed) for seed in dithered]
            self._known = (shapes, probe, stocks, exact or stocks[0])
        return self._known[1:]

    def _exact_results(self, probe: Probe) -> Results | None:
        """In float64, or, where the model's code insists on float32, in float32 on the CPU; None if that is the judged precision."""
        exact = copy.deepcopy(self._stock).to(self._reference)
        try:
            return stock_results(exact.double(), probe)
        # Code that mixes float64 with what it makes in float32.
        except RuntimeError:
            return None if self._dtype == torch.float32 else stock_results(exact.float(), probe)

    def _errors(self, found: Results, stocks: list[Results], exact: Results) -> Iterator[tuple[str, float, float]]:
        """What was measured, its error, and how large it may be."""
        floor = FLOORS[self._dtype]
        slack = 0.0
        for name, measured in (("hidden", "hidden states"), ("logits", "logits")):
            truth = getattr(exact, name)
            theirs = [token_errors(getattr(stock, name), truth) for stock in stocks]
            if self._routed:
                slack = max(slack, *(float(errors.max()) for errors in theirs))
            most = [max(same) for same in zip(*map(self._summaries, theirs), strict=True)]
            for mine, stocks_error in zip(
                self._summaries(token_errors(getattr(found, name), truth)), most, strict=True
            ):
                yield measured, mine, max(floor, TWICE * stocks_error)
        of_stocks = [gradient_errors(stock.gradients, exact.gradients) for stock in stocks]
        for kind, error in gradient_errors(found.gradients, exact.gradients).items():
            yield f"gradients of {kind}", error, max(floor, TWICE * (max(of[kind] for of in of_stocks) + slack))

    def _summaries(self, errors: torch.Tensor) -> list[float]:
        """What counts of the errors [T] of all tokens: the largest of each group of positions; with experts in 16 bits, quantiles."""
        if self._routed:
            return [float(errors.quantile(quantile)) for quantile in ROUTED_QUANTILES]
        positions = torch.cat([torch.arange(length) for run in LENGTHS for length in np.minimum(run, self._longest)])
        groups = torch.bucketize(positions, torch.tensor(POSITION_GROUPS), right=True)
        return [
            float(errors[groups == group].max())
            for group in range(len(POSITION_GROUPS) + 1)
            if bool((groups == group).any())
        ]

    def _culprit(self, base: PackedModel, probe: Probe, allowed: float) -> str:
        """The first module whose output differs; nothing for our own decoder, which calls no modules."""
        if base.path == "own":
            return ""
        try:
            name = first_difference(self._stock, base, probe, allowed)
        except Exception:
            return ""
        return "" if name is None else f"first in {name}"


def _reason(error: Exception) -> str:
    """An error's first sentence, with its class unless it is meant for users."""
    sentence = first_sentence(error)
    return sentence if isinstance(error, LorapackError) else f"{type(error).__name__}: {sentence}"


def has_experts(model: PreTrainedModel) -> bool:
    """Whether tokens choose between parts of the model."""
    text = model.config.get_text_config(decoder=True).to_dict()
    return any("expert" in key and type(value) is int and value > 1 for key, value in text.items())


def gradient_errors(found: dict[str, list[torch.Tensor]], exact: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """The largest relative error of A's and B's gradients, by the kind of layer: model.layers.0.self_attn.q_proj is a q_proj."""
    # A and B apart: their gradients have other sizes.
    sizes = [max((float(both[i % 2].norm()) for both in _pairs(exact)), default=0.0) for i in range(2)]
    errors: dict[str, float] = {}
    for name, expected in exact.items():
        kind = name.rpartition(".")[2]
        for i, (mine, truth) in enumerate(zip(found[name], expected, strict=True)):
            size = max(float(truth.norm()), SMALLEST_GRADIENT * sizes[i % 2], 1e-30)
            error = float((mine - truth).norm()) / size
            errors[kind] = max(errors.get(kind, 0.0), error if error == error else float("inf"))
    return errors


def _pairs(gradients: dict[str, list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    for values in gradients.values():
        for i in range(0, len(values), 2):
            yield values[i : i + 2]
