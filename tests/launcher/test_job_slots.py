"""cluster.max_parallel holds for a sweep: over its arrays, and over the commands that submit to it."""

import time
from pathlib import Path

import pytest

from launcher.cluster.arrays import deal, job_slots
from launcher.errors import ClusterError
from launcher.records import JobSlots
from launcher.terminal.tables import at_once
from launcher.track.jobs import arrays_in_queue
from stand_in import put_command
from train.store.layout import SweepDir
from train.store.storage import make_folder, write_json


@pytest.mark.parametrize(
    ("sizes", "slots", "shares"),
    [([10], 4, [4]), ([2], 8, [2]), ([500, 500], 8, [4, 4]), ([9, 3], 8, [6, 2]), ([1, 1, 1], 2, [1, 1, 1])],
)
def test_slots_are_dealt_out(sizes: list[int], slots: int, shares: list[int]) -> None:
    assert deal(sizes, slots) == shares


@pytest.mark.parametrize(
    ("jobs", "taken", "count", "waits"),
    [
        (100, {}, 8, False),
        # The rest is enough.
        (3, {"12": 5}, 3, False),
        # Half of what they could use is better than to wait.
        (100, {"12": 4}, 4, False),
        # Three would crawl long after the others have ended.
        (100, {"12": 2, "13": 3}, 8, True),
        (1, {"12": 8}, 8, True),
        # Of a time when the limit was higher.
        (1, {"12": 20}, 8, True),
    ],
)
def test_new_jobs_take_what_is_free_or_wait_for_all(jobs: int, taken: dict[str, int], count: int, waits: bool) -> None:
    slots = job_slots(jobs, 8, taken)
    assert (slots.count, slots.waits) == (count, waits)
    assert slots.after == (tuple(taken) if waits else ())
    assert waits or count + sum(taken.values()) <= 8


def test_a_plan_says_how_many_jobs_run_at_once_and_why() -> None:
    assert at_once(JobSlots(8), 3) == "At most 3 of these jobs run at once (cluster.max_parallel)."
    assert "At most 4 of these jobs run at once (cluster.max_parallel), in addition to 4" in at_once(
        JobSlots(4, (("12", 4),)), 9
    )
    text = at_once(JobSlots(8, (("12", 4), ("13", 4)), waits=True), 9)
    assert "jobs 12, 13 of this sweep may use 8 of these: the new jobs wait until the earlier ones have ended" in text


def test_what_is_in_the_queue_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepDir(tmp_path / "runs" / "rank")
    assert arrays_in_queue(sweep) == {}
    for token, parallel in (("1a", 2), ("2b", 4), ("3c", 4)):
        make_folder(sweep.array(token).path)
        packs = [f"p{place}" for place in range(5)]
        record = {
            "name": f"rank.{token}",
            "partition": "t4",
            "packs": packs,
            "submitted": time.time(),
            "job": None,
            "parallel": parallel,
        }
        write_json(sweep.array(token).record, record)
    # Two at once of four.
    rows = [f"rank.1a|12_{task}|PENDING|Priority|" for task in range(4)]
    # Its last one.
    rows += ["rank.2b|13_0|COMPLETED|None|t4-1", "rank.2b|13_4|RUNNING|None|t4-1"]
    rows += ["rank.3c|14_0|CANCELLED|None|"]
    put_command(tmp_path, "squeue", f"cat <<'E'\n{chr(10).join(rows)}\nE", monkeypatch)
    assert arrays_in_queue(sweep) == {"12": 2, "13": 1}
    put_command(tmp_path, "squeue", "exit 1", monkeypatch)
    with pytest.raises(ClusterError, match="squeue does not answer"):
        arrays_in_queue(sweep)
