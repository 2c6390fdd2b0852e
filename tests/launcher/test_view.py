import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from launcher.compose.composer import compose
from launcher.plan.planner import make_plan
from launcher.records import RunStatus, State
from launcher.terminal.progress import PlainProgress, TerminalProgress, open_progress, progress_table
from launcher.terminal.tables import MOST_ROWS, print_plan, print_statuses, print_sweeps
from stand_in import SMALL


def status(name: str = "r8", state: State = State.RUNNING, step: int = 12, run_id: str = "0123456789") -> RunStatus:
    return RunStatus(
        id=run_id,
        name=name,
        state=state,
        step=step,
        max_steps=60,
        loss=1.5,
        tokens_per_second=1234.5,
        seconds_left=125.0,
        attempts=2,
        cause="preempted",
        job="77",
        node="host",
    )


def console(*, terminal: bool = False, width: int = 160) -> Console:
    return Console(file=io.StringIO(), width=width, height=20, force_terminal=terminal, no_color=True)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_a_plan_shows_every_run_and_pack(tmp_path: Path) -> None:
    plan = make_plan(compose(["lora.r=4,8", f"root={tmp_path}", *SMALL]))
    shown = console()
    print_plan(plan, shown)
    for planned in plan.runs:
        assert planned.run.name in text_of(shown)
        assert planned.reason in text_of(shown)
    assert text_of(shown).count(plan.packs[0].id) == len(plan.runs) + 1
    assert "GPUs" not in text_of(shown)


def test_a_plan_for_slurm_says_which_gpus_a_job_asks_for(tmp_path: Path) -> None:
    described = ("gpu=a100", "gpus=8", "max_minutes=60")
    partition = [f"cluster.partitions.gpu.{setting}" for setting in described]
    plan = make_plan(compose(["lora.r=4,8", f"root={tmp_path}", *SMALL, "cluster=slurm", *partition]))
    shown = console()
    print_plan(plan, shown)
    (line,) = [line for line in text_of(shown).splitlines() if line.strip().startswith(plan.packs[0].id)]
    assert line.split()[1:4] == ["gpu", "gpu:a100:1", "2"]


def test_a_status_is_one_line_with_all_that_is_known() -> None:
    shown = console()
    print_statuses([status(), status("r16", State.DONE, 60)], "mine", shown)
    (line,) = [line for line in text_of(shown).splitlines() if line.strip().startswith("r8")]
    assert line.split() == [
        "r8",
        "running",
        "12/60",
        "1.5000",
        "1,234",
        "2",
        "min",
        "05",
        "s",
        "2",
        "preempted",
        "77",
        "host",
    ]
    assert "1 running, 1 done" in text_of(shown)


def test_runs_of_one_name_are_told_apart_and_markup_is_harmless() -> None:
    shown = console()
    twins = [status(run_id="0000000001"), status(run_id="0000000002"), status("[red]x[/nothing]")]
    print_statuses(twins, "[bold]t[/wrong]", shown)
    for text in ("r8-0000000001", "r8-0000000002", "[red]x[/nothing]", "[bold]t[/wrong]"):
        assert text in text_of(shown)


def test_long_tables_are_cut_and_say_so() -> None:
    shown = console()
    print_statuses([status(f"r{i}") for i in range(MOST_ROWS + 5)], "mine", shown)
    assert "and 5 more" in text_of(shown)


def test_sweeps_are_listed_below_a_root_that_can_be_copied() -> None:
    shown, root = console(), f"/home/ada/my thesis/{'sweeps ' * 12}runs"
    print_sweeps([{"name": "mine", "runs": 4, "done": 3, "submitted": 0.0, "bytes": 2_500_000}], root, shown)
    assert f"sweeps in {root}\n" in text_of(shown)
    assert "mine" in text_of(shown)
    assert "2.5 MB" in text_of(shown)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_bars_fit_the_terminal(width: int) -> None:
    shown = console(terminal=True, width=width)
    assert isinstance(open_progress(shown), TerminalProgress)
    shown.print(progress_table([status(), status("r16", State.PENDING, 0, "2"), status("r32", State.DONE, 60, "3")]))
    lines = Text.from_ansi(text_of(shown)).plain.splitlines()
    assert max(len(line) for line in lines) <= width
    assert all(part in lines[0] for part in ("r8", "12/60", "loss 1.5000", "running"))
    assert "r32" in lines[1]
    # A waiting run has no bar yet.
    assert lines[2] == "1 pending, 1 running, 1 done"


def test_what_a_job_does_besides_steps_stands_where_its_state_would() -> None:
    evaluating = replace(status(), doing="evaluating 12/64")
    for terminal in (True, False):
        shown = console(terminal=terminal)
        with open_progress(shown) as progress:
            progress.show([evaluating])
        assert "evaluating 12/64" in text_of(shown)
    assert text_of(shown) == "r8  evaluating 12/64  12/60  loss 1.5000\n"
    print_statuses([evaluating, status("r16")], "mine", shown)
    assert "running  evaluating 12/64  12/60" in text_of(shown)


def test_without_a_terminal_lines_come_now_and_then_and_once_at_the_end() -> None:
    shown = console()
    assert isinstance(open_progress(shown), PlainProgress)
    with PlainProgress(shown, line_seconds=3600) as progress:
        for step in (1, 2, 3):
            progress.show([status(step=step)])
        for _ in range(3):
            progress.show([status(state=State.DONE, step=60)])
    assert text_of(shown).splitlines() == [
        "r8  running  1/60  loss 1.5000  1,234 tokens/s  2 min 05 s left",
        "r8  done  60/60  loss 1.5000",
    ]


def test_a_line_printed_beside_the_bars_leaves_their_colors_alone() -> None:
    """Rich draws the bars again below the line, with the line's own options."""
    shown = console(terminal=True)
    with open_progress(shown) as progress:
        progress.show([status(name="r8-[x]"), status("r16", State.DONE)])
        shown.print("a job's word", style="dim", markup=False)
    assert "r8-[x]" in text_of(shown)
    assert "[/]" not in text_of(shown)
