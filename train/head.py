"""The output head of a base: from hidden states to logits, and from the logits' gradient back."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

WORD_MULTIPLE = 8  # 16 bytes of a half-precision row


class Head:
    """A frozen head [words, dim] in whole rows of 16 bytes.

    A vocabulary like GPT-2's 50,257, or 32,000 and a padding token, makes rows of logits that matrix units take slowly (NVIDIA's
    guide to matrix multiplication), and the rounding of such a product changed with the number of tokens (measured on an H200 with
    97 words: in three of eight runs one number in 5,000 of the gradient was another in a pack than alone, while forward, backward
    and optimizer were the same to the bit up to there). On CPUs with AMX an odd number of bfloat16 words takes the last one of a row
    together with the first of the next row times zero, and a NaN there enters this row (torch 2.11). So the head gets words that
    nobody says: zeros whose logits are -inf, which change no probability and no gradient.

    Attributes:
        words: the real ones; logits have columns for the others too.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.words = len(weight)
        missing = -self.words % WORD_MULTIPLE
        self._weight = functional.pad(weight.data, (0, 0, 0, missing)) if missing else weight.data
        weight.data = self._weight[: self.words]  # nothing is there twice, whatever else the parameter is tied to
        self.dtype, self.device = weight.dtype, weight.device

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, dim] -> [N, words and a few more]."""
        logits = functional.linear(hidden, self._weight)
        if len(self._weight) > self.words:
            logits[:, self.words :] = -math.inf
        return logits

    def gradient_of_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient of `logits` to that of the hidden states [N, dim]."""
        return gradient @ self._weight
