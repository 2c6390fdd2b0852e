import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launcher.report.axes import axis_charts, flat, swept_axes
from launcher.report.curves import MAX_POINTS, read_curve, thin
from launcher.report.noise import T_95, more_seeds_command, t_95
from launcher.report.table import GPU_ONLY, MEASURES
from launcher.report.writer import build_report, print_report, report_json, write_report
from synthetic_sweeps import BASE_EVAL_LOSS, PACK, SyntheticSweep, configured
from train.store.storage import append_lines, write_json

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def sweep(tmp_path: Path) -> SyntheticSweep:
    return SyntheticSweep(tmp_path / "rank-smollm2-tasks")


def axes_of(*points: dict[str, object]) -> dict[str, tuple[object, ...]]:
    axes = swept_axes([flat(configured(point).model_dump()) for point in points])
    return {axis.key: axis.values for axis in axes}


def ended(run, cause: str, detail: str) -> None:
    line = {"attempt": 1, "cause": cause, "detail": detail, "first_step": 0, "last_step": 30, "seconds": 9.0}
    append_lines(run.attempts, [line | {"started": 1.0, "ended": 10.0, "node": "host", "device": "cpu", "job": "1"}])


# ---- axes


def test_axes_are_what_differs_in_order_with_seeds_last():
    points = [{"train.seed": seed, "lora.r": r} for seed in (1, 0) for r in (16, 4)]
    assert axes_of(*points) == {"lora.r": (4, 16), "train.seed": (0, 1)}
    assert list(axes_of(*points)) == ["lora.r", "train.seed"]


def test_what_changes_no_result_is_no_axis():
    assert axes_of({"train.save_steps": 10}, {"train.save_steps": 20, "model.fingerprint": "other"}) == {}


def test_a_swept_model_is_told_by_its_name_alone():
    other = {"model.name": "tiny", "model.source": "builtin:tiny", "model.fingerprint": "f9"}
    assert axes_of({}, other) == {"model.name": ("smollm2", "tiny")}


def test_list_values_are_joined_and_numbers_spaced_by_their_logarithm():
    modules = swept_axes(
        [
            flat(configured({"lora.target_modules": value}).model_dump())
            for value in (["q_proj", "v_proj"], "all-linear")
        ]
    )
    assert modules[0].labels == ("q_proj+v_proj", "all-linear")
    assert modules[0].scale == "category"
    ranks = swept_axes([flat(configured({"lora.r": r}).model_dump()) for r in (4, 8, 32)])
    assert ranks[0].scale == "log2"
    assert ranks[0].positions == pytest.approx((0, 1 / 3, 1))
    rates = swept_axes([flat(configured({"train.learning_rate": rate}).model_dump()) for rate in (1e-4, 1e-3)])
    assert (rates[0].scale, rates[0].labels) == ("log10", ("0.0001", "0.001"))


def test_an_extended_sweep_has_the_axes_of_all_its_runs(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8]})
    assert [axis.key for axis in build_report(sweep.dir).axes] == ["lora.r"]
    sweep.add({"lora.r": 8, "lora.use_rslora": True})
    assert [axis.key for axis in build_report(sweep.dir).axes] == ["lora.r", "lora.use_rslora"]


# ---- ranking


def test_finished_runs_are_ranked_by_eval_loss_with_their_measures(sweep: SyntheticSweep):
    for r, loss in ((4, 0.9), (8, 0.7), (16, 0.8)):
        sweep.add({"lora.r": r}, eval_loss=loss)
    sweep.accept("python -m launcher sweep=rank")
    report = build_report(sweep.dir)
    assert [(row.rank, row.axes["lora.r"], row.eval_loss) for row in report.rows] == [
        (1, 8, 0.7),
        (2, 16, 0.8),
        (3, 4, 0.9),
    ]
    best = report_json(report)["rows"][0]
    assert best["id"] == report_json(report)["best"] == report.rows[0].id
    assert best["base_eval_loss"] == BASE_EVAL_LOSS
    assert (best["peak_memory_gib"], best["seconds"], best["gpu_hours"], best["pack"]) == (1.87, 171.0, 0.0, PACK)
    assert best["trainable_parameters"] == 14400 * 8 * 2
    assert best["eval_rows"] == 64
    assert best.pop("cost_usd") is None, "nobody named a price"
    assert None not in best.values()


