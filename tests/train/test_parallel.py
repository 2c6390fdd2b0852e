"""A pack on several devices computes what it computes on one, and ends like one whatever happens to its processes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import packs
from json_lines import read_lines
from train.data.sampling import TokenSequence
from train.errors import PeerLost
from train.runtime.attempts import cause_of
from train.runtime.rendezvous import NothingToDo, ProcessInfo, detect_process, publish_rendezvous, wait_for_rendezvous
from train.runtime.signals import StopFlag, Stopped
from train.store.layout import PackDir, RunDir
from train.store.storage import make_folder
from train.trainer import loop
from train.trainer.process_group import SingleProcess, deal, open_process_group

pytestmark = pytest.mark.timeout(900)

# Machines that run other tests at the same time are slow.
PATIENCE_SECONDS = 300
FINAL = "final.safetensors"
ENDLESS = [packs.run_config(train={"max_steps": 100_000, "save_steps": 5, "eval_steps": 0, "seed": s}) for s in (0, 1)]


def flat(session: packs.Recording) -> dict[str, torch.Tensor]:
    """The final adapter in float64; the run's own file holds it in float32."""
    return {f"{name}/{part}": t for name, pair in session.final.items() for part, t in zip("AB", pair, strict=True)}


class Dies(StopFlag):
    """Kills its process at the n-th look, in the middle of training."""

    looks = 15

    def check(self) -> None:
        self.looks -= 1
        if self.looks == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().check()


def process_of_a_job(folder: str, rank: int, size: int, start: str, which: str, dies: int | None) -> None:
    """What each process of a job does: the whole of `train.trainer.pack`, with the tiny model in the place of a loaded one."""
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_RUN_ID"] = start
    loop.FLUSH_SECONDS = 0.0
    stop, group, pack = (Dies() if rank == dies else StopFlag()).install(), SingleProcess(), None
    try:
        with open_process_group(ProcessInfo(rank, size, rank), PackDir(Path(folder) / "job"), stop) as group:
            configs = packs.DIVERSE if which == "diverse" else ENDLESS
            pack = packs.make_loop(
                Path(folder), packs.tiny_base(), configs, micro_batch_tokens=200, stop=stop, group=group
            )
            if which == "out of memory" and rank == 1:
                raise MemoryError
            sessions = list(pack.sessions)
            pack.run()
            for session in sessions:
                if isinstance(session, packs.Recording):
                    save_file(flat(session), session.dir.path / FINAL)
    except Exception as exc:
        group.report_failure(*cause_of(exc))
        for session in pack.sessions if pack else []:
            session.end(*cause_of(exc))


Job = Callable[..., list[BaseProcess]]


@pytest.fixture(scope="module")
def start_job() -> Iterator[Job]:
    """Starts the processes of a job over a folder, forked from one that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    # Python 3.11's server does not find what lies in tests/.
    context.set_forkserver_preload(["train.trainer.pack"])
    started: list[BaseProcess] = []

    def start(folder: Path, size: int, which: str = "diverse", dies: int | None = None) -> list[BaseProcess]:
        make_folder(folder / "job")
        name = f"start{len(started)}"
        job = [
            context.Process(target=process_of_a_job, args=(str(folder), rank, size, name, which, dies))
            for rank in range(size)
        ]
        for process in job:
            process.start()
        started.extend(job)
        return job

    yield start
    for process in started:
        process.kill()


def finish(job: list[BaseProcess]) -> None:
    for process in job:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode is not None, "a process of the job hangs"


def remains(folder: Path) -> dict[str, bytes]:
    """Everything that has to be the same to the last bit."""
    adapters = {str(run.path.name): run.adapter / "adapter_model.safetensors" for run in packs.run_dirs(folder)}
    journals = {f"{run.path.name}/journal": run.journal for run in packs.run_dirs(folder)}
    return {name: file.read_bytes() for name, file in (adapters | journals).items()}


def assert_equal_to_rounding(folder: Path, other: Path) -> None:
    """Relative errors below 1e-10, of every adapter tensor and of every number in the journals."""
    for mine, theirs in zip(packs.run_dirs(folder), packs.run_dirs(other), strict=True):
        ours, others = read_lines(mine.journal), read_lines(theirs.journal)
        assert [line.keys() for line in ours] == [line.keys() for line in others]
        assert ours == [pytest.approx(line, rel=1e-10, abs=1e-12) for line in others]
        # The run was over before the kill.
        if not (mine.path / FINAL).exists():
            continue
        a, b = (load_file(run.path / FINAL) for run in (mine, theirs))
        assert a.keys() == b.keys()
        assert all(float((a[name] - b[name]).norm() / b[name].norm()) < 1e-10 for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight diverse runs, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for session in packs.train(folder, packs.tiny_base(), packs.DIVERSE, micro_batch_tokens=200):
        save_file(flat(session), session.dir.path / FINAL)
    return folder


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, start_job: Job) -> Path:
    """The same, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    finish(start_job(folder, 2))
    return folder


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(alone: Path, by_two: Path) -> None:
    assert all((run.path / FINAL).exists() for run in packs.run_dirs(by_two))
    assert_equal_to_rounding(by_two, alone)
    for run in packs.run_dirs(by_two):
        assert [line["cause"] for line in read_lines(run.attempts)] == ["done"]
        assert not run.lease.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "resumed_by"), [(0, 2), (1, 1), (1, 3)])
