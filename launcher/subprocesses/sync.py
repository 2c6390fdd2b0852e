"""``sync``: upload journals to Weights & Biases from the login node. `train.mirror` does it in a process; this shows its progress."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launcher.installation import child_environment
from launcher.track.jobs import jobs_of, newest_job_per_run
from train.errors import BadInput, LorapackError
from train.store.layout import SweepDir

# Runs at once. W&B throttles clients that ask for more.
PARALLEL = 4
Answer = dict[str, Any]
# For a run about which the process said nothing.
UNSAID: Answer = {"rows": 0, "url": None, "outcome": "failed", "detail": "the upload ended before it reached this run"}


def sync(sweep: SweepDir, console: Console) -> list[Answer]:
    """Bring every run of the sweep up to date in W&B; an answer per run, in the order of the folders.

    Raises:
        BadInput: nothing was trained there yet, or there is no API key.
        LorapackError: the server cannot be used now.
    """
    jobs = newest_job_per_run(jobs_of(sweep))
    runs = [run.path.name for run in sweep.runs() if run.journal.exists() and run.path.name in jobs]
    if not runs:
        raise BadInput(f"{sweep.path} holds no journal yet; sync it once its runs have begun to train.")
    request = {"runs": [{"run": run, "pack": str(jobs[run].pack.pack)} for run in runs], "parallel": PARALLEL}
    with _uploader(request) as lines, _bar(console) as progress:
        task = progress.add_task("to W&B", total=len(runs))
        answers = {answer["run"]: answer for answer in _advancing(lines, progress, task) if "run" in answer}
    if not answers:
        raise LorapackError(
            f"{sweep.path.name}: the upload ended before it reached any run; its output above says why."
        )
    return [answers.get(run, {"run": run} | UNSAID) for run in runs]


def sync_json(sweep: SweepDir, answers: list[Answer]) -> Answer:
    """The answers as one JSON document."""
    return {"sweep": sweep.path.name, "runs": answers}


def print_answers(answers: list[Answer], console: Console) -> None:
    """How many runs were sent, and every run with a problem."""
    sent, current = [[a for a in answers if a["outcome"] == outcome] for outcome in ("sent", "current")]
    rows = sum(answer["rows"] for answer in answers)
    console.print(f"W&B: {len(sent)} of {len(answers)} runs sent ({rows:,} rows), {len(current)} were up to date")
    for answer in answers:
        if answer["detail"]:
            console.print(f"  {escape(answer['run'])} {answer['outcome']}: {escape(answer['detail'])}", soft_wrap=True)
    if sent:
        console.print(sent[0]["url"].rpartition("/runs/")[0], soft_wrap=True, highlight=False)


@contextmanager
def _uploader(request: dict[str, Any]) -> Iterator[Iterator[Answer]]:
    """The lines that the uploading process prints. It is killed if this process stops reading."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train.mirror", "sync"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            json.dump(request, stdin)
        yield (json.loads(line) for line in process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _advancing(lines: Iterator[Answer], progress: Progress, task: Any) -> Iterator[Answer]:
    """The same answers, advancing the bar after each. An error becomes an exception."""
    for line in lines:
        if "error" in line:
            raise (BadInput if line["exit_code"] == BadInput.exit_code else LorapackError)(line["error"])
        progress.advance(task, int("run" in line))
        yield line


def _bar(console: Console) -> Progress:
    """A bar in a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