def test_what_a_run_cost_is_its_gpu_hours_at_the_price_of_its_partition(sweep: SyntheticSweep):
    run = sweep.add({"lora.r": 8})
    write_json(run.result, json.loads(run.result.read_bytes()) | {"gpu_hours": 0.5})
    sweep.accept("python -m launcher sweep=rank", gpu_hours=2.0, usd=3.0)
    report = build_report(sweep.dir)
    assert report.rows[0].cost_usd == 0.75
    console = Console(file=io.StringIO(), width=120)
    print_report(report, console)
    assert console.file.getvalue().splitlines()[1].split()[-5:-3] == ["GPU-hours", "USD"]


def test_runs_without_a_result_are_listed_and_never_ranked(sweep: SyntheticSweep):
    sweep.add({"lora.r": 8}, eval_loss=0.8)
    ended(sweep.add({"lora.r": 16}, finished=False, eval_loss=0.1), "diverged", "loss is nan")
    ended(sweep.add({"lora.r": 32}, finished=False, eval_loss=0.2), "preempted", "SIGTERM")
    report = build_report(sweep.dir)
    assert [row.axes["lora.r"] for row in report.rows] == [8]
    states = {run.axes["lora.r"]: (run.state, run.reason) for run in report.unfinished}
    assert {run.step for run in report.unfinished} == {30}
    assert states[16][0] == "failed"
    assert "diverged at step 30: loss is nan" in states[16][1]
    assert states[32][0] == "stopped"
    assert "preempted" in states[32][1]
    assert [curve.run for curve in report.curves] == [run.id for run in report.runs]


def test_a_run_that_measured_no_eval_loss_comes_last(sweep: SyntheticSweep):
    without = sweep.add({"lora.r": 4})
    write_json(without.result, json.loads(without.result.read_bytes()) | {"eval_loss": None})
    sweep.add({"lora.r": 8}, eval_loss=5.0)
    report = build_report(sweep.dir)
    assert [row.axes["lora.r"] for row in report.rows] == [8, 4]
    assert len(report.groups) == 1
    write_report(sweep.dir)


def test_a_sweep_with_nothing_yet_still_has_a_report(sweep: SyntheticSweep):
    sweep.add({}, finished=False)
    report = write_report(sweep.dir)
    assert report.best is None
    assert report.noise.verdict == "unknown"
    assert sweep.dir.report.exists()


# ---- what limits a ranking is said beside it


def test_runs_without_a_result_are_counted_where_the_ranking_is_read(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8]})
    assert build_report(sweep.dir).caveats == ()
    ended(sweep.add({"lora.r": 16}, finished=False), "diverged", "loss is nan")
    sweep.add({"lora.r": 32}, finished=False)
    report = build_report(sweep.dir)
    assert report.caveats == ("2 of 4 runs have no result and are not compared: 1 failed, 1 stopped.",)
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    assert report.caveats[0] in console.file.getvalue()


def test_losses_over_different_tokens_are_said_not_to_compare(sweep: SyntheticSweep):
    sweep.grid({"data.max_length": [256, 512], "data.train_rows": [100, 200]})
    (caveat,) = build_report(sweep.dir).caveats
    assert "only between runs of the same data.max_length:" in caveat


# ---- noise between seeds


def three_seeds(sweep: SyntheticSweep, r: int, losses: tuple[float, ...]) -> None:
    for seed, loss in enumerate(losses):
        sweep.add({"lora.r": r, "train.seed": seed}, eval_loss=loss)


def test_welchs_interval_on_known_numbers(sweep: SyntheticSweep):
    # means 1.00 and 1.10; deviations 0.01 and 0.02; by hand: error sqrt((1e-4 + 4e-4) / 3) = 0.01291,
    # degrees of freedom (5e-4)^2 / ((1e-4)^2 / 2 + (4e-4)^2 / 2) = 2.94, taken as 2: t = 4.303, half width 0.05555
    three_seeds(sweep, 8, (0.99, 1.00, 1.01))
    three_seeds(sweep, 4, (1.08, 1.10, 1.12))
    noise = build_report(sweep.dir).noise
    assert noise.verdict == "larger"
    assert (noise.lead, noise.low, noise.high) == pytest.approx((0.1, 0.04445, 0.15555), abs=1e-5)
    assert "larger than the noise" in noise.text
    assert noise.command is None


