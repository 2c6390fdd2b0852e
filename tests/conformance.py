"""What the conformance tests compare: a pack over one tiny architecture, and stock transformers and PEFT, one sequence at a time.

Stock results come from each sequence alone, unpadded and without a cache, so nothing of batching is in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import packs
from architectures import ARCHITECTURES, LONGEST, tiny_model
from json_lines import read_lines
from train.config import LoraConfig, QuantConfig, RunConfig
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence, examples_of_step, sequences_of
from train.data.token_table import TokenTable
from train.lora.peft_files import read_adapter
from train.model.experts import expert_stacks
from train.model.linears import frozen_linears
from train.model.nf4 import dequantize, quantize
from train.nn.base import judge_loaded, weight_reader
from train.nn.judge import Verdict
from train.nn.loss import target_losses
from train.nn.packed_model import DeviceSetup, PackedModel, pack_model
from train.store.layout import RunDir
from train.trainer.loop import PackLoop

STEPS = 5
ROWS = packs.random_table(12, seed=7, longest=LONGEST)
# Parts of a module's name that say that it belongs to what mixes tokens.
MIXER = re.compile(r"attn|attention|mixer|mamba|conv|temporal")
SETUP = DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "nf4", longest=LONGEST)
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


@cache
def verdict(name: str) -> Verdict:
    """What the judge says of the architecture with its own weights, as when a job loads it."""
    model = stock(name)
    return judge_loaded(model, weight_reader(model, None), torch.float32, SETUP)


def packed(name: str, quant: QuantConfig = packs.SIXTEEN_BIT) -> PackedModel:
    """The architecture as a job runs it; refused as there."""
    path = verdict(name).checked(name)
    return pack_model(stock(name), replace(SETUP, quant=quant), path=path)


def stock(name: str) -> PreTrainedModel:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    return tiny_model(name)


def two_runs(name: str, base: PackedModel) -> list[RunConfig]:
    """One run that adapts attention, or what stands in its place, and one that adapts all; they learn in their own ways."""
    refused = ARCHITECTURES[name].not_adapted
    parts = [linear.rpartition(".") for linear in base.shapes]
    parts = [part for part in parts if not (refused and re.search(refused, part[2]))]
    # AFMoE's attention has a gate_proj as its experts have, which PEFT takes for theirs.
    others = {last for owner, _, last in parts if not MIXER.search(owner)}
    mixer = list(dict.fromkeys(last for owner, _, last in parts if MIXER.search(owner) and last not in others))
    everything = list(dict.fromkeys(last for _, _, last in parts)) if refused else "all-linear"
    common = {"max_steps": STEPS, "eval_steps": 0, "save_steps": STEPS}
    return [
        packs.run_config({"r": 4, "target_modules": mixer}, common),
        packs.run_config(
            {"r": 3, "target_modules": everything, "use_rslora": True},
            common | {"batch_size": 3, "max_grad_norm": 0.5, "seed": 5, "learning_rate": 3e-3},
        ),
    ]


def started(folder: Path, name: str, base: PackedModel) -> PackLoop:
    """A pack of `two_runs` over `base`, with B random too, so that A has gradients from the first step on."""
    loop = packs.make_loop(folder, base, two_runs(name, base), packs.random_data())
    generator = torch.Generator().manual_seed(3)
    for row in range(len(loop.sessions)):
        for _, b in loop.adapters.tensors(row).values():
            b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return loop


def copies(loop: PackLoop, row: int, matrix: torch.Tensor | None = None) -> Adapter:
    return {name: (a.clone(), b.clone()) for name, (a, b) in loop.adapters.tensors(row, matrix).items()}


@dataclass(frozen=True)
class Trained:
    """A pack that was trained to its end; each list has an entry per run."""

    name: str
    configs: list[RunConfig]
    starts: list[Adapter]
    losses: list[list[float]]
    runs: list[RunDir]

    def resume(self, folder: Path) -> PackLoop:
        """The trained runs on a fresh base."""
        loop = started(folder, self.name, packed(self.name))
        for row, run in enumerate(self.runs):
            adapter = read_adapter(run.adapter)
            for name, pair in loop.adapters.tensors(row).items():
                for matrix, trained in zip(pair, adapter[name], strict=True):
                    matrix.copy_(trained)
        loop.adapters.refresh()
        return loop


def train(folder: Path, name: str) -> Trained:
    loop = started(folder, name, packed(name))
    configs = [session.config for session in loop.sessions]
    starts = [copies(loop, row) for row in range(len(configs))]
    loop.run()
    runs = packs.run_dirs(folder)
    losses = [[line["loss"] for line in read_lines(run.journal) if "loss" in line] for run in runs]
    return Trained(name, configs, starts, losses, runs)


# Stock transformers and PEFT


def dequantized(name: str) -> PreTrainedModel:
    """The architecture with the values that NF4 can hold in its linear layers and experts, each quantized for itself."""
    model = stock(name)
    linears = [linear.weight for linear in frozen_linears(model).values()]
    experts = [matrix for stack in expert_stacks(model).values() for matrix in stack.matrices]
    for weight in linears + experts:
        weight.copy_(dequantize(*quantize(weight, packs.NF4)))
    return model


def stock_loss(model: Any, tokens: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """The sum of the target losses of one sequence alone."""
    logits = model(input_ids=torch.tensor(tokens).long()[None], use_cache=False).logits[0, :-1]
    targets = torch.tensor(labels).long()[1:]
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@torch.no_grad()
def stock_losses(model: Any, table: TokenTable) -> torch.Tensor:
    """The summed loss of each row [rows]."""
    return torch.stack([stock_loss(model, *table.example(row)) for row in range(len(table))])


@torch.no_grad()
def stock_logits(model: Any) -> torch.Tensor:
    """Logits [T, vocabulary] of all rows, each alone."""
    rows = [torch.tensor(ROWS.example(row)[0]).long()[None] for row in range(len(ROWS))]
    return torch.cat([model(input_ids=tokens, use_cache=False).logits[0] for tokens in rows])


@torch.no_grad()
def stock_greedy(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The most likely next token, `count` times, each from the whole sequence before it."""
    tokens = torch.tensor(prompt).long()[None]
    for _ in range(count):
        likeliest = model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()
        tokens = torch.cat([tokens, likeliest[None, None]], dim=1)
    return tokens[0, len(prompt) :].tolist()


