"""The verbs: each calls one stage and prints what it gives. Imports stand inside, so that a verb loads only what it needs."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.arguments import Request
from train.errors import BadInput
from train.log import log_to

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.records import Sweep


def train(request: Request) -> int:
    """No verb: compose, plan, train, report."""
    from launcher.compose.composer import compose

    return _train(compose(request.words), request)


def resume(request: Request) -> int:
    """Train what is unfinished in a sweep, failed runs too."""
    from launcher.submit.frozen import frozen_sweep
    from launcher.track.find import find_sweep

    names, root, _ = request.places()
    return _train(frozen_sweep(find_sweep(root, *names or [""])), request, retry_failed=True)


def plan(request: Request) -> int:
    """Show the plan, change nothing."""
    from launcher.compose.composer import compose
    from launcher.plan.planner import make_plan, plan_json
    from launcher.terminal.tables import print_plan

    made = make_plan(compose(request.words))
    if request.json:
        return _print_json(plan_json(made))
    print_plan(made, _console())
    return 0


def stage(request: Request) -> int:
    """Fill the cache."""
    from launcher.compose.composer import compose
    from launcher.submit.prepare import prepare

    sweep = compose(request.words)
    staged = prepare((run.config for run in sweep.runs), sweep.cache)
    if request.json:
        return _print_json({"cache": str(sweep.cache), "staged": staged})
    for item in staged:
        print(f"staged {item['model_dir']}: {item['train_rows']:,} rows to train on, {item['eval_rows']:,} held out")
    return 0


def status(request: Request) -> int:
    """Where every run of a sweep is."""
    from launcher.report.job import report_note
    from launcher.terminal.tables import print_statuses
    from launcher.track.find import find_sweep
    from launcher.track.jobs import damaged_files
    from launcher.track.tracker import status_json, track

    names, root, _ = request.places()
    sweep = find_sweep(root, *names or [""])
    statuses = track(sweep)
    shown = {status.reason for status in statuses}
    for message in damaged_files(sweep):
        if message not in shown:
            print(message, file=sys.stderr)
    if request.json:
        return _print_json(status_json(sweep, statuses))
    print_statuses(statuses, sweep.path.name, _console())
    note = report_note(sweep, statuses)
    if note is not None:
        print(note)
    return 0


def list_sweeps(request: Request) -> int:
    """The sweeps below the root."""
    from launcher.terminal.tables import print_sweeps
    from launcher.track.find import sweep_summary, sweeps

    _, root, _ = request.places(names=0)
    rows = [sweep_summary(sweep) for sweep in sweeps(root)]
    if request.json:
        return _print_json({"root": str(root), "sweeps": rows})
    print_sweeps(rows, str(root), _console())
    return 0


def logs(request: Request) -> int:
    """What the jobs of a run wrote."""
    from launcher.track.find import find_run
    from launcher.track.logs import logs_json, read_logs

    names, root, _ = request.places()
    if request.json and request.follow:
        raise BadInput("--json prints one document and --follow never ends; give only one of them.")
    run = find_run(root, *names or [""])
    if request.json:
        return _print_json(logs_json(run))
    for text in read_logs(run, follow=request.follow):
        print(text, end="", flush=True)
    return 0


def cancel(request: Request) -> int:
    """Stop runs in training."""
    from launcher.control.cancel import cancel_runs
    from launcher.terminal.tables import print_statuses
    from launcher.track.find import find_runs

    names, root, _ = request.places()
    statuses = cancel_runs(find_runs(root, *names or [""]))
    if request.json:
        return _print_json({"runs": [{"id": s.id, "name": s.name, "state": s.state} for s in statuses]})
    if not statuses:
        print("Nothing to cancel: no run there is training or waiting.")
        return 0
    print_statuses(statuses, "asked to stop", _console())
    slow = sorted({status.job for status in statuses if status.under_way and status.job is not None})
    if slow:
        print(
            f"Not stopped yet: {', '.join(slow)}. They save first; 'scancel' ends a job that hangs, at its last checkpoint."
        )
    return 0


def report(request: Request) -> int:
    """Compare the runs of a sweep."""
    from launcher.report.writer import print_report, report_json, write_report
    from launcher.track.find import find_sweep

    names, root, _ = request.places()
    sweep = find_sweep(root, *names or [""])
    written = write_report(sweep)
    if request.json:
        return _print_json(report_json(written))
    print_report(written, _console())
    print(f"report: {sweep.report}")
    return 0


def keys(request: Request) -> int:
    """Every key of the configuration, those of a section, or one."""
    from launcher.compose.key_reference import find_keys, key_facts, markdown, print_keys
    from launcher.compose.keys import all_keys
    from launcher.installation import conf_folders, shipped_conf

    if len(request.words) > 1:
        raise BadInput(f"{request.words[1]!r} is one word too many; 'keys' takes one section or key.")
    name = next(iter(request.words), "").partition("=")[0]
    found = find_keys(name, conf_folders()) if name else all_keys(conf_folders())
    if request.json:
        return _print_json({"keys": [key_facts(key) for key in found]})
    if name:
        print_keys(name, found, _console())
    else:
        print(markdown((shipped_conf(),)), end="")
    return 0


def doctor(request: Request) -> int:
    """Say what cluster and machine will do; ``write=NAME`` writes a file for the cluster."""
    from launcher.doctor.examine import examination_json, examine, print_examination
    from launcher.doctor.site import write_site
    from launcher.installation import user_conf

    site = next((word.removeprefix("write=") for word in request.words if word.startswith("write=")), None)
    rest = [word for word in request.words if not word.startswith("write=")]
    _, root, cache = replace(request, words=rest).places(names=0)
    found = examine(root, cache or Path(os.environ.get("LORAPACK_CACHE", "cache")).absolute())
    written = None if site is None else write_site(site, found.inventory, user_conf())
    if request.json:
        return _print_json(examination_json(found) | {"written": written and str(written)})
    print_examination(found, _console())
    if written is not None:
        print(f"written: {written}; in this folder, cluster={site} uses it")
    return 0


def sync(request: Request) -> int:
    """Send the journals of a sweep to W&B."""
    from launcher.subprocesses.sync import print_answers, sync_json
    from launcher.subprocesses.sync import sync as send
    from launcher.track.find import find_sweep

    names, root, _ = request.places()
    sweep = find_sweep(root, *names or [""])
    answers = send(sweep, _console(to_stderr=request.json))
    if request.json:
        _print_json(sync_json(sweep, answers))
    else:
        print_answers(answers, _console())
    return int(any(answer["outcome"] == "failed" for answer in answers))


def dashboard(request: Request) -> int:
    """Build the sweep's W&B workspace."""
    from launcher.subprocesses.foreground import make_dashboard
    from launcher.track.find import find_sweep

    names, root, _ = request.places()
    return make_dashboard(find_sweep(root, *names or [""]), json_output=request.json)