def test_a_lead_within_the_noise_is_said_to_be(sweep: SyntheticSweep):
    three_seeds(sweep, 8, (0.9, 1.0, 1.1))
    three_seeds(sweep, 4, (0.95, 1.05, 1.15))
    noise = build_report(sweep.dir).noise
    assert noise.verdict == "within"
    assert noise.low < 0 < noise.high
    assert "not larger than the noise" in noise.text
    assert "train.seed=0,1,2,3,4,5" in noise.command


def test_the_best_mean_wins_over_the_luckiest_run(sweep: SyntheticSweep):
    three_seeds(sweep, 8, (0.80, 0.81, 0.82))
    three_seeds(sweep, 4, (0.70, 1.20, 1.30))
    report = build_report(sweep.dir)
    assert report.rows[0].axes["lora.r"] == 4
    assert report.groups[0].label == "r=8"
    assert report.groups[0].mean == pytest.approx(0.81)
    assert report.groups[0].half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))


def test_one_seed_cannot_tell_and_the_command_that_can_is_named(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8]}).accept("python -m launcher sweep=rank train.seed=7")
    noise = build_report(sweep.dir).noise
    assert noise.verdict == "unknown"
    assert "one seed" in noise.text
    assert noise.command == "python -m launcher sweep=rank train.seed=0,1,2 sweep.name=rank-smollm2-tasks"


def test_one_seed_of_the_runner_up_cannot_tell_either(sweep: SyntheticSweep):
    three_seeds(sweep, 8, (0.99, 1.00, 1.01))
    sweep.add({"lora.r": 4, "train.seed": 0}, eval_loss=1.1)
    noise = build_report(sweep.dir).noise
    assert noise.verdict == "unknown"
    assert "With one seed of r=4 nobody can tell" in noise.text


def test_more_seeds_are_asked_of_the_newest_command_that_composes():
    commands = [
        "python -m launcher 'lora.target_modules=[q_proj, v_proj]' sweep.name=old",
        "python -m launcher resume new",
    ]
    command = more_seeds_command("new", commands, [3])
    assert command == "python -m launcher 'lora.target_modules=[q_proj, v_proj]' train.seed=3,4,5 sweep.name=new"


def test_seeds_alone_give_their_spread(sweep: SyntheticSweep):
    for seed, loss in enumerate((0.8, 0.9, 1.0)):
        sweep.add({"train.seed": seed}, eval_loss=loss)
    report = build_report(sweep.dir)
    assert "0.9000 (s.d. 0.1000)" in report.noise.text
    assert [chart.axis.key for chart in axis_charts(report)] == ["train.seed"]


def test_students_quantile_falls_and_is_never_too_narrow():
    assert list(T_95) == sorted(T_95, reverse=True)
    assert len(T_95) == 30
    assert t_95(0.7) == 12.706
    assert t_95(2.94) == 4.303
    assert t_95(1000) == pytest.approx(1.96)


# ---- curves


def test_thinning_keeps_the_mean_and_says_how_many_steps_a_point_is():
    series = [(step, float(step % 7)) for step in range(1, 1001)]
    steps, values, size = thin(series)
    assert len(steps) <= MAX_POINTS
    assert size == 3
    assert steps[0] == 2
    assert values[0] == pytest.approx((1 + 2 + 3) / 3)
    assert thin(series[:MAX_POINTS]) == (tuple(range(1, 401)), tuple(value for _, value in series[:400]), 1)
    assert thin([]) == ((), (), 1)


def test_a_torn_last_line_of_a_journal_counts_as_nothing(sweep: SyntheticSweep):
    run = sweep.add({}, finished=False)
    whole = read_curve(run)
    with run.journal.open("ab") as journal:
        journal.write(b'{"step":31,"los')
    assert read_curve(run) == whole


