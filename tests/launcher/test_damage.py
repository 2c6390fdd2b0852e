"""A damaged or foreign file is named and costs its run alone: every other run and every verb works as before."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.control.cancel import cancel_runs
from launcher.plan.planner import make_plan
from launcher.submit.frozen import frozen_sweep
from old_sweep import FIXTURES, KILLED, OldSweep, copied
from train.store.layout import SweepDir

DONE, STOPPED = "r2-a4-lr0.001-steps12-35103f208f", "r4-a16-lr0.001-steps5000-fabaee7de9"
SLURM_PACK, LOCAL_PACK = "jobs/98572c47", "jobs/7d09db68"

FILES = [
    *(f"{DONE}/{name}" for name in ("config.yaml", "journal.jsonl", "samples.jsonl", "result.json")),
    *(f"{STOPPED}/{name}" for name in ("config.yaml", "journal.jsonl", "pace.jsonl", "attempts.jsonl", "stop.json")),
    *(f"{KILLED}/{name}" for name in ("lease.json", "mirror-offline.json")),
    f"{SLURM_PACK}/pack.json",
    *(f"{LOCAL_PACK}/{name}" for name in ("pack.json", "job.json")),
    "jobs/804b53d5/activity.json",
    "arrays/605c7fa4/array.json",
    "plans/1.json",
    "plans/4.json",
]
# Files of which nothing depends once their process is gone, or which only that process reads.
PASSING = {"lease.json", "stop.json", "activity.json", "mirror-offline.json"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file: Path) -> None:
    file.write_bytes(bytes(range(128, 256)) * 3)


def other_type(value: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(value) + "\n")


def a_needed_key(file: Path, record: dict[str, Any]) -> str:
    return "steps" if file.name == "result.json" else next(iter(record))


def without_a_key(file: Path) -> None:
    change(file, lambda record: record.pop(a_needed_key(file, record)) and None)


def with_a_wrong_type(file: Path) -> None:
    change(file, lambda record: record.update({a_needed_key(file, record): {"no": ["such"]}}))


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the first record of a file; a configuration is text to all who cannot read YAML."""
    first, *rest = file.read_bytes().splitlines(keepends=True) if file.suffix == ".jsonl" else [file.read_bytes()]
    if file.suffix == ".yaml":
        file.write_text("model: 3\n")
        return
    record = json.loads(first)
    edit(record)
    file.write_bytes(json.dumps(record).encode() + b"\n" + b"".join(rest))


def newer(file: Path) -> None:
    change(file, lambda record: record.update(format=3))


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


WAYS: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": cut,
    "garbage": garbage,
    "a list": other_type([1, 2]),
    "a number": other_type(3),
    "null": other_type(None),
    "a key is missing": without_a_key,
    "a wrong type": with_a_wrong_type,
    "a folder": folder,
    "newer": newer,
}
if os.geteuid() != 0:
    WAYS["unreadable"] = lambda file: file.chmod(0)


@pytest.fixture
def sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> OldSweep:
    return copied(tmp_path, capsys, monkeypatch)


def touched_runs(sweep: SweepDir, file: str) -> set[str]:
    """The ids of the runs that a file belongs to: its own, or those of its pack."""
    place, _, _ = file.partition("/")
    if place == "plans":
        return set()
    if place not in {"jobs", "arrays"}:
        return {place.rpartition("-")[2]}
    pack = SLURM_PACK if place == "arrays" else file.rpartition("/")[0]
    runs = json.loads((sweep.path / pack / "pack.json").read_bytes())["runs"]
    return {name.rpartition("-")[2] for name in runs}


def rows(document: dict[str, Any], touched: set[str]) -> list[dict[str, Any]]:
    """The rows of the runs that the damaged file does not belong to."""
    kept = [row for row in document["runs"] if row["id"] not in touched]
    return [{key: value for key, value in row.items() if key not in {"reason", "pack", "damaged"}} for row in kept]


def is_damage(file: str, way: str) -> bool:
    """A growing file that was cut, or has no line yet, is what a killed writer leaves."""
    growing = file.endswith(".jsonl")
    return not (growing and way in {"empty", "cut"})


def ways_of(file: str) -> list[str]:
    """What is tried on a file; of one that nothing depends on, a few ways."""
    return [way for way in WAYS if Path(file).name not in PASSING or way in {"garbage", "a folder", "newer"}]


