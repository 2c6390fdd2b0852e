"""Measures lorapack and its peers on the same GPU, in the same minutes, over the same rows; one command per table.

    PYTHONPATH=.:tests python -m bench.speed --table plain --json plain.json

Every program is a process of its own. lorapack is measured before and after its peers, so that a GPU that slowed down in between
would show. `--quick` tries the harness on a tiny model; a CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.measuring import LINEARS, Measured, Setting
from bench.shapes import SHAPES, Shape, model_folder
from bench.tables import ratios, speed_table, together, where_packing_stops

HERE = Path(__file__).resolve().parent
WORKER_SECONDS = 300.0
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth")
NAME, AS_T4, TWIN = "lorapack", "lorapack as on a T4", "a plain Llama of these sizes"
MODULES = {NAME: "bench.start", TWIN: "bench.start", "plain script": "bench.plain", "Unsloth": "bench.unsloth_peer"}
HEADLINE = Setting(runs=8, batch=4)


@dataclass(frozen=True)
class Job:
    """One start of a worker, or of `processes` of them at once."""

    who: str
    settings: tuple[Setting, ...]
    processes: int = 1
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """What a table compares: settings of lorapack, and its peers' jobs."""

    title: str
    ours: tuple[Setting, ...]
    peers: tuple[Job, ...] = ()
    t4: tuple[Setting, ...] = ()
    needs: str | None = None


def _plain(*settings: Setting, processes: int = 1) -> Job:
    return Job("plain script", settings, processes)


def _unsloth(*settings: Setting) -> Job:
    return Job("Unsloth", settings)


RECOMPUTED = Setting(checkpointing=True)
TABLES = {
    "plain": Table("the plain script, a process per run", (HEADLINE,), (_plain(Setting()), _plain(RECOMPUTED))),
    "tuned": Table(
        "the plain script with larger batches, no checkpointing",
        (HEADLINE, Setting(runs=8, batch=16)),
        (_plain(Setting(batch=16), Setting(batch=0)),),
    ),
    "at_once": Table(
        "plain processes at once", (HEADLINE,), (_plain(*(Setting(processes=n) for n in (2, 4, 8)), processes=8),)
    ),
    "unsloth": Table(
        "Unsloth",
        (Setting(), Setting(batch=16), HEADLINE),
        (
            _unsloth(Setting(), Setting(batch=16)),
            _unsloth(RECOMPUTED, replace(RECOMPUTED, batch=16)),
        ),
        needs="unsloth",
    ),
    "base": Table(
        "lorapack beside a plain Llama of the same linears and head, and Unsloth",
        (HEADLINE, Setting()),
        (Job(TWIN, (HEADLINE,)), _unsloth(Setting())),
    ),
    "packs": Table("lorapack", (Setting(), HEADLINE)),
    "twin": Table("lorapack beside a plain Llama of the same linears and head", (HEADLINE,), (Job(TWIN, (HEADLINE,)),)),
    "t4": Table("as on a T4", (), t4=(Setting(runs=8, checkpointing=True),)),
    "ours": Table(
        "lorapack",
        (
            *(Setting(runs=runs) for runs in (1, 2, 4, 8, 16)),
            Setting(batch=16),
            Setting(runs=8, batch=16),
            Setting(runs=8, targets=LINEARS),
        ),
        t4=(
            Setting(runs=8, checkpointing=True),
            Setting(runs=1, checkpointing=True),
            Setting(runs=8, checkpointing=True, targets=LINEARS),
        ),
    ),
}
QUICK = Table("the harness", (Setting(), Setting(runs=2)), (_plain(Setting()),))


