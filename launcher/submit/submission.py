"""`Plan` -> folders, frozen configuration and code, and jobs. It takes only a plan and does exactly what the plan says.

One launcher at a time submits to a sweep and keeps its queue (`sole_launcher`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml

from launcher.cluster.arrays import array_requests, job_names
from launcher.cluster.local import LocalQueue, open_queue, refuse_too_few_gpus
from launcher.cluster.slurm import ArraySubmitter, Submitted, max_array_size
from launcher.errors import ClusterError
from launcher.plan.planner import plan_json
from launcher.plan_files import plan_numbers, read_plans
from launcher.records import Pack, Plan, PlanRecord, Run, verb_command
from launcher.submit.freeze import freeze_code
from train.errors import BadInput, LeaseHeld, StorageError
from train.store.layout import SweepDir
from train.store.lease import Heartbeat, acquire, read_lease, release
from train.store.record_file import DamageLog, write_record
from train.store.records import ForecastRecord, PackRecord
from train.store.storage import make_folder, write_text


def submit(plan: Plan) -> LocalQueue:
    """Write everything that the plan's packs need and start the first of them here. Call it as the sweep's `sole_launcher`.

    Raises:
        BadInput: the disk refuses, or there are fewer GPUs than a job asks for; no job was started.
        ClusterError: the same packs were submitted meanwhile.
    """
    refuse_too_few_gpus(plan.sweep.cluster)
    code = _write_all(plan)
    packs = [plan.sweep.dir.pack(pack.id) for pack in plan.packs]
    return open_queue(packs, code, plan.sweep.cluster)


def submit_to_slurm(plan: Plan) -> Submitted:
    """Write everything that the plan's packs need and put them into Slurm's queue.

    Raises:
        BadInput: the disk refuses; no job was submitted.
        ClusterError: the same packs were submitted meanwhile, or Slurm refuses.
    """
    sweep = plan.sweep
    code = _write_all(plan)
    assert plan.slots is not None, "a plan for this machine"
    requests = array_requests(job_names(sweep.dir), plan.packs, plan.slots, max_array_size())
    return ArraySubmitter(sweep.dir, code, sweep.cluster).submit(requests)


def _write_all(plan: Plan) -> Path:
    """Write configurations, packs, the plan itself and the code that will run; the folder of the code."""
    try:
        code = freeze_code(plan.sweep.dir)
        for planned in plan.runs:
            if planned.pack is not None:
                _write_run(plan, planned.run)
        _refuse_known_packs(plan)
        for pack in plan.packs:
            _write_pack(plan, pack)
        _accept(plan)
    except StorageError as exc:
        # Nothing has started yet, so a full disk is for the user to fix, like any other input.
        raise BadInput(str(exc)) from exc
    return code


def accepted_plan(plan: Plan) -> PlanRecord:
    """What ``plans/<n>.json`` holds."""
    sweep = plan.sweep
    facts = {
        "accepted": time.time(),
        "command": sweep.command,
        "cache": str(sweep.cache),
        "cluster": sweep.cluster.model_dump(),
        "tracking": sweep.tracking.model_dump(),
    }
    return PlanRecord.model_validate(plan_json(plan) | facts)


def _write_run(plan: Plan, run: Run) -> None:
    """The run's folder and frozen configuration. An earlier request to stop no longer counts: the user asked for the run again."""
    folder = plan.sweep.run_dir(run)
    make_folder(folder.path)
    write_text(folder.config, yaml.safe_dump(run.config.model_dump(), sort_keys=False))
    folder.cancel_request.unlink(missing_ok=True)


def _write_pack(plan: Plan, pack: Pack) -> None:
    sweep = plan.sweep
    folder = sweep.dir.pack(pack.id)
    make_folder(folder.path)
    name_of = {planned.run.id: planned.run.folder for planned in plan.runs}
    record = PackRecord(
        id=pack.id,
        sweep_dir=str(sweep.dir.path),
        cache=str(sweep.cache),
        runs=[name_of[run] for run in pack.runs],
        axes={planned.run.folder: planned.run.axes for planned in plan.runs if planned.pack == pack.id},
        forecast=ForecastRecord(**asdict(pack.forecast)),
        tracking=sweep.tracking.model_dump(),
    )
    write_record(folder.pack, record)


def _refuse_known_packs(plan: Plan) -> None:
    """A pack is submitted once. A pack folder that is in no accepted plan was left by an interrupted submission, and is used again."""
    sweep = plan.sweep.dir
    known = {pack.id for accepted in read_plans(sweep, DamageLog()) for pack in accepted.packs} & {
        pack.id for pack in plan.packs
    }
    if known:
        raise ClusterError(f"The pack {min(known)} was submitted by another launcher meanwhile; run the command again.")


def _accept(plan: Plan) -> None:
    sweep = plan.sweep.dir
    make_folder(sweep.plans)
    number = max(plan_numbers(sweep), default=0) + 1
    write_record(sweep.plans / f"{number}.json", accepted_plan(plan))


@contextmanager
def sole_launcher(sweep: SweepDir) -> Iterator[None]:
    """Hold the lease of the sweep's folder, which is made if it does not exist. A dead launcher's lease is taken over.

    If no plan is accepted, a folder that was made here is removed again, so that a refused sweep leaves nothing behind.

    Raises:
        LeaseHeld: another live launcher holds it.
        BadInput: the folder cannot be made.
    """
    fresh = not sweep.path.exists()
    try:
        make_folder(sweep.path)
        lease = acquire(sweep, job="launcher", attempt=0)
    except LeaseHeld as exc:
        raise LeaseHeld(_who_holds(sweep)) from exc
    except StorageError as exc:
        if fresh:
            shutil.rmtree(sweep.path, ignore_errors=True)
        raise BadInput(str(exc)) from exc
    try:
        with Heartbeat([(sweep, lease)]):
            yield
    finally:
        release(sweep, lease)
        if fresh and not any(sweep.plans.glob("*.json")):
            shutil.rmtree(sweep.path, ignore_errors=True)


def _who_holds(sweep: SweepDir) -> str:
    held = read_lease(sweep)
    who = f"process {held.pid} on {held.host}" if held else "a process that just ended"
    return (
        f"Another launcher ({who}) is at work on the sweep {sweep.path.name}; wait until it is done, or watch it: "
        f"{verb_command('status', sweep)}"
    )
