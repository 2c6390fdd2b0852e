"""What the journals say of speed: no more than was computed in the time, wherever steps are held back or written at once."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import packs
from json_lines import read_lines

STEP_SECONDS = 0.05


def test_no_speed_is_above_that_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every step is written but the newest, as on a slow CPU.
    monkeypatch.setattr("train.trainer.loop.FLUSH_SECONDS", 0.0)
    config = packs.run_config(train={"max_steps": 8, "save_steps": 3, "eval_steps": 4})
    loop = packs.make_loop(tmp_path, packs.tiny_base(), [config, config])
    compute = loop.gradients.add

    def slowly(*arguments: Any) -> torch.Tensor:
        time.sleep(STEP_SECONDS)
        return compute(*arguments)

    monkeypatch.setattr(loop.gradients, "add", slowly)
    runs = [session.dir for session in loop.sessions]
    loop.run()
    for run in runs:
        tokens = [line["tokens"] for line in read_lines(run.journal) if "tokens" in line]
        paces = read_lines(run.pace)
        assert [line["step"] for line in paces] == list(range(1, 9))
        assert max(line["tokens_per_second"] for line in paces) <= max(tokens) / STEP_SECONDS
        assert all(line["pack_tokens_per_second"] == pytest.approx(2 * line["tokens_per_second"]) for line in paces)


def test_a_run_diverged_once_however_long_the_others_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attempt names the step of its journal's last line, and no later checkpoint is left for a resume to begin from."""
    monkeypatch.setattr("train.trainer.loop.FLUSH_SECONDS", 0.0)
    config = packs.run_config(train={"max_steps": 9, "save_steps": 2, "eval_steps": 4})
    loop = packs.make_loop(tmp_path, packs.tiny_base(), [config, config])
    run = loop.sessions[0].dir
    for a, _ in loop.adapters.tensors(0).values():
        a.fill_(float("nan"))
    loop.run()
    assert read_lines(run.journal)[-1] == {"step": 1, "diverged": "the loss is nan"}
    (attempt,) = read_lines(run.attempts)
    assert (attempt["cause"], attempt["last_step"]) == ("diverged", 1)
    assert run.checkpoint_steps() == []