def merge(request: Request) -> int:
    """Merge a run's adapter into its base."""
    from launcher.subprocesses.foreground import export
    from launcher.track.find import find_run

    names, root, cache = request.places()
    run = find_run(root, *names or [""], finished=True)
    return export("merge", run, cache, json_output=request.json)


def chat(request: Request) -> int:
    """Answer a prompt, or talk until the end of input."""
    from launcher.subprocesses.foreground import export
    from launcher.track.find import find_run

    words, root, cache = request.places(names=2)
    # No run is called like that.
    if len(words) == 1 and not re.fullmatch(r"[\w./-]+", words[0]):
        words = ["", *words]
    run = find_run(root, *words[:1] or [""], finished=True)
    return export("chat", run, cache, *words[1:], json_output=request.json)


def _train(sweep: Sweep, request: Request, *, retry_failed: bool = False) -> int:
    """Train a sweep; with ``--json`` people read stderr, and stdout gets the comparison."""
    from launcher.control.pipeline import run_sweep
    from launcher.report.writer import build_report, report_json

    log_to(sys.stderr if request.json else sys.stdout, logging.WARNING)
    console = _console(to_stderr=request.json)
    code = run_sweep(sweep, console, retry_failed=retry_failed, wait=request.wait)
    if request.json:
        _print_json(report_json(build_report(sweep.dir)))
    return code


def _console(*, to_stderr: bool = False) -> Console:
    """Where people read; in pipes and logs lines are as long as they need."""
    from rich.console import Console

    file = sys.stderr if to_stderr else sys.stdout
    return Console(file=file, width=None if file.isatty() else 200)


def _print_json(document: dict[str, Any]) -> int:
    """One JSON document on stdout, nothing else; the exit code of a success."""
    print(json.dumps(document, indent=1, allow_nan=False, default=_plain))
    return 0


def _plain(value: object) -> str:
    """Paths are the only values that JSON does not know."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be written as JSON")