@dataclass
class Session:
    """One invocation: where its files are, the model folder of every program, and everything measured so far."""

    folder: Path
    models: Mapping[str, Path]
    steps: tuple[str, ...]
    again: bool = True
    out: Path | None = None
    results: list[tuple[Job, Measured]] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    started: int = 0

    def run(self, job: Job) -> list[Measured]:
        """Start a job's processes, wait, and read what they measured. One that failed or hung gives a line with its error."""
        self.started += 1
        folder = self.folder / f"{self.started:02d}"
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps([asdict(setting) for setting in job.settings]))
        began = time.monotonic()
        processes = [self._start(job, folder, rank) for rank in range(job.processes)]
        codes = [_wait(process, began + WORKER_SECONDS) for process in processes]
        results = [self._read(folder / f"{rank}.jsonl") for rank in range(job.processes)]
        measured = []
        for index, setting in enumerate(job.settings):
            parts = [by_index[index] for by_index in results if index in by_index]
            measured.append(
                together(parts, setting.processes)
                if parts
                else Measured(job.who, setting, error=_last_line(folder / "0.log", codes[0]))
            )
        print(f"{job.who}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        self.results += [(job, m) for m in measured]
        self._save()
        return measured

    def rename(self, measured: list[Measured], who: str) -> None:
        """Call the results of the last job by another name."""
        self.results[-len(measured) :] = [(job, replace(m, who=who)) for job, m in self.results[-len(measured) :]]
        self._save()

    def _save(self) -> None:
        """Write everything measured so far to the file, in case this process is killed."""
        if self.out is not None:
            document = {
                "where": where(),
                "ceiling_flops": self.ceilings,
                "measured": [asdict(m) for _, m in self.results],
            }
            self.out.write_text(json.dumps(document, indent=1))

    def _start(self, job: Job, folder: Path, rank: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            MODULES[job.who],
            "--model",
            self.models[job.who],
            "--settings",
            folder / "settings.json",
        ]
        command += ["--out", folder / f"{rank}.jsonl", *self.steps, *job.extra]
        if job.processes > 1:
            command += ["--meeting", folder, "--rank", str(rank)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE.parent), str(HERE.parents[1])]),
            "HF_HUB_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with (folder / f"{rank}.log").open("wb") as log:
            return subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )

    def _read(self, out: Path) -> dict[int, Measured]:
        """A process's results by the index of their setting in the job. The ceiling that it measured is kept in `ceilings`."""
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.ceilings += [line["ceiling_flops"] for line in lines if "ceiling_flops" in line]
        return {line["index"]: Measured.of(line["measured"]) for line in lines if "measured" in line}


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit code, None for a process that had to be killed."""
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _last_line(log: Path, code: int | None) -> str:
    """Why a process gave no result: its exit code and the last line of its log."""
    text = log.read_text(errors="replace").strip().splitlines()
    reason = f"exit code {code}" if code is not None else f"killed after {WORKER_SECONDS:.0f} s"
    return f"{reason}: {text[-1][:200] if text else 'no output'}".replace("|", "/")


def measure_tables(session: Session, tables: Sequence[Table]) -> None:
    """Measure lorapack, every peer and lorapack again; then lorapack in the profile of a T4."""
    ours = Job(NAME, tuple(dict.fromkeys(setting for table in tables for setting in table.ours)))
    if ours.settings:
        session.run(ours)
    for job in dict.fromkeys(job for table in tables for job in table.peers):
        session.run(job)
    if session.again and any(table.peers for table in tables):
        session.rename(session.run(ours), "lorapack, again")
    for table in tables:
        if table.t4:
            session.rename(session.run(Job(NAME, table.t4, extra=("--profile", "t4"))), AS_T4)


def report(session: Session, shape: Shape, tables: Sequence[Table]) -> str:
    """Everything that was measured, as markdown."""
    ceiling = statistics.median(session.ceilings) if session.ceilings else float("nan")
    parts = [f"{where()}; bf16 matrix product {ceiling / 1e12:,.1f} TFLOP/s"]
    for table in tables:
        lines = [m for job, m in session.results if _belongs(job, m, table)]
        parts += [f"### {table.title}", speed_table(lines, shape.flop_parameters, ceiling)]
        parts += [ratios(lines, [m for m in lines if m.who.startswith(NAME) and m.setting == s]) for s in table.ours]
    # Packs that differ in the number of runs only.
    packs = [m for _, m in session.results if m.who == NAME and m.setting == Setting(runs=m.setting.runs)]
    return "\n\n".join(part for part in [*parts, where_packing_stops(packs) if len(packs) > 2 else ""] if part)


def _belongs(job: Job, measured: Measured, table: Table) -> bool:
    """Whether a result is a line of the table."""
    if job.who == NAME:
        return measured.setting in (table.t4 if measured.who == AS_T4 else table.ours)
    return job in table.peers


def where() -> str:
    """Date, device and versions, without importing torch."""
    device = "CPU"
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        device = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONED if _installed(name))
    return f"{time.strftime('%Y-%m-%d')}, {device}, {versions}"


def _model_folders(name: str, root: Path, tables: Sequence[Table]) -> dict[str, Path]:
    """The model of every program in the tables; without weights for those that open a quantized base."""
    peers = {job.who for table in tables for job in table.peers}
    folders = {NAME: model_folder(name, root, weights=False)}
    if TWIN in peers:
        folders[TWIN] = model_folder(name, root, twin=True, weights=False)
    others = sorted(peers - {TWIN})
    return folders | {who: model_folder(name, root) for who in others}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def main(given: list[str] | None = None) -> None:
    """Measure the chosen tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", nargs="+", choices=TABLES, default=["plain"], help="several share their runs of lorapack"
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama2_7b")
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "lorapack-bench", help="kept between calls"
    )
    parser.add_argument("--logs", type=Path, help="keep what the programs printed in this folder")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--timed", type=int, default=20, help="steps")
    parser.add_argument("--once", action="store_true", help="lorapack before its peers only")
    parser.add_argument("--quick", action="store_true", help="try the harness: a tiny model, two steps")
    arguments = parser.parse_args(given)
    tables = [QUICK] if arguments.quick else [TABLES[name] for name in arguments.table]
    tables = [table for table in tables if table.needs is None or _installed(table.needs)] or parser.error(
        "not installed"
    )
    name = "tiny" if arguments.quick else arguments.shape
    arguments.models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        steps = ("--warm", "1", "--timed", "2") if arguments.quick else ("--timed", str(arguments.timed))
        folder = arguments.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        models = _model_folders(name, arguments.models.resolve(), tables)
        session = Session(
            folder.resolve(), models, steps, again=not (arguments.once or arguments.quick), out=arguments.json
        )
        measure_tables(session, tables)
    print(report(session, SHAPES[name], tables))


if __name__ == "__main__":
    main()
