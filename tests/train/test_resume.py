"""A job may die at any moment; what is left of it is what an undisturbed job leaves, to the last bit."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import packs
from captured_log import captured_log
from json_lines import read_lines
from train.runtime.attempts import last_step
from train.runtime.signals import Stopped
from train.store.layout import RunDir
from train.trainer import loop
from train.trainer.checkpoint import load_checkpoint, sound_checkpoints

KILLS = 20


def train_in_this_process(folder: str) -> None:
    """What the processes below run: the eight diverse runs, in float32, resumed from whatever is there.

    Every step goes to the journal at once, so that a kill finds journals that have run ahead of their checkpoints.
    """
    torch.set_num_threads(1)
    loop.FLUSH_SECONDS = 0.0
    packs.train(
        Path(folder), packs.tiny_base(torch.float32), packs.DIVERSE, micro_batch_tokens=200, decoder=packs.DECODER
    )


def wait_for_a_moment(process: multiprocessing.process.BaseProcess, folder: Path, moments: random.Random) -> None:
    """Wait for a random step and a random while, or now and then for the while alone: so that a kill finds a process that loads,
    trains, evaluates or saves, on a fast machine and on a busy one."""
    step = moments.randint(1, 19) if moments.random() < 0.8 else 0
    while process.exitcode is None and max((last_step(run) for run in packs.run_dirs(folder)), default=0) < step:
        time.sleep(0.002)
    process.join(timeout=moments.uniform(0, 0.1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_the_result_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["packs"])

    def start(folder: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train_in_this_process, args=(str(folder),))
        process.start()
        return process

    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    assert any(name.endswith("samples") for name in packs.remains(tmp_path / "undisturbed"))
    moments = random.Random(0)
    kills = ran_ahead = 0
    while kills < KILLS:
        process = start(tmp_path / "killed")
        wait_for_a_moment(process, tmp_path / "killed", moments)
        # Finished before its moment came: start again.
        if process.exitcode == 0:
            assert packs.remains(tmp_path / "killed") == packs.remains(tmp_path / "undisturbed")
            shutil.rmtree(tmp_path / "killed")
            continue
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        ran_ahead += any(
            last_step(run) > max(run.checkpoint_steps(), default=0) for run in packs.run_dirs(tmp_path / "killed")
        )
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    assert packs.remains(tmp_path / "killed") == packs.remains(tmp_path / "undisturbed")
    causes = [line["cause"] for run in packs.run_dirs(tmp_path / "killed") for line in read_lines(run.attempts)]
    assert set(causes) <= {"node_fail", "done"}
    assert ran_ahead > KILLS / 4, "few kills left a journal to be cut back: the moments are badly chosen"


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_nothing_differs(tmp_path: Path) -> None:
    """In training, between micro-batches and in the middle of an evaluation."""
    base = packs.tiny_base(torch.float32)
    packs.train(tmp_path / "undisturbed", base, packs.DIVERSE, micro_batch_tokens=200)
    for looks in (1, 2, 5, 14, 15, 30, 44, 45):
        folder = tmp_path / f"stopped{looks}"
        pack = packs.make_loop(folder, base, packs.DIVERSE, micro_batch_tokens=200, stop=packs.StopAfter(looks))
        with pytest.raises(Stopped):
            pack.run()
        for session in pack.sessions:
            session.end("preempted", "SIGTERM")
        todo = [(i, c) for i, c in enumerate(packs.DIVERSE) if not packs.run_dirs(folder)[i].result.exists()]
        assert todo
        packs.train(folder, base, packs.DIVERSE, micro_batch_tokens=200)
        assert packs.remains(folder) == packs.remains(tmp_path / "undisturbed"), looks


@pytest.fixture
def stopped_run(tmp_path: Path) -> RunDir:
    """One run with checkpoints of the steps 7 and 9."""
    base = packs.tiny_base(torch.float32)
    pack = packs.make_loop(tmp_path, base, [packs.run_config()], stop=packs.StopAfter(11))
    with pytest.raises(Stopped):
        pack.run()
    pack.sessions[0].end("preempted", "SIGTERM")
    run = packs.run_dirs(tmp_path)[0]
    assert run.checkpoint_steps() == [7, 9]
    return run


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    stopped_run: RunDir, tmp_path: Path
) -> None:
    state = stopped_run.checkpoint(9) / "state.safetensors"
    content = bytearray(state.read_bytes())
    # A single bit.
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with captured_log() as said:
        assert list(sound_checkpoints(stopped_run)) == [7]
    assert "step 9 is damaged" in said[0]
    assert (stopped_run.checkpoints / "damaged-step-00000009").is_dir()
    base = packs.tiny_base(torch.float32)
    packs.train(tmp_path, base, [packs.run_config()])
    packs.train(tmp_path / "undisturbed", base, [packs.run_config()])
    assert packs.remains(tmp_path) == packs.remains(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_no_damage_passes(stopped_run: RunDir, name: str, damage: str) -> None:
    file = stopped_run.checkpoint(9) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert load_checkpoint(stopped_run, 9) is None
    assert load_checkpoint(stopped_run, 7) is not None


@pytest.mark.slow
def test_killed_between_the_saves_of_two_runs_both_go_on_from_the_step_that_both_have(tmp_path: Path) -> None:
    base = packs.tiny_base(torch.float32)
    packs.train(tmp_path / "undisturbed", base, packs.DIVERSE[:3])
    folder = tmp_path / "killed"
    pack = packs.make_loop(folder, base, packs.DIVERSE[:3], stop=packs.StopAfter(14))
    with pytest.raises(Stopped):
        pack.run()
    for session in pack.sessions:
        session.end("preempted", "SIGTERM")
    first, second, _ = packs.run_dirs(folder)
    newest = second.checkpoint_steps()[-1]
    # As if the kill had come between the first run's save and the second's.
    shutil.rmtree(second.checkpoint(newest))
    again = packs.make_loop(folder, base, packs.DIVERSE[:3])
    assert {session.step for session in again.sessions} == {second.checkpoint_steps()[-1]}
    assert newest not in first.checkpoint_steps(), "its journal was cut off, so it must not be resumed from"
    again.run()
    assert packs.remains(folder) == packs.remains(tmp_path / "undisturbed")


def test_a_checkpoint_that_its_journal_does_not_reach_is_not_used(stopped_run: RunDir) -> None:
    os.truncate(stopped_run.journal, stopped_run.journal.stat().st_size - 1)
    assert load_checkpoint(stopped_run, 9) is None
    assert load_checkpoint(stopped_run, 7) is not None
    stopped_run.journal.unlink()
    assert load_checkpoint(stopped_run, 7) is None
