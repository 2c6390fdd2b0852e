"""Whatever W&B's server does, the job ends in time and ``launcher sync`` completes what is missing later."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until, without_pace
from train.mirror.child import PATIENCE_SECONDS
from wandb_server import WandbServer

pytestmark = pytest.mark.slow

OUTAGES = ["down", "500", "401", "silent"]


@dataclass(frozen=True)
class Case:
    """A job of two runs and its own server, which will have an outage of some kind."""

    outage: str
    folder: Path
    server: WandbServer
    pack: WrittenPack

    def fail(self) -> None:
        if self.outage == "down":
            self.server.stop()
        else:
            self.server.mode = self.outage  # type: ignore[assignment]

    def repair(self) -> None:
        if self.outage == "down":
            self.server.start()
        self.server.mode = "good"


class Cases:
    """A case per kind of outage, side by side, since each waits for its deadlines."""

    def __init__(self, folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self._monkeypatch = monkeypatch
        self.all = []
        for outage in OUTAGES:
            (folder / outage).mkdir()
            pack = WrittenPack(folder / outage, 2, max_steps=steps, mode="auto")
            self.all.append(Case(outage, folder / outage, stack.enter_context(WandbServer()), pack))

    def train(self, during: Callable[[], None]) -> float:
        """Start a job of each, do something, and end them; the seconds that the slowest took to end."""
        jobs = [case.pack.job(cause="done") for case in self.all]
        for case, job in zip(self.all, jobs, strict=True):
            use_server(case.server, case.folder, self._monkeypatch)
            job.__enter__()
        during()
        ended = time.monotonic()
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(lambda job: job.__exit__(None, None, None), jobs))
        return time.monotonic() - ended

    def sync(self) -> None:
        """Repair the servers, and bring every journal to its own."""
        for case in self.all:
            case.repair()
            use_server(case.server, case.folder, self._monkeypatch)
            done = launcher(case.folder, "sync", f"root={case.folder}")
            assert done.returncode == 0, done.stdout + done.stderr
            assert_arrived(case.server, case.pack)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_from_the_start(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = Cases(tmp_path, stack, monkeypatch, steps=20)
    for case in cases.all:
        case.fail()

    def during() -> None:
        for case in cases.all:
            case.pack.train(20)

    assert cases.train(during) < PATIENCE_SECONDS + 10
    said = capfd.readouterr().out
    for case in cases.all:
        assert f"W&B: offline ({case.server.url} " in said
        assert not case.server.runs
    cases.sync()


def test_in_the_middle(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = Cases(tmp_path, stack, monkeypatch, steps=40)

    def during() -> None:
        for case in cases.all:
            case.pack.train(15)
        for case in cases.all:
            wait_until(lambda case=case: [len(run.rows) for run in case.server.runs.values()] == [16, 16])
            case.fail()
            case.pack.train(40)

    assert cases.train(during) < PATIENCE_SECONDS + 10
    for case in cases.all:
        assert [stored.ends for stored in case.server.runs.values()] == [[], []], case.outage
    cases.sync()
    for case in cases.all:
        assert [stored.ends for stored in case.server.runs.values()] == [[0], [0]]


def test_an_online_run_waits_for_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        use_server(server, tmp_path, monkeypatch)
        pack = WrittenPack(tmp_path, 1, max_steps=20, mode="online")
        server.stop()
        with pack.job(cause="done"):
            pack.train(10)
            time.sleep(2)
            server.start()
            pack.train(20)
            wait_until(lambda: bool(server.runs))
        assert_arrived(server, pack)
        assert not pack.sweep.wandb.exists()


def test_a_run_that_cannot_be_sent_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run of the pack is refused by W&B, and another's folder goes while its worker is replaced."""
    with WandbServer() as server:
        use_server(server, tmp_path, monkeypatch)
        pack = WrittenPack(tmp_path, 3, max_steps=20)
        refused, gone, good = pack.runs
        server.refused.add(refused.id)
        with pack.job(cause="done") as said:
            pack.train(5)
            wait_until(lambda: good.id in server.runs and server.runs[good.id].steps == list(range(6)))
            shutil.rmtree(gone.path)
            pack.runs = [refused, good]
            pack.end_worker()
            pack.train(12)
            wait_until(lambda: server.runs[good.id].steps == list(range(13)))
            pack.train(20)
        assert said == ["W&B lacks the end of these runs; 'python -m launcher sync ranks' sends it"]
        assert capfd.readouterr().out.count("W&B: online") == 1, "however many workers there were"
        assert without_pace(server.runs[good.id].history) == pack.expected(good)
        assert server.runs[good.id].ends == [0]
        server.refused.clear()
        assert launcher(tmp_path, "sync", f"root={tmp_path}").returncode == 0
        assert without_pace(server.runs[refused.id].history) == pack.expected(refused)