def stock_tuned(name: str, lora: LoraConfig, adapter: Adapter) -> Any:
    """The architecture with PEFT's layers on the modules of `adapter`, and its numbers in them."""
    model = stock(name)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=list(adapter),
        use_rslora=lora.use_rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    # PEFT takes some families' "gate_proj" for experts, even if it is named in full.
    with patch.object(model.config, "model_type", "another"):
        model = peft.get_peft_model(model, config)
    parameters = dict(model.named_parameters())
    for module, pair in adapter.items():
        for letter, matrix in zip("AB", pair, strict=True):
            parameters[f"base_model.model.{module}.lora_{letter}.default.weight"].data.copy_(matrix)
    return model


def stock_training(name: str, config: RunConfig, start: Adapter) -> list[float]:
    """The losses of the textbook loop from the same start: PEFT's layers, torch's optimizer, sequences one by one."""
    train, data = config.train, packs.random_data().train
    model = stock_tuned(name, config.lora, start)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for step in range(STEPS):
        rows = [data.example(int(row)) for row in examples_of_step(train, len(data), step)]
        targets = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
        loss = torch.stack([stock_loss(model, *row) for row in rows]).sum() / targets
        loss.backward()  # type: ignore[no-untyped-call]
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# Packs


@torch.no_grad()
def pack_losses(base: PackedModel, table: TokenTable) -> torch.Tensor:
    """The summed loss of each row [rows], all rows in one micro-batch."""
    batch = MicroBatch(sequences_of(0, table, np.arange(len(table))), 1, packs.CPU)
    hidden = base.hidden_states(batch)[batch.target_positions]
    losses = target_losses(hidden, base.head, batch.targets, weights=None).losses
    by_sequence, _ = batch.targets_by_sequence
    return by_sequence.pad_with_zeros(losses).sum(dim=1)


@torch.no_grad()
def pack_logits(loop: PackLoop, row: int) -> torch.Tensor:
    """One run's logits [T, vocabulary] of all rows."""
    sequences = sequences_of(row, ROWS, np.arange(len(ROWS)))
    batch = MicroBatch(sequences, len(loop.sessions), packs.CPU)
    return loop.base.head.logits(loop.base.hidden_states(batch))[:, : loop.base.head.vocab_size]


def gradients(loop: PackLoop, sequences: list[TokenSequence]) -> tuple[torch.Tensor, list[Adapter]]:
    """The summed losses of the runs [runs] over a micro-batch, and the gradient of each run's adapter."""
    loop.adapters.gradient.zero_()
    weights = torch.tensor([1.0, 1.0, 0.0])
    losses = loop.gradients.add(sequences, weights, None)
    return losses, [copies(loop, row, loop.adapters.gradient) for row in range(len(loop.sessions))]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def adapter_error(found: Adapter, expected: Adapter) -> float:
    """The relative error of all matrices together."""
    assert found.keys() == expected.keys()
    flat = [torch.cat([m.flatten() for pair in adapter.values() for m in pair]) for adapter in (found, expected)]
    return relative_error(*flat)
