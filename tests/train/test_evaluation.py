"""Evaluation: when it happens, and its numbers against plain transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

import packs
from json_lines import read_lines
from train.data.token_table import TokenizedData, TokenTable
from train.store.layout import RunDir


def reference(model: Any, table: TokenTable) -> tuple[float, float]:
    """Loss and exact match, row by row."""
    losses, targets, exact = 0.0, 0, 0
    for i in range(len(table)):
        tokens, labels = (torch.tensor(part).long() for part in table.example(i))
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        learnt = labels[1:] != -100
        losses += float(cross_entropy(logits[learnt], labels[1:][learnt], reduction="sum"))
        targets += int(learnt.sum())
        exact += bool((logits[learnt].argmax(1) == labels[1:][learnt]).all())
    return losses / targets, exact / len(table)


def evaluations(run: RunDir) -> dict[int, tuple[float, float]]:
    lines = [line for line in read_lines(run.journal) if "eval_loss" in line]
    return {line["step"]: (line["eval_loss"], line["eval_exact_match"]) for line in lines}


def easy_data() -> TokenizedData:
    """Rows that always answer 7, so that a few steps answer some exactly, mixed with random ones."""
    table = packs.random_table(40, 3, longest=8)
    labels = table.labels.copy()
    tokens = table.tokens.copy()
    for i in range(0, 40, 2):
        start, end = table.offsets[i], table.offsets[i + 1]
        tokens[start + 1 : end] = 7
        labels[start + 1 : end] = 7
        labels[start] = -100
    easy = TokenTable(tokens, labels, table.offsets)
    return TokenizedData(easy, easy, {})


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40], ids=["whole", "cut"])
def test_the_numbers_are_those_of_transformers_and_peft(tmp_path: Path, micro_batch_tokens: int) -> None:
    data = easy_data()
    configs = [packs.run_config(), packs.run_config({"target_modules": "all-linear"}, {"max_steps": 15})]
    base = packs.tiny_base(torch.float32)
    packs.train(tmp_path, base, configs, data=data, micro_batch_tokens=micro_batch_tokens)
    model = packs.tiny_llama(torch.float32)
    untuned = reference(model, data.eval)
    for run, config in zip(packs.run_dirs(tmp_path), configs, strict=True):
        found = evaluations(run)
        tuned = reference(
            peft.PeftModel.from_pretrained(packs.tiny_llama(torch.float32), run.adapter).eval(), data.eval
        )
        assert found[0] == pytest.approx(untuned, rel=1e-5)
        assert found[config.train.total_steps(40)] == pytest.approx(tuned, rel=1e-4)
        assert 0 < tuned[1] < 1, "some rows exactly, some not: else the share says nothing"


@pytest.mark.parametrize(("eval_steps", "steps"), [(0, [0, 7]), (3, [0, 3, 6, 7]), (7, [0, 7]), (1, list(range(8)))])
def test_it_happens_before_every_so_often_and_after(tmp_path: Path, eval_steps: int, steps: list[int]) -> None:
    config = packs.run_config(train={"max_steps": 7, "eval_steps": eval_steps})
    packs.train(tmp_path, packs.tiny_base(torch.float32), [config])
    assert list(evaluations(packs.run_dirs(tmp_path)[0])) == steps


def test_an_evaluation_that_is_not_finite_is_that_runs_divergence_alone(tmp_path: Path) -> None:
    """Its training loss may still be finite: held-out rows can hold what training rows do not."""
    base = packs.tiny_base(torch.float32)
    configs = [packs.run_config(train={"max_steps": 4, "eval_steps": 2, "seed": seed}) for seed in range(2)]
    table = packs.random_table(5, 9)
    odd = TokenTable(np.where(table.tokens == table.tokens[0], 13, table.tokens), table.labels, table.offsets)
    # A word that only held-out rows have.
    odd.tokens[0] = 96
    data = TokenizedData(packs.random_data().train, odd, {})
    train = data.train.tokens
    train[train == 96] = 5
    base.model.get_input_embeddings().weight.data[96] = float("nan")
    packs.train(tmp_path, base, configs, data=data)
    for run in packs.run_dirs(tmp_path):
        assert read_lines(run.journal)[-1] == {"step": 0, "diverged": "the evaluation loss is nan"}
        assert read_lines(run.attempts)[-1]["cause"] == "diverged"
