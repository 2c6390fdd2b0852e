"""compose -> plan -> submit -> train -> track -> report, for one sweep on this machine."""

from __future__ import annotations

from rich.console import Console

from launcher.cluster.choice import explain_choice
from launcher.follow import follow
from launcher.plan.planner import make_plan
from launcher.records import Plan, State, Sweep, Verdict
from launcher.report.writer import print_report, write_report
from launcher.stopping import Interrupts
from launcher.submit.prepare import prepare, unprepared
from launcher.submit.sole import sole_launcher
from launcher.submit.submission import submit
from launcher.track.tracker import track
from launcher.view import print_plan, print_statuses
from train.rundir import SweepDir

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def run_sweep(sweep: Sweep, console: Console, *, retry_failed: bool = False) -> int:
    """Plan the sweep, train what is to be trained, compare all of it; the exit code of the program.

    Raises:
        BadInput: something cannot be trained; nothing was written below the root.
        LeaseHeld: another launcher is at work on the sweep.
    """
    plan = ready_plan(sweep, retry_failed=retry_failed)
    console.print(explain_choice(sweep.cluster))
    print_plan(plan, console)
    if not plan.packs:
        return _nothing_to_train(plan, console)
    interrupts = Interrupts()
    with sole_launcher(sweep.dir), interrupts.counted():
        follow(submit(plan), sweep.dir, console, interrupts)
    if interrupts.count:
        return _stopped(sweep, console)
    compare(sweep.dir, console)
    return _exit_code(sweep.dir, plan)


def ready_plan(sweep: Sweep, *, retry_failed: bool = False) -> Plan:
    """A plan of which everything could be checked: models and data of what will train lie in the cache."""
    plan = make_plan(sweep, retry_failed=retry_failed)
    missing = unprepared((planned.run.config for planned in plan.runs if planned.pack is not None), sweep.cache)
    if not missing:
        return plan
    prepare(missing, sweep.cache)
    return make_plan(sweep, retry_failed=retry_failed)


def compare(sweep: SweepDir, console: Console) -> None:
    """Write the report and print its table; without a finished run print where the runs are."""
    statuses = track(sweep)
    if all(status.state is not State.DONE for status in statuses):
        print_statuses(statuses, sweep.path.name, console)
        return
    print_report(write_report(sweep), console)
    console.print(f"report: {sweep.report}", soft_wrap=True, highlight=False)


def _nothing_to_train(plan: Plan, console: Console) -> int:
    """Say why, and show what there is."""
    verdicts = {planned.verdict for planned in plan.runs}
    name = plan.sweep.name
    if Verdict.RUNNING in verdicts:
        console.print(f"Nothing to start: runs are in training; watch them with 'python -m launcher status {name}'.")
    elif Verdict.FAILED in verdicts:
        console.print(f"Nothing to train: the rest failed; try again with 'python -m launcher resume {name}'.")
    else:
        console.print("Every run of this sweep is done; nothing to train.")
    compare(plan.sweep.dir, console)
    return int(Verdict.FAILED in verdicts)


def _stopped(sweep: Sweep, console: Console) -> int:
    print_statuses(track(sweep.dir), sweep.name, console)
    console.print("Stopped. The same command goes on from the last checkpoint:")
    console.print(f"  {sweep.command}", markup=False, highlight=False, soft_wrap=True)
    return INTERRUPTED


def _exit_code(sweep: SweepDir, plan: Plan) -> int:
    """0 if all that was asked for is done or runs elsewhere, else 1."""
    asked = {planned.run.id for planned in plan.runs}
    states = {status.state for status in track(sweep) if status.id in asked}
    return int(not states <= {State.DONE, State.RUNNING})
