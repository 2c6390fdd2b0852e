import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import launcher.submit.submission
from launcher.compose.composer import compose
from launcher.errors import ClusterError
from launcher.plan.planner import make_plan, plan_json
from launcher.records import Plan, Verdict
from launcher.submit.freeze import freeze_code
from launcher.submit.frozen import frozen_sweep
from launcher.submit.submission import sole_launcher, submit
from stand_in import SMALL, install, wait_for
from train.config import parse_run_config
from train.errors import BadInput, LeaseHeld
from train.store.layout import SweepDir
from train.store.lease import acquire
from train.store.storage import make_folder, read_json, write_json


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("code"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(compose(["lora.r=4,16", f"root={tmp_path}/runs", f"cache={tmp_path}/cache", *SMALL]))


def run_to_end(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit with the stand-in as the frozen code, and wait for the jobs."""
    monkeypatch.setattr(launcher.submit.submission, "freeze_code", lambda _sweep: code)
    queue = submit(plan)
    wait_for(lambda: queue.advance() is not None and not queue.busy)


def test_what_is_submitted_is_the_plan(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_end(plan, code, monkeypatch)
    sweep = plan.sweep.dir
    for planned in plan.runs:
        run = plan.sweep.run_dir(planned.run)
        assert parse_run_config(yaml.safe_load(run.config.read_text())) == planned.run.config
        assert run.result.exists()
    accepted = read_json(sweep.plans / "1.json")
    assert accepted.items() >= plan_json(plan).items()
    assert accepted["command"] == plan.sweep.command
    assert 0 <= time.time() - accepted["accepted"] < 600
    (pack,) = plan.packs
    facts = read_json(sweep.pack(pack.id).pack)
    assert facts["runs"] == [planned.run.folder for planned in plan.runs]
    assert (facts["sweep_dir"], facts["cache"]) == (str(sweep.path), str(plan.sweep.cache))
    for path in [plan.sweep.root, *sweep.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_runs_that_are_not_to_train_are_not_touched(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plan.runs
    left_alone = replace(second, verdict=Verdict.RUNNING, pack=None)
    only_first = replace(plan.packs[0], runs=(first.run.id,))
    run_to_end(replace(plan, runs=(first, left_alone), packs=(only_first,)), code, monkeypatch)
    assert plan.sweep.run_dir(first.run).result.exists()
    assert not plan.sweep.run_dir(second.run).path.exists()


def test_an_old_request_to_cancel_is_forgotten(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan.sweep.run_dir(plan.runs[0].run)
    make_folder(run.path)
    write_json(run.cancel_request, {"time": 0.0})
    run_to_end(plan, code, monkeypatch)
    assert run.result.exists()


def test_the_same_pack_is_submitted_once(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_end(plan, code, monkeypatch)
    with pytest.raises(ClusterError, match="another launcher"):
        submit(plan)


def test_a_sweep_can_be_rebuilt_from_its_folder(plan: Plan, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_end(plan, code, monkeypatch)
    rebuilt = frozen_sweep(plan.sweep.dir)
    assert rebuilt == plan.sweep
    with pytest.raises(BadInput, match="no accepted plan"):
        frozen_sweep(SweepDir(plan.sweep.root / "nothing"))


def test_a_disk_that_refuses_leaves_no_sweep(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(plan.sweep.root)
    full = Path("/dev/full")

    def freeze_to_full_disk(sweep: SweepDir) -> Path:
        from train.store.storage import append_lines

        append_lines(full, [{"no": "space"}])
        return sweep.path

    monkeypatch.setattr(launcher.submit.submission, "freeze_code", freeze_to_full_disk)
    with pytest.raises(BadInput, match="disk is full"), sole_launcher(plan.sweep.dir):
        submit(plan)
    assert list(plan.sweep.root.iterdir()) == []


def test_code_is_frozen_once_per_content(tmp_path: Path) -> None:
    source, sweep = tmp_path / "source", SweepDir(tmp_path / "sweep")
    for name in ("launcher", "train", "conf"):
        (source / name / "__pycache__").mkdir(parents=True)
        (source / name / "__pycache__" / "old.pyc").write_text("compiled")
        (source / name / "file.py").write_text(f"name = '{name}'")
    first = freeze_code(sweep, source)
    assert freeze_code(sweep, source) == first
    assert {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()} == {
        "launcher/file.py",
        "train/file.py",
        "conf/file.py",
    }
    (source / "train" / "file.py").write_text("name = 'changed'")
    second = freeze_code(sweep, source)
    assert second != first
    assert (first / "train" / "file.py").read_text() == "name = 'train'"


def test_a_sweep_has_one_launcher_and_a_dead_one_gives_way(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path / "runs" / "mine")
    with sole_launcher(sweep):
        with pytest.raises(LeaseHeld, match="Another launcher"), sole_launcher(sweep):
            pass
        assert sweep.lease.exists()
    # No plan was accepted.
    assert not sweep.path.exists()
    make_folder(sweep.path)
    acquire(sweep, job="launcher", attempt=0)
    write_json(sweep.lease, read_json(sweep.lease) | {"pid": 2**22 + 1})
    with sole_launcher(sweep):
        assert sweep.lease.exists()
    # It was there before.
    assert sweep.path.exists()