def said_then(name: str) -> Any:
    """What version 0.1.0 said of the whole folder."""
    return json.loads((FIXTURES / f"{name}-0.1.0.json").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(("file", "way"), [(file, way) for file in FILES for way in ways_of(file)])
def test_a_damaged_file_costs_its_run_alone(file: str, way: str, sweep: OldSweep) -> None:
    touched, path = touched_runs(sweep.dir, file), sweep.dir.path / file
    WAYS[way](path)
    status, report, plan, listed = sweep.status(), sweep.report(), sweep.plan(), sweep("list", "--json")
    answers = [status, report, plan, listed]
    for answer in answers:
        assert answer.code in {0, 1}, answer
        assert "defect" not in answer.err, answer
        assert "Traceback" not in answer.err, answer
    assert rows(status.document, touched) == rows(said_then("status-empty-queue"), touched)
    assert rows(plan.document, touched) == rows(said_then("plan"), touched)
    ranked = {row["id"] for row in report.document["rows"]}
    assert ranked >= {row["id"] for row in said_then("report")["rows"]} - touched

    frozen = frozen_sweep(sweep.dir)
    if is_damage(file, way) and path.name not in PASSING:
        said = " ".join([*(answer.out + answer.err for answer in answers), *frozen.left_out])
        assert str(path) in said
    resumed = make_plan(frozen, retry_failed=True)
    others = {run.id for run in sweep.dir.runs()} - touched
    assert {planned.run.id for planned in resumed.runs} >= others
    cancel_runs(sweep.dir.runs(), wait_seconds=0.0)


@pytest.mark.parametrize("name", ["attempts.jsonl", "journal.jsonl", "pace.jsonl"])
def test_a_damaged_file_of_a_run_makes_it_unknown(name: str, sweep: OldSweep) -> None:
    path = sweep.dir.path / STOPPED / name
    path.write_text("[]\n")
    (run,) = [run for run in sweep.status().document["runs"] if STOPPED.endswith(run["id"])]
    assert (run["state"], run["damaged"]) == ("unknown", True)
    assert run["reason"].startswith(f"{path} is damaged: ")
    assert run["reason"].endswith("Restore it, or remove it and run the same command again.")
    shown = sweep("status").out
    assert f"{path} is damaged" in shown


def test_a_run_whose_job_is_damaged_is_not_trained_again(sweep: OldSweep) -> None:
    (sweep.dir.path / LOCAL_PACK / "job.json").write_text("{")
    (run,) = [run for run in sweep.plan().document["runs"] if STOPPED.endswith(run["id"])]
    assert (run["verdict"], run["pack"]) == ("unknown", None)
    assert "job.json is damaged" in run["reason"]


def test_runs_of_a_damaged_array_are_not_trained_again(sweep: OldSweep) -> None:
    (sweep.dir.path / "arrays" / "605c7fa4" / "array.json").write_text("{")
    (run,) = [run for run in sweep.plan().document["runs"] if run["id"] == "ce819b349c"]
    assert (run["verdict"], run["pack"]) == ("unknown", None)


def test_a_later_version_is_named(sweep: OldSweep) -> None:
    path = sweep.dir.path / DONE / "result.json"
    newer(path)
    (run,) = [run for run in sweep.status().document["runs"] if DONE.endswith(run["id"])]
    assert run["state"] == "unknown"
    assert run["reason"] == (
        f"{path} was written by a newer lorapack (format 3, this version knows 1); upgrade lorapack."
    )


def test_keys_of_a_later_version_are_ignored(sweep: OldSweep) -> None:
    before = sweep.status().document
    for path in [*sweep.dir.path.glob("*/result.json"), *sweep.dir.path.glob("jobs/*/*.json")]:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"a_later_key": {"with": [1]}}))
    for path in sweep.dir.path.glob("*/*.jsonl"):
        change(path, lambda record: record.update(a_later_key=1))
    after = sweep.status().document
    assert rows(after, set()) == rows(before, set())
    assert sweep.report().code == 0


def test_resume_names_what_it_leaves_out(sweep: OldSweep) -> None:
    path = sweep.dir.path / STOPPED / "config.yaml"
    path.write_text("model: [")
    frozen = frozen_sweep(sweep.dir)
    assert [run.folder for run in frozen.runs].count(STOPPED) == 0
    assert any(str(path) in message for message in frozen.left_out)


def test_resume_takes_the_settings_of_the_newest_plan_that_can_be_read(sweep: OldSweep) -> None:
    path = sweep.dir.plans / "4.json"
    path.write_text("{")
    frozen = frozen_sweep(sweep.dir)
    assert len(frozen.runs) == len(sweep.dir.runs())
    assert any(str(path) in message for message in frozen.left_out)


def test_a_damaged_record_of_the_report_job_is_named(sweep: OldSweep) -> None:
    path = sweep.dir.report_record
    path.parent.mkdir(exist_ok=True)
    path.write_text("[]\n")
    assert rows(sweep.status().document, set()) == rows(said_then("status-empty-queue"), set())
    assert f"{path} is damaged" in sweep("status").out
