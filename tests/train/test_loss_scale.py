"""float16's loss scale belongs to a run: an overflow skips that run's step alone, also across a kill."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import packs
from json_lines import read_lines
from train.config import RunConfig
from train.runtime.attempts import cause_of
from train.runtime.signals import StopFlag, Stopped
from train.trainer.loop import PackLoop
from train.trainer.optim import FIRST_LOSS_SCALE, GROWTH_INTERVAL_STEPS, SMALLEST_LOSS_SCALE

# The run that overflows.
ILL = 1
# Its gradients are infinite in float16 until the scale has halved a few times.
TOO_LARGE = 2.0**26
CONFIGS = [
    packs.run_config(train={"seed": seed, "max_steps": 12, "save_steps": 3, "eval_steps": 0}) for seed in range(3)
]


class StopAfter(StopFlag):
    """Asks to stop at the n-th look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks == 0:
            self.signal_name = "SIGTERM"
        super().check()


def half_loop(folder: Path, scale: float | None = None, configs: list[RunConfig] = CONFIGS, **others: Any) -> PackLoop:
    """A pack in float16, whose ill run begins with `scale`."""
    loop = packs.make_loop(folder, packs.tiny_base(torch.float16), configs, **others)
    assert loop.optimizer.scale_losses
    if scale is not None:
        loop.optimizer.loss_scale[ILL] = scale
    return loop


def journal(folder: Path, row: int) -> list[dict[str, Any]]:
    return [line for line in read_lines(packs.run_dirs(folder)[row].journal) if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    half_loop(folder, TOO_LARGE).run()
    return folder


def test_an_overflow_halves_the_scale_until_it_fits_and_the_run_learns(undisturbed: Path) -> None:
    lines = journal(undisturbed, ILL)
    overflows = [line["grad_norm"] is None for line in lines]
    assert 2 < overflows.index(False) < 9, "several overflows, and steps after them"
    scales = [line["loss_scale"] for line in lines]
    assert scales[0] == TOO_LARGE
    for scale, overflowed, following in zip(scales, overflows, scales[1:], strict=False):
        assert following == (scale / 2 if overflowed else scale)
    assert packs.run_dirs(undisturbed)[ILL].result.exists()


def test_a_skipped_step_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    loop = half_loop(tmp_path, TOO_LARGE)
    loop._evaluate_due()
    before = [matrix.clone() for matrix in state_matrices(loop)]
    loop._train_step()
    for old, new in zip(before, state_matrices(loop), strict=True):
        assert torch.equal(old[ILL], new[ILL])
        assert not any(torch.equal(old[row], new[row]) for row in (0, 2))
    assert loop.optimizer.applied.tolist() == [1, 0, 1]


def state_matrices(loop: PackLoop) -> tuple[torch.Tensor, ...]:
    return loop.adapters.theta, loop.optimizer.exp_avg, loop.optimizer.exp_avg_sq


def test_the_neighbours_of_an_overflow_are_the_same_to_the_bit(undisturbed: Path, tmp_path: Path) -> None:
    half_loop(tmp_path).run()
    for row in (0, 2):
        mine, other = (packs.run_dirs(folder)[row] for folder in (undisturbed, tmp_path))
        assert mine.journal.read_bytes() == other.journal.read_bytes()
        files = [run.adapter / "adapter_model.safetensors" for run in (mine, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("looks", [4, 5, 7, 12])
def test_stopped_in_the_middle_of_overflows_and_resumed_nothing_differs(
    undisturbed: Path, tmp_path: Path, looks: int
) -> None:
    loop = half_loop(tmp_path, TOO_LARGE, stop=StopAfter(looks))
    with pytest.raises(Stopped) as stopped:
        loop.run()
    for session in loop.sessions:
        session.end(*cause_of(stopped.value))
    half_loop(tmp_path).run()
    for mine, other in zip(packs.run_dirs(tmp_path), packs.run_dirs(undisturbed), strict=True):
        assert mine.journal.read_bytes() == other.journal.read_bytes()
        files = [run.adapter / "adapter_model.safetensors" for run in (mine, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_scale_grows_after_enough_good_steps_also_when_a_resume_lies_between(tmp_path: Path) -> None:
    for name, looks in (("undisturbed", 1000), ("stopped", 6)):
        loop = half_loop(tmp_path / name, stop=StopAfter(looks))
        loop.optimizer.good_steps[ILL] = GROWTH_INTERVAL_STEPS - 6
        try:
            loop.run()
        except Stopped as exc:
            for session in loop.sessions:
                session.end(*cause_of(exc))
            half_loop(tmp_path / name).run()
        assert [line["loss_scale"] for line in journal(tmp_path / name, ILL)] == 6 * [FIRST_LOSS_SCALE] + 6 * [
            2 * FIRST_LOSS_SCALE
        ]
        assert {line["loss_scale"] for line in journal(tmp_path / name, 0)} == {FIRST_LOSS_SCALE}


def test_a_run_that_overflows_at_the_smallest_scale_has_diverged_alone(tmp_path: Path) -> None:
    loop = half_loop(tmp_path, 2 * SMALLEST_LOSS_SCALE)
    optimizer_step = loop.optimizer.step

    def overflowing(*arguments: Any) -> Any:
        loop.adapters.gradient[ILL, 0] = math.inf
        return optimizer_step(*arguments)

    loop.optimizer.step = overflowing  # type: ignore[method-assign]
    loop.run()
    ill = packs.run_dirs(tmp_path)[ILL]
    assert [line["loss_scale"] for line in journal(tmp_path, ILL)] == [2 * SMALLEST_LOSS_SCALE]
    assert read_lines(ill.journal)[-1] == {"step": 2, "diverged": "the gradient's norm is inf"}
    assert read_lines(ill.attempts)[-1]["cause"] == "diverged"
    assert all(packs.run_dirs(tmp_path)[row].result.exists() for row in (0, 2))
