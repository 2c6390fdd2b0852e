"""Teacher-forced evaluation of many runs at once over their held-out rows.

A row counts as answered exactly if each of its learnt tokens is the arg-max given the right ones before it: that is when greedy
decoding gives the whole answer, so exact match costs no generation.
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
    """Mean loss (nats per learnt token) and the share of rows answered exactly."""

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
    """Evaluate the runs in the rows of `tables`, each over its own table; the processes of the job share the rows.

    `job.activity` learns how many of all rows are done; of several processes one counts for all.

    Raises:
        Stopped: the job was asked to stop; nothing has changed.
    """
    sequences = [s for row, table in tables.items() for s in sequences_of(row, table, np.arange(len(table)))]
    if sequences:
        job.activity.begin("evaluating", len(sequences))
    losses = torch.zeros(pack_size, dtype=torch.float64)
    exact_rows = torch.zeros(pack_size, dtype=torch.int64)
    for chunk in job.group.micro_batches(sequences, micro_batch_tokens, job.stop):
        batch = MicroBatch(chunk, pack_size, base.device)
        found = target_losses(base.hidden_states(batch)[batch.target_positions], base.head, batch.targets, weights=None)
        losses += sums_per_run(found.losses, batch).cpu()
        by_sequence, run_of_sequence = batch.targets_by_sequence
        answered = by_sequence.pad(found.correct).all(dim=1)
        exact_rows += torch.bincount(run_of_sequence[answered], minlength=pack_size).cpu()
        job.activity.advance(len(chunk) * job.group.size)
    job.group.all_reduce(losses, exact_rows)
    return {
        row: Evaluation(float(losses[row]) / tables[row].num_targets(), int(exact_rows[row]) / len(table))
        for row, table in tables.items()
    }


def evaluate_untrained(
    base: PackedModel,
    tables: dict[int, TokenTable],
    pack_size: int,
    micro_batch_tokens: int,
    job: JobContext,
) -> dict[int, Evaluation]:
    """Evaluate runs whose B is still zero: the bare base answers, once for all that share a table.

    `base` must carry no adapters. Raises as `evaluate` does.
    """
    first_row = {id(table): row for row, table in reversed(tables.items())}
    shared = {row: tables[row] for row in first_row.values()}
    found = evaluate(base, shared, pack_size, micro_batch_tokens, job)
    return {row: found[first_row[id(table)]] for row, table in tables.items()}
