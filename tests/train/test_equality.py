"""A pack is an optimization that no result may reveal: each run equals itself alone, and no run can hurt another."""

from pathlib import Path

import pytest
import torch

import packs
from json_lines import read_lines


def largest_relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 90], ids=["whole", "cut"])
def test_each_run_equals_itself_alone(tmp_path: Path, micro_batch_tokens: int, device: torch.device) -> None:
    base = packs.tiny_base(device=device)
    pack = packs.train(tmp_path / "pack", base, packs.DIVERSE, micro_batch_tokens=micro_batch_tokens)
    for row, config in enumerate(packs.DIVERSE):
        alone = packs.train(tmp_path / f"alone{row}", base, [config])
        together, apart = pack[row].final, alone[0].final
        assert together.keys() == apart.keys()
        for name in apart:
            for part in (0, 1):
                assert largest_relative_error(together[name][part], apart[name][part]) < 1e-10, (row, name)
        ours, theirs = (
            read_lines(d.journal)
            for d in (packs.run_dirs(tmp_path / "pack")[row], packs.run_dirs(tmp_path / f"alone{row}")[0])
        )
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-9)


def test_training_moves_every_adapter_tensor(tmp_path: Path) -> None:
    """Guards the comparison above: equal because nothing moved would prove nothing."""
    for session in packs.train(tmp_path, packs.tiny_base(), packs.DIVERSE):
        assert all(float(b.norm()) > 1e-3 for _, b in session.final.values())


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_diverging_run_leaves_the_others_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, device: torch.device
) -> None:
    base = packs.tiny_base(dtype, device=device)
    healthy = packs.train(tmp_path / "healthy", base, packs.DIVERSE)
    loop = packs.make_loop(tmp_path / "ill", base, packs.DIVERSE)
    sessions: list[packs.Recording] = list(loop.sessions)  # type: ignore[arg-type]
    ill = 4
    for a, _ in loop.adapters.tensors(ill).values():
        a.fill_(float("nan"))
    loop.run()
    for row in range(len(packs.DIVERSE)):
        mine, other = (packs.run_dirs(tmp_path / name)[row] for name in ("ill", "healthy"))
        if row == ill:
            assert not mine.result.exists()
            assert read_lines(mine.journal)[-1] == {"step": 1, "diverged": "the loss is nan"}
            assert read_lines(mine.attempts)[-1]["cause"] == "diverged"
        else:
            assert mine.journal.read_bytes() == other.journal.read_bytes()
            for name, pair in healthy[row].final.items():
                assert all(torch.equal(*both) for both in zip(pair, sessions[row].final[name], strict=True))


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_a_run_that_overflows_float16_skips_its_step_alone(tmp_path: Path, device: torch.device) -> None:
    base = packs.tiny_base(torch.float16, device=device)
    configs = [packs.run_config(train={"seed": seed, "max_steps": 4, "eval_steps": 0}) for seed in range(3)]
    packs.train(tmp_path / "healthy", base, configs)
    loop = packs.make_loop(tmp_path / "overflow", base, configs)
    # Its first gradients are infinite in float16.
    loop.optimizer.loss_scale[1] = 2.0**100
    loop.run()
    for row in (0, 2):
        mine, other = (packs.run_dirs(tmp_path / name)[row] for name in ("overflow", "healthy"))
        assert mine.journal.read_bytes() == other.journal.read_bytes()
    overflowed = packs.run_dirs(tmp_path / "overflow")[1]
    scales = [line["loss_scale"] for line in read_lines(overflowed.journal) if "loss_scale" in line]
    assert scales == [2.0**100, 2.0**99, 2.0**98, 2.0**97]
    assert overflowed.result.exists()


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_checkpointed_activations_change_nothing(tmp_path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """By the kernels that every device has; in half precision on a GPU those are a T4's, with its attention's order fixed."""
    kept, recomputed = packs.tiny_base(dtype, device=device), packs.tiny_base(dtype, device=device)
    recomputed.checkpoint_activations()
    a = packs.train(tmp_path / "kept", kept, packs.DIVERSE)
    b = packs.train(tmp_path / "recomputed", recomputed, packs.DIVERSE)
    for mine, other in zip(b, a, strict=True):
        for name in mine.final:
            assert largest_relative_error(mine.final[name][1], other.final[name][1]) < 1e-12


def test_resident_and_unpacked_nf4_are_the_same_numbers(tmp_path: Path) -> None:
    losses = []
    for residency in ("nf4", "resident"):
        base = packs.tiny_base(torch.float32, packs.NF4, residency)
        packs.train(tmp_path / residency, base, packs.DIVERSE[:3])
        losses.append([d.journal.read_bytes() for d in packs.run_dirs(tmp_path / residency)])
    assert losses[0] == losses[1]
