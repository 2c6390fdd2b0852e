"""Plans from real run folders: verdicts, packs and the JSON contract."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

import architectures
from launcher.compose.composer import compose
from launcher.estimate.devices import local_partition
from launcher.estimate.forecaster import Forecaster
from launcher.estimate.workload import SizingInputs
from launcher.plan.packing import DeviceModel, pack_runs
from launcher.plan.planner import make_plan, plan_json
from launcher.records import Run, Sweep, Verdict
from launcher.terminal.tables import path_text
from train.config import ModelConfig
from train.errors import BadInput
from train.store.layout import CacheDir, RunDir
from train.store.lease import process_started
from train.store.storage import append_lines, make_folder, write_json, write_text


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def tiny_sweep(tmp_path: Path, *overrides: str) -> Sweep:
    return compose(["model=tiny", f"root={tmp_path}/runs", f"cache={tmp_path}/cache", *(overrides or ["sweep=rank"])])


def begin(sweep: Sweep, run: Run, name: str | None = None) -> RunDir:
    """The folder that a submission makes."""
    folder = sweep.run_dir(run if name is None else replace(run, name=name))
    make_folder(folder.path)
    write_text(folder.config, yaml.safe_dump(run.config.model_dump()))
    return folder


def end_attempt(folder: RunDir, cause: str, last_step: int, detail: str | None = None) -> None:
    line = {"attempt": 1, "cause": cause, "detail": detail, "first_step": None, "last_step": last_step, "seconds": 1.0}
    append_lines(folder.attempts, [line | {"started": 1.0, "ended": 2.0, "node": "n1", "device": "cpu", "job": "1"}])


def finish(folder: RunDir, **fields: object) -> None:
    result = {
        "steps": 60,
        "train_loss": 1.4,
        "tokens_per_second": 100.0,
        "eval_loss": 1.5,
        "seconds": 10.0,
        "gpu_hours": 0.0,
        "peak_memory_gib": 1.0,
        "attempts": 1,
        "device": "cpu",
    }
    write_json(folder.result, result | fields)


def save(folder: RunDir, step: int) -> None:
    make_folder(folder.checkpoint(step))


def verdicts(sweep: Sweep, *, retry_failed: bool = False) -> list[Verdict]:
    return [planned.verdict for planned in make_plan(sweep, retry_failed=retry_failed).runs]


def test_new_runs_that_share_a_base_are_one_pack(tmp_path: Path) -> None:
    plan = make_plan(tiny_sweep(tmp_path))
    assert {planned.verdict for planned in plan.runs} == {Verdict.NEW}
    assert len(plan.packs) == 1
    assert plan.packs[0].runs == tuple(planned.run.id for planned in plan.runs)
    assert {planned.pack for planned in plan.runs} == {plan.packs[0].id}
    assert plan.packs[0].forecast.seconds > 0 < plan.packs[0].forecast.vram_gib


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    assert make_plan(tiny_sweep(tmp_path)) == make_plan(tiny_sweep(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_verdict_comes_from_the_folder(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, "lora.r=1,2,3,4,5,6")
    done, running, resumable, failed, restarted, _new = sweep.runs
    finish(begin(sweep, done))
    write_lease(begin(sweep, running), os.getpid())
    folder = begin(sweep, resumable)
    save(folder, 20), save(folder, 40)
    end_attempt(folder, "preempted", 40)
    end_attempt(begin(sweep, failed), "diverged", 7, "loss is nan")
    end_attempt(begin(sweep, restarted), "storage", 0)
    plan = make_plan(sweep)
    found = {planned.run.axes["lora.r"]: (planned.verdict.value, planned.reason) for planned in plan.runs}
    assert [verdict for verdict, _ in found.values()] == ["done", "running", "resumable", "failed", "new", "new"]
    assert "60 steps" in found[1][1]
    assert "from step 40" in found[3][1]
    assert all(part in found[4][1] for part in ("diverged", "step 7", "loss is nan", "resume"))
    assert [len(pack.runs) for pack in plan.packs] == [3]


def write_lease(folder: RunDir, pid: int, host: str = "") -> None:
    lease = {"token": "t", "host": host or socket.gethostname(), "pid": pid, "pid_started": process_started(pid) or 0}
    write_json(folder.lease, lease | {"job": "1", "attempt": 1, "started": time.time()})


def test_a_killed_process_leaves_its_run_resumable(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    folder = begin(sweep, sweep.runs[0])
    process = subprocess.Popen(["sleep", "60"])
    write_lease(folder, process.pid)
    save(folder, 10)
    assert verdicts(sweep)[0] is Verdict.RUNNING
    process.kill()
    process.wait()
    assert verdicts(sweep)[0] is Verdict.RESUMABLE


@pytest.mark.parametrize("cause", ["diverged", "bad_input", "out_of_memory", "crash"])
def test_what_would_fail_again_waits_for_resume(tmp_path: Path, cause: str) -> None:
    sweep = tiny_sweep(tmp_path)
    folder = begin(sweep, sweep.runs[1])
    end_attempt(folder, cause, 12)
    assert verdicts(sweep)[1] is Verdict.FAILED
    assert verdicts(sweep, retry_failed=True)[1] is Verdict.NEW
    save(folder, 10)
    assert verdicts(sweep, retry_failed=True)[1] is Verdict.RESUMABLE


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([("node_fail", 30), ("timeout", 30)], Verdict.FAILED),
        ([("node_fail", 30), ("timeout", 45)], Verdict.RESUMABLE),
        ([("cancelled", 30), ("cancelled", 30)], Verdict.RESUMABLE),
        ([("crash", 30), ("preempted", 45)], Verdict.RESUMABLE),
    ],
)
def test_two_ends_at_one_step_hold_the_run(tmp_path: Path, ends: list[tuple[str, int]], verdict: Verdict) -> None:
    sweep = tiny_sweep(tmp_path)
    folder = begin(sweep, sweep.runs[0])
    save(folder, 30)
    for cause, step in ends:
        end_attempt(folder, cause, step)
    assert verdicts(sweep)[0] is verdict


def test_two_interrupts_by_the_user_hold_nothing(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    folder = begin(sweep, sweep.runs[0])
    end_attempt(folder, "preempted", 0, "SIGINT")
    end_attempt(folder, "preempted", 0, "SIGINT")
    assert verdicts(sweep)[0] is Verdict.NEW


def test_one_more_value_trains_only_that_value(tmp_path: Path) -> None:
    first = tiny_sweep(tmp_path)
    for run in first.runs:
        finish(begin(first, run))
    extended = tiny_sweep(tmp_path, "sweep=rank", "sweep.grid.lora.r=[4,8,16,32,64]")
    plan = make_plan(extended)
    assert [planned.verdict.value for planned in plan.runs] == ["done"] * 4 + ["new"]
    assert [pack.runs for pack in plan.packs] == [(extended.runs[-1].id,)]


def test_a_run_is_found_under_the_name_that_it_has(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    finish(begin(sweep, sweep.runs[0], name="another-name"))
    plan = make_plan(sweep)
    assert plan.runs[0].verdict is Verdict.DONE
    assert plan.runs[0].run.name == plan.sweep.runs[0].name == "another-name"


def test_a_later_plan_has_other_pack_ids(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    first = make_plan(sweep).packs[0].id
    make_folder(sweep.dir.plans)
    write_json(sweep.dir.plans / "1.json", {})
    assert make_plan(sweep).packs[0].id != first


@pytest.mark.parametrize(
    "axis",
    [
        "model=tiny,smollm2",
        "quant=nf4,none",
        "train.dtype=float32,bfloat16",
        "quant.bnb_4bit_use_double_quant=true,false",
    ],
)
def test_runs_over_different_bases_are_packed_apart(tmp_path: Path, axis: str) -> None:
    model = [] if axis.startswith("model") else ["model=tiny"]
    plan = make_plan(compose([axis, "lora.r=4,8", *model, f"root={tmp_path}/runs", f"cache={tmp_path}/cache"]))
    assert [len(pack.runs) for pack in plan.packs] == [2, 2]


def test_runs_may_differ_in_everything_else(tmp_path: Path) -> None:
    axes = ["lora.r=4,8", "train.batch_size=2,4", "data.max_length=64,128", "lora.target_modules=[q_proj],all-linear"]
    assert [len(pack.runs) for pack in make_plan(tiny_sweep(tmp_path, *axes)).packs] == [16]


def test_the_cluster_limits_a_pack(tmp_path: Path) -> None:
    plan = make_plan(tiny_sweep(tmp_path, "train.seed=range(0,10)", "cluster.max_runs_per_pack=4"))
    assert sorted(len(pack.runs) for pack in plan.packs) == [3, 3, 4]
    assert len({pack.id for pack in plan.packs}) == 3


def bench(fits: Callable[[list[Run]], bool]) -> DeviceModel:
    """One device that holds what `fits` says."""
    return DeviceModel(fits, seconds=lambda runs: 1.0, full_packs=lambda runs: 1, slots=1)


def test_packs_are_the_fewest_that_fit_and_of_similar_length(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, "train.max_steps=10,20,30,40,50,60,70,80")
    work = {run.id: float(run.config.train.max_steps or 0) for run in sweep.runs}
    packs = pack_runs(list(sweep.runs), 32, lambda run: work[run.id], bench(lambda runs: len(runs) <= 4))
    loads = [sum(work[run.id] for run in pack) for pack in packs]
    assert loads == [180, 180]


@pytest.mark.parametrize(
    ("slots", "cut"),
    [(2, [[60, 30, 20], [50, 40]]), (4, [[60], [50], [40], [30, 20]])],
)
def test_the_worked_example_of_packing_holds(tmp_path: Path, slots: int, cut: list[list[int]]) -> None:
    """The table in the docstring of `launcher.plan.packing`, with 10 steps for a million tokens."""
    sweep = tiny_sweep(tmp_path, "train.max_steps=60,50,40,30,20")
    steps = {run.id: run.config.train.max_steps or 0 for run in sweep.runs}

    def seconds(runs: list[Run]) -> float:
        return 60.0 + sum(steps[run.id] for run in runs)

    device = DeviceModel(lambda runs: len(runs) <= 3, seconds, full_packs=len, slots=slots)
    packs = pack_runs(list(sweep.runs), 32, lambda run: steps[run.id], device)
    assert [[steps[run.id] for run in pack] for pack in packs] == cut


def test_a_run_too_large_for_the_forecast_still_gets_its_pack(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    giant = sweep.runs[1]
    packs = pack_runs(list(sweep.runs), 32, lambda run: 1.0, bench(lambda runs: giant not in runs))
    assert [[run.axes["lora.r"] for run in pack] for pack in packs] == [[4, 16, 32], [8]]


def test_a_missing_target_is_refused_before_anything_is_queued(
    tmp_path: Path, tiny_model: tuple[ModelConfig, CacheDir, Path]
) -> None:
    cache = f"cache={tiny_model[1].path}"
    with pytest.raises(BadInput, match=r"c_attn.*q_proj"):
        make_plan(tiny_sweep(tmp_path, "lora.target_modules=[q_proj],[c_attn]", cache))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "'bert' is computed by no path as transformers computes it"),
        ({"model_type": "t5"}, "cannot be loaded by transformers"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_refused_by_its_configuration(
    tmp_path: Path, tiny_model: tuple[ModelConfig, CacheDir, Path], change: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(tiny_model[2], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=said):
        make_plan(tiny_sweep(tmp_path, f"model.source={folder}"))


def test_a_model_that_is_not_fetched_says_what_is_not_checked(tmp_path: Path) -> None:
    plan = make_plan(tiny_sweep(tmp_path, "lora.target_modules=[c_attn]"))
    assert "once the model is fetched" in plan.runs[0].reason
    assert plan.packs[0].path is None
    assert path_text(plan.packs[0]) == "checked once fetched"


def test_a_slower_path_is_named_with_its_price(tmp_path: Path) -> None:
    architectures.ARCHITECTURES["falcon-h1"].config().save_pretrained(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    pack = make_plan(tiny_sweep(tmp_path, f"model.source={tmp_path / 'model'}")).packs[0]
    assert pack.path == "padded"
    assert pack.slower > 1
    assert path_text(pack) == f"padded, {pack.slower:.1f} times the time"


def test_finished_packs_correct_the_forecast(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path)
    before = make_plan(sweep).packs[0].forecast
    runs = [begin(sweep, run) for run in sweep.runs]
    for folder in runs:
        finish(folder, peak_memory_gib=3 * before.vram_gib)
    pack = sweep.dir.pack("abc")
    make_folder(pack.path)
    write_json(pack.pack, {"id": "abc", "sweep_dir": "s", "cache": "c", "runs": [folder.path.name for folder in runs]})
    inputs = SizingInputs(CacheDir(sweep.cache))
    forecaster = Forecaster(sweep.dir, local_partition(1), inputs)
    after = forecaster.forecast(sweep.runs[0].config, [inputs.work(run.config) for run in sweep.runs])
    assert after.vram_gib == pytest.approx(3 * before.vram_gib, rel=1e-6)


def test_the_json_contract(tmp_path: Path) -> None:
    document = json.loads(json.dumps(plan_json(make_plan(tiny_sweep(tmp_path)))))
    assert document.keys() == {"sweep", "root", "runs", "packs"}
    assert document["sweep"] == "rank-tiny-tasks"
    assert document["runs"][0].keys() == {"id", "name", "verdict", "reason", "overrides", "pack"}
    assert document["runs"][0]["overrides"] == {"lora.r": 4}
    assert document["packs"][0].keys() == {"id", "partition", "path", "slower", "runs", "forecast"}
    assert document["packs"][0]["forecast"].keys() == {"vram_gib", "seconds", "gpu_hours", "usd"}


def test_a_thousand_runs_are_planned_in_three_seconds_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from launcher.compose.composer import compose; from launcher.plan.planner import make_plan; "
        "plan = make_plan(compose(sys.argv[1:])); "
        "print(len(plan.runs), len(plan.packs), *{'torch', 'transformers', 'datasets', 'wandb'} & sys.modules.keys())"
    )
    axes = ["lora.r=range(1,11)", "train.seed=range(0,10)", "lora.lora_alpha=range(1,11)"]
    before = os.times()
    found = subprocess.run(
        [sys.executable, "-c", script, *axes, f"root={tmp_path}", f"cache={tmp_path}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    assert busy < 3, "seconds of a core; a clock on the wall would measure what else the machine does"
    runs, packs, *heavy = found.stdout.split()
    assert (int(runs), heavy) == (1000, [])
    assert int(packs) >= 1000 / 32
