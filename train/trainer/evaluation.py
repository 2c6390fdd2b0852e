"""Teacher-forced evaluation of many runs at once over their held-out rows.

A row counts as answered exactly if each of its target tokens is the arg-max given the correct tokens before it. In exactly this case
greedy decoding gives the whole answer, so exact match needs no generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from train.data.micro_batch import MicroBatch
from train.data.sampling import sequences_of
from train.data.token_table import TokenTable
from train.nn.loss import sums_per_run, target_losses
from train.nn.packed_model import PackedModel
from train.trainer.context import JobContext


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (nats per target token) and the share of rows answered exactly."""

    loss: float
    exact_match: float


@torch.no_grad()
def evaluate(
    base: PackedModel,
    tables: dict[int, TokenTable],
    pack_size: int,
    micro_batch_tokens: int,
    job: JobContext,
) -> dict[int, Evaluation]:
    """Evaluate the runs in `tables` (held-out rows by run index), each over its own table; the processes of the job share the rows.

    `job.activity` shows how many of all rows are done; each process counts its own share for all of them.

    Raises:
        Stopped: the job was asked to stop; nothing has changed.
    """
    sequences = [s for run, table in tables.items() for s in sequences_of(run, table, np.arange(len(table)))]
    if sequences:
        job.activity.begin("evaluating", len(sequences))
    losses = torch.zeros(pack_size, dtype=torch.float64)
    exact_rows = torch.zeros(pack_size, dtype=torch.int64)
    for chunk in job.group.micro_batches(sequences, micro_batch_tokens, job.stop):
        batch = MicroBatch(chunk, pack_size, base.device)
        hidden = base.hidden_states(batch)[batch.target_positions]
        outcome = target_losses(hidden, base.head, batch.targets, weights=None)
        losses += sums_per_run(outcome.losses, batch).cpu()
        by_sequence, run_of_sequence = batch.targets_by_sequence
        # [sequences, longest]: the filler repeats a sequence's first target, so it does not change `all`. Two sequences with 3 and 2
        # targets, the last of the first one wrong: [[1, 1, 0], [1, 1, filler 1]] -> [False, True]. If both belong to run 1 of 2,
        # `bincount` of [1] adds [0, 1] to the exact rows.
        answered = by_sequence.pad(outcome.correct).all(dim=1)
        exact_rows += torch.bincount(run_of_sequence[answered], minlength=pack_size).cpu()
        job.activity.advance(len(chunk) * job.group.size)
    job.group.all_reduce(losses, exact_rows)
    return {
        run: Evaluation(float(losses[run]) / table.num_targets(), int(exact_rows[run]) / len(table))
        for run, table in tables.items()
    }


def evaluate_untrained(
    base: PackedModel,
    tables: dict[int, TokenTable],
    pack_size: int,
    micro_batch_tokens: int,
    job: JobContext,
) -> dict[int, Evaluation]:
    """Evaluate runs whose B is still zero, with the base alone: once for all runs that share a table.

    `base` must carry no adapters. Raises as `evaluate` does.
    """
    # Reversed, so that the first run with a table is the one that stays: tables {0: t, 1: u, 2: t} give {t: 0, u: 1}.
    first_run = {id(table): run for run, table in reversed(tables.items())}
    shared = {run: tables[run] for run in first_run.values()}
    evaluations = evaluate(base, shared, pack_size, micro_batch_tokens, job)
    return {run: evaluations[first_run[id(table)]] for run, table in tables.items()}
