"""compose -> plan -> submit -> train -> track -> report, for one sweep: on this machine to its end, or into Slurm's queue."""

from __future__ import annotations

from contextlib import suppress

from rich.console import Console

from launcher.cluster.partitions import explain_choice, on_slurm
from launcher.cluster.slurm import Submitted, array_number
from launcher.control.follow import follow, watch
from launcher.plan.planner import make_plan
from launcher.plan_files import plan_numbers
from launcher.records import Plan, State, Sweep, Verdict, verb_command
from launcher.report.job import submit_missing_report, submit_report
from launcher.report.writer import print_report, write_report
from launcher.submit.prepare import prepare, unprepared
from launcher.submit.submission import sole_launcher, submit, submit_to_slurm
from launcher.terminal.interrupts import Interrupts
from launcher.terminal.tables import print_plan, print_statuses
from launcher.track.tracker import track
from train.errors import DamagedFile, LeaseHeld
from train.mirror.reach import refuse_missing_key
from train.store.layout import SweepDir
from train.store.permissions import refuse_unwritable

# What a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130


def run_sweep(sweep: Sweep, console: Console, *, retry_failed: bool = False, wait: bool = False) -> int:
    """Plan the sweep, train what is left to train, and compare all of it; the exit code of the program.

    On Slurm this returns once the jobs are in the queue; with `wait`, once they have ended.

    Raises:
        BadInput: something cannot be trained; nothing was written below the root.
        LeaseHeld: another launcher works on the sweep.
        ClusterError: Slurm refused.
    """
    refuse_missing_key(sweep.tracking.mode, sweep.tracking.key_file)
    slurm = on_slurm(sweep.cluster)
    # Read before planning, so that a plan that another launcher accepts meanwhile is noticed.
    plans = plan_numbers(sweep.dir)
    plan = ready_plan(sweep, retry_failed=retry_failed)
    for message in sweep.left_out:
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(explain_choice(sweep.cluster, slurm=slurm))
    print_plan(plan, console)
    if slurm and not plan.packs and _in_training(plan):
        _complete_submission(plan)
    if not plan.packs and not (slurm and wait and _in_training(plan)):
        return _nothing_to_train(plan, console)
    interrupts = Interrupts()
    if slurm:
        if plan.packs:
            _submit_once(plan, plans, console, retry_failed=retry_failed)
        if not wait:
            return 0
        with interrupts.counted():
            watch(sweep.dir, console, interrupts)
    else:
        with sole_launcher(sweep.dir), interrupts.counted():
            follow(submit(plan), sweep.dir, console, interrupts)
    if interrupts.count:
        return _interrupted(sweep, console, slurm=slurm)
    compare(sweep.dir, console)
    return _exit_code(sweep.dir, plan)


def _submit_once(plan: Plan, plans: list[int], console: Console, *, retry_failed: bool) -> None:
    """Put the plan's jobs into the queue, except runs that another launcher has submitted since the plan was made."""
    with sole_launcher(plan.sweep.dir):
        # Once there is an accepted plan, its launcher may have submitted jobs after this plan was made, so plan again.
        if plans or plan_numbers(plan.sweep.dir):
            plan = make_plan(plan.sweep, retry_failed=retry_failed)
        if not plan.packs:
            console.print("Another launcher has submitted these runs in the meantime; nothing to submit.")
            return
        submitted = submit_to_slurm(plan)
        submit_report(plan, submitted)
    _say_submitted(plan, submitted, console)


def _complete_submission(plan: Plan) -> None:
    """Submit the report job if an earlier launcher could not. If that launcher still works on it, it is left to it."""
    with suppress(LeaseHeld, DamagedFile), sole_launcher(plan.sweep.dir):
        submit_missing_report(plan.sweep)


def _say_submitted(plan: Plan, submitted: Submitted, console: Console) -> None:
    arrays = dict.fromkeys(map(array_number, submitted.jobs.values()))
    jobs = len(submitted.jobs)
    if jobs:
        console.print(
            f"{jobs} job{'s' if jobs > 1 else ''} in the queue ({', '.join(arrays)}); "
            f"to watch: {verb_command('status', plan.sweep.dir)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if submitted.left:
        console.print(
            f"{len(submitted.left)} more do not fit into the queue now (Slurm says: {submitted.why}); "
            "the same command submits them later.",
            highlight=False,
            markup=False,
        )


def _in_training(plan: Plan) -> bool:
    return any(planned.verdict is Verdict.RUNNING for planned in plan.runs)


def ready_plan(sweep: Sweep, *, retry_failed: bool = False) -> Plan:
    """A plan that is fully checked: models and data of all runs that will train are in the cache."""
    plan = make_plan(sweep, retry_failed=retry_failed)
    missing = unprepared((planned.run.config for planned in plan.runs if planned.pack is not None), sweep.cache)
    if not missing:
        return plan
    refuse_unwritable(sweep.dir.path)
    prepare(missing, sweep.cache)
    return make_plan(sweep, retry_failed=retry_failed)


def compare(sweep: SweepDir, console: Console) -> None:
    """Write the report and print its table; without a finished run, print the state of each run."""
    statuses = track(sweep)
    if all(status.state is not State.DONE for status in statuses):
        print_statuses(statuses, sweep.path.name, console)
        return
    print_report(write_report(sweep), console)
    console.print(f"report: {sweep.report}", soft_wrap=True, highlight=False)


def _nothing_to_train(plan: Plan, console: Console) -> int:
    """Say why, and show the results so far; the exit code."""
    verdicts = {planned.verdict for planned in plan.runs}
    if Verdict.RUNNING in verdicts:
        _say_command("Nothing to start: runs are training. To watch", "status", plan.sweep, console)
    elif Verdict.UNKNOWN in verdicts:
        console.print("Nothing to train: files of the rest are damaged; the plan above names them.")
    elif Verdict.FAILED in verdicts:
        _say_command("Nothing to train: the rest failed. To try again", "resume", plan.sweep, console)
    else:
        console.print("Every run of this sweep is done; nothing to train.")
    compare(plan.sweep.dir, console)
    return int(bool(plan.sweep.left_out or verdicts & {Verdict.FAILED, Verdict.UNKNOWN}))


def _say_command(text: str, verb: str, sweep: Sweep, console: Console) -> None:
    """A sentence with a command to copy at its end, in one line: a broken line could not be copied."""
    console.print(f"{text}: {verb_command(verb, sweep.dir)}", markup=False, highlight=False, soft_wrap=True)


def _interrupted(sweep: Sweep, console: Console, *, slurm: bool) -> int:
    """Say what happens to the jobs after Ctrl-C; the exit code."""
    if slurm:
        _say_command("The jobs continue, and cancel stops them. To watch", "status", sweep, console)
        return INTERRUPTED
    print_statuses(track(sweep.dir), sweep.name, console)
    console.print("Stopped. The same command continues from the last checkpoint:")
    console.print(f"  {sweep.command}", markup=False, highlight=False, soft_wrap=True)
    return INTERRUPTED


def _exit_code(sweep: SweepDir, plan: Plan) -> int:
    """0 if everything asked for is done or runs elsewhere, else 1. A run whose folder was deleted counts as not done."""
    fine = {status.id for status in track(sweep) if status.state in {State.DONE, State.RUNNING}}
    return int(any(planned.run.id not in fine for planned in plan.runs))