def test_killed_and_resumed_nothing_differs(
    tmp_path: Path, start_job: Job, by_two: Path, alone: Path, killed: int, resumed_by: int
) -> None:
    """By as many processes to the last bit, by more or fewer to rounding."""
    job = start_job(tmp_path, 2, dies=killed)
    finish(job)
    assert job[killed].exitcode == -signal.SIGKILL
    assert not any(run.result.exists() for run in packs.run_dirs(tmp_path))
    assert all(len(read_lines(run.journal)) > 2 for run in packs.run_dirs(tmp_path))
    finish(start_job(tmp_path, resumed_by))
    if resumed_by == 2:
        assert remains(tmp_path) == remains(by_two)
    else:
        assert_equal_to_rounding(tmp_path, alone)
    for run in packs.run_dirs(tmp_path):
        assert [line["cause"] for line in read_lines(run.attempts)] == ["node_fail", "done"]


def wait_until(seen: Callable[[], bool], job: list[BaseProcess]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not seen():
        assert time.monotonic() < deadline
        assert any(process.is_alive() for process in job)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["main", "worker"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path, start_job: Job, rank: int) -> None:
    job = start_job(tmp_path, 2, "endless")
    first, second = (RunDir(tmp_path / f"run{i}-x") for i in (0, 1))
    wait_until(lambda: len(read_lines(second.journal)) > 9, job)
    os.kill(job[rank].pid or 0, signal.SIGTERM)
    finish(job)
    (line,), (other,) = read_lines(first.attempts), read_lines(second.attempts)
    assert (line["cause"], line["detail"]) == ("preempted", "SIGTERM")
    assert line["last_step"] == other["last_step"] == first.checkpoint_steps()[-1]
    assert [process.exitcode for process in job] == [0, 0]


@pytest.mark.slow
def test_a_cancelled_run_leaves_all_processes(tmp_path: Path, start_job: Job) -> None:
    job = start_job(tmp_path, 2, "endless")
    first, second = (RunDir(tmp_path / f"run{i}-x") for i in (0, 1))
    wait_until(lambda: len(read_lines(second.journal)) > 9, job)
    first.cancel_request.touch()
    wait_until(first.attempts.exists, job)
    lines = len(read_lines(second.journal))
    wait_until(lambda: len(read_lines(second.journal)) > lines + 9, job)
    os.kill(job[0].pid or 0, signal.SIGTERM)
    finish(job)
    assert [read_lines(run.attempts)[0]["cause"] for run in (first, second)] == ["cancelled", "preempted"]


@pytest.mark.slow
def test_why_another_process_ended_is_written_down(tmp_path: Path, start_job: Job) -> None:
    finish(start_job(tmp_path, 2, "out of memory"))
    for i in (0, 1):
        (line,) = read_lines(RunDir(tmp_path / f"run{i}-x").attempts)
        assert line["cause"] == "out_of_memory"
        assert line["detail"].startswith("process 1 of this job ended: MemoryError")


def sequences(count: int, seed: int) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 500, count)
    return [TokenSequence(i % 3, i // 3, np.zeros(n, np.int32), np.zeros(n, np.int32)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_every_sequence_is_dealt_once_and_hands_weigh_alike(count: int, size: int) -> None:
    dealt = sequences(count, seed=size)
    hands = deal(dealt, size)
    assert sorted((s.run_index, s.index) for hand in hands for s in hand) == sorted(
        (s.run_index, s.index) for s in dealt
    )
    weights = [sum(len(s.tokens) for s in hand) for hand in hands]
    assert max(weights) - min(weights) <= max(len(s.tokens) for s in dealt)
    again = deal(dealt[::-1], size)
    assert [[id(s) for s in hand] for hand in again] == [[id(s) for s in hand] for hand in hands]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ProcessInfo()),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ProcessInfo(1, 4, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}, ProcessInfo()),
        (
            {"SUBMITIT_EXECUTOR": "slurm", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"},
            ProcessInfo(2, 4, 2),
        ),
        (
            {"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_LOCALID": "0"}
            | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            ProcessInfo(),
        ),
    ],
    ids=["by hand", "torchrun", "by hand in an allocation", "Slurm", "local in an allocation"],
)
def test_a_process_knows_its_place(
    variables: dict[str, str], place: ProcessInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_EXECUTOR", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert detect_process() == place


def test_what_an_earlier_start_left_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, stop = PackDir(tmp_path), StopFlag()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    publish_rendezvous(pack, 1234)
    assert wait_for_rendezvous(pack, stop.check) == 1234
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stop.signal_name = "SIGTERM"
    with pytest.raises(Stopped):
        wait_for_rendezvous(pack, stop.check)
    publish_rendezvous(pack, None)
    with pytest.raises(NothingToDo):
        wait_for_rendezvous(pack, StopFlag().check)


def test_the_end_of_a_peer_has_the_cause_that_it_reported() -> None:
    assert cause_of(PeerLost("out_of_memory", "why")) == ("out_of_memory", "why")
