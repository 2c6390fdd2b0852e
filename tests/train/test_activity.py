"""What a job says of itself outside its journals: while it loads, evaluates, answers and saves."""

import time
from pathlib import Path

import pytest
import torch

import packs
from captured_log import captured_log
from train.runtime import activity as module
from train.runtime.activity import TRAINING, Activity, ActivityPublisher, doing, read_activity
from train.store.layout import PackDir, RunDir
from train.store.lease import Lease, acquire, process_age
from train.store.storage import make_folder, write_text


class Diary(Activity):
    """Remembers what was begun, and how much of it was done when the next thing began."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[tuple[str, int, int]] = []

    def begin(self, what: str, total: int = 0) -> None:
        self.pages.append(self.now)
        super().begin(what, total)


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return acquire(RunDir(make_folder(tmp_path / "run-x")), job="1", attempt=1)


@pytest.fixture
def pack(tmp_path: Path) -> PackDir:
    return PackDir(make_folder(tmp_path / "jobs" / "p1"))


def test_a_pack_counts_every_row_answer_and_save(tmp_path: Path) -> None:
    configs = [packs.run_config(train={"max_steps": 4, "eval_steps": 2, "save_steps": 2}), packs.run_config()]
    diary = Diary()
    loop = packs.make_loop(tmp_path, packs.tiny_base(torch.float32), configs, decoder=packs.DECODER, activity=diary)
    loop.micro_batch_tokens = 40
    loop.run()
    assert all(done == total for _, done, total in diary.pages)
    not_steps = [(what, total) for what, _, total in diary.pages if what != TRAINING]
    rows, prompts = 10, 4
    # The base answers once.
    first = [("importing", 0), ("evaluating", rows), ("answering", prompts), ("saving", 2)]
    assert not_steps[:4] == first
    assert not_steps[4:7] == [("evaluating", rows), ("answering", prompts), ("saving", 2)]


def test_the_way_to_the_first_step_is_logged_once_and_whole(tmp_path: Path) -> None:
    began = time.monotonic()
    activity = Activity(age=5.0)
    loop = packs.make_loop(tmp_path, packs.tiny_base(), [packs.run_config()], activity=activity)
    with captured_log() as logged:
        loop.run()
    (line,) = logged
    assert line.startswith("first step done ")
    assert all(part in line for part in ("importing ", "evaluating ", "saving ", "first step "))
    assert float(line.partition("importing ")[2].partition(" s")[0]) >= 5.0
    total = float(line.removeprefix("first step done ").partition(" s")[0])
    assert 5.0 <= total <= 5.1 + time.monotonic() - began


def test_the_age_of_a_process_counts_from_its_start() -> None:
    clocks, ages = [time.monotonic()], []
    for _ in range(2):
        ages.append(process_age())
        clocks.append(time.monotonic())
        time.sleep(0.1)
        clocks.append(time.monotonic())
    assert 0.1 < ages[0] < 24 * 3600
    passed = ages[1] - ages[0]
    assert clocks[2] - clocks[1] - 0.05 <= passed <= clocks[3] - clocks[0] + 0.05, "it runs as fast as any clock"


def test_a_published_activity_follows_changes_is_silent_otherwise_and_goes(
    pack: PackDir, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POST_SECONDS", 0.01)
    activity = Activity()

    def shows(word: str | None) -> bool:
        deadline = time.monotonic() + 20
        while doing(read_activity(pack), lease) != word:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return True

    with ActivityPublisher(pack, activity, lease):
        assert shows("importing")
        activity.begin("evaluating", 64)
        activity.advance(12)
        assert shows("evaluating 12/64")
        activity.begin(TRAINING)
        assert shows(None)
        written = pack.activity.stat().st_ino
        time.sleep(0.2)
        assert pack.activity.stat().st_ino == written, "steps write nothing"
    assert list(pack.path.iterdir()) == []


def test_a_folder_that_refuses_costs_the_job_nothing(tmp_path: Path, lease: Lease) -> None:
    with ActivityPublisher(PackDir(tmp_path / "gone"), Activity(), lease):
        time.sleep(0.05)


def test_nothing_stale_is_shown(pack: PackDir, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    with ActivityPublisher(pack, Activity(), lease):
        deadline = time.monotonic() + 20
        while (note := read_activity(pack)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert doing(note, lease) == "importing"
    assert doing(note, None) is None
    assert doing(note, lease.model_copy(update={"pid": lease.pid + 1})) is None, "another process has the run by now"
    elsewhere = lease.model_copy(update={"host": "elsewhere", "heartbeat": time.time()})
    note_there = note.model_copy(update={"host": "elsewhere"})
    assert doing(note_there, elsewhere) == "importing"
    assert doing(note_there, elsewhere.model_copy(update={"heartbeat": time.time() - 1000})) is None
    monkeypatch.setattr("train.store.lease.process_started", lambda pid: None)
    assert doing(note, lease) is None, "its process is dead"
    write_text(pack.activity, "")
    assert read_activity(pack) is None
