"""Journals reach W&B's server through the real client: every step once, in order, whatever happened to the job."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrored import WrittenPack, use_server, without_pace
from wandb_server import WandbServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch)
        yield running


@pytest.mark.slow
def test_eight_runs_and_two_attempts_with_a_rollback(server: WandbServer, tmp_path: Path) -> None:
    pack = WrittenPack(tmp_path, 8, max_steps=40)
    with pack.job(cause="preempted"):
        pack.train(20)
        pack.train(27)
    assert {stored.ends == [] and stored.preempting > 0 for stored in server.runs.values()} == {True}
    assert [len(stored.rows) for stored in server.runs.values()] == [28] * 8
    with pack.job(cause="done"):
        pack.roll_back(20)
        pack.train(25)
        pack.train(40)
    assert len(server.runs) == 8
    for run in pack.runs:
        stored = server.runs[run.id]
        assert without_pace(stored.history) == pack.expected(run)
        assert stored.steps == list(range(41))
        assert stored.overwritten == 0
        assert stored.ends == [0]