def test_a_large_sweep_is_compared_within_seconds(tmp_path: Path):
    sweep = SyntheticSweep(tmp_path / "large", steps=1000).grid(
        {"lora.r": [4, 8, 16, 32, 64], "train.seed": list(range(10))}
    )
    started = time.perf_counter()
    report = build_report(sweep.dir)
    # 0.2 s on one core.
    assert time.perf_counter() - started < 2
    assert all(len(curve.losses) <= MAX_POINTS for curve in report.curves)


# ---- what is written and printed


def test_the_report_and_its_plots_are_written_and_repeat_byte_by_byte(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8], "lora.target_modules": [["q_proj"], "all-linear"]}).accept(
        "python -m launcher sweep=x"
    )
    write_report(sweep.dir)
    files = {file.name: file.read_bytes() for file in sweep.dir.plots.iterdir()}
    page = sweep.dir.report.read_bytes()
    assert files.keys() == {"loss_curves.png", "eval_loss_lora_r.png", "eval_loss_lora_target_modules.png"}
    assert all(image.startswith(PNG_SIGNATURE) for image in files.values())
    write_report(sweep.dir)
    assert {file.name: file.read_bytes() for file in sweep.dir.plots.iterdir()} == files
    assert sweep.dir.report.read_bytes() == page


def test_the_terminal_shows_the_best_run_the_rest_and_the_verdict(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8]}).accept("python -m launcher sweep=rank")
    ended(sweep.add({"lora.r": 16}, finished=False), "crash", "RuntimeError")
    console = Console(file=io.StringIO(), width=100)
    print_report(build_report(sweep.dir), console)
    lines = console.file.getvalue().splitlines()
    assert "★  r8" in next(line for line in lines if "★" in line)
    assert any("failed" in line and "r16" in line for line in lines)
    assert any(line.startswith("Best run: r8 (r=8): eval loss 2.9300 -> ") for line in lines)
    assert "  python -m launcher sweep=rank train.seed=0,1,2 sweep.name=rank-smollm2-tasks" in lines


def test_a_narrow_terminal_shows_losses_whole_and_says_what_it_leaves_out(sweep: SyntheticSweep):
    sweep.grid({"lora.r": [4, 8], "lora.target_modules": [["q_proj", "v_proj"], "all-linear"], "train.seed": [0, 1]})
    console = Console(file=io.StringIO(), width=80)
    report = build_report(sweep.dir)
    print_report(report, console)
    text = console.file.getvalue()
    for row in report.rows:
        assert f"{row.eval_loss:.4f}" in text
    left_out = [m for m in MEASURES if m.key not in GPU_ONLY and m.title not in text.splitlines()[1]]
    assert f"columns that do not fit here: {len(left_out)} (" in text
    assert len(left_out) > 0


def test_markup_in_names_and_commands_is_printed_as_it_is(sweep: SyntheticSweep):
    sweep.add({"data.name": "[red]x[/]", "data.fingerprint": "f8"}, name="[bold]run")
    sweep.add({"data.name": "plain"})
    sweep.accept("python -m launcher 'lora.target_modules=[q_proj]'")
    console = Console(file=io.StringIO(), width=200)
    print_report(build_report(sweep.dir), console)
    text = console.file.getvalue()
    assert "[bold]run" in text
    assert "[red]x[/]" in text
    assert "'lora.target_modules=[q_proj]'" in text


def test_importing_the_report_loads_no_plotting_and_no_training_library():
    heavy = ("matplotlib", "torch", "transformers", "datasets", "wandb", "numpy")
    code = f"import sys, launcher.report.writer; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["journal.jsonl", "samples.jsonl", "config.yaml", "result.json"])
def test_a_damaged_file_is_named(sweep: SyntheticSweep, name: str) -> None:
    """Zeros at the start are what a power cut can leave."""
    sweep.grid({"lora.r": [4, 8]})
    file = sweep.dir.runs()[0].path / name
    file.write_bytes(b"\0" * 8 + b"\n" + file.read_bytes())
    report = build_report(sweep.dir)
    said = [*report.caveats, *(run.reason for run in report.unfinished)]
    assert any(f"{file} is damaged" in sentence for sentence in said)
    assert sweep.dir.runs()[1].id in {row.id for row in report.rows}, "the other run is compared all the same"
