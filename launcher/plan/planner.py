"""Sweep -> `Plan`: what will happen with every run, and which runs train together. Reads the disk, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from launcher.cluster.arrays import job_slots
from launcher.cluster.partitions import partitions_for
from launcher.cluster.requests import refuse_pattern
from launcher.config import ClusterConfig
from launcher.estimate.devices import LOCAL_PARTITION
from launcher.estimate.workload import SizingInputs
from launcher.plan.decision import RunDecision, decide
from launcher.plan.packing import pack_id
from launcher.plan.routing import Routed, Router
from launcher.records import JobSlots, Pack, Plan, PlannedRun, Run, Sweep, Verdict
from launcher.track.jobs import JobRecord, arrays_in_queue, jobs_of, look_up, newest_job_per_run
from train.store.layout import CacheDir, RunDir, SweepDir

TO_TRAIN = {Verdict.NEW, Verdict.RESUMABLE}

Decided = list[tuple[Run, RunDecision]]


def make_plan(sweep: Sweep, *, retry_failed: bool = False) -> Plan:
    """Decide about every run by its folder, and pack those that are to train. `retry_failed` includes failed ones.

    Raises:
        BadInput: a model cannot be trained, an adapter targets what it does not have, a run fits no partition, or Slurm cannot
            write to the root.
        ClusterError: Slurm is asked for and does not answer.
    """
    decided = _decide_runs(sweep, retry_failed)
    sweep = replace(sweep, runs=tuple(run for run, _ in decided))
    inputs = SizingInputs(CacheDir(sweep.cache))
    packs = _packs(sweep, decided, inputs)
    pack_of = {run: pack.id for pack in packs for run in pack.runs}
    planned = (
        PlannedRun(run, decision.verdict, _reason(run, decision, inputs), pack_of.get(run.id))
        for run, decision in decided
    )
    return Plan(sweep, tuple(planned), tuple(packs), _slots(sweep, packs))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON document; `overrides` maps each swept key to the run's value."""
    return {
        "sweep": plan.sweep.name,
        "root": str(plan.sweep.root),
        "runs": [_run_json(planned) for planned in plan.runs],
        "packs": [
            {
                "id": pack.id,
                "partition": pack.partition,
                "path": pack.path,
                "slower": round(pack.slower, 2),
                "runs": list(pack.runs),
                "forecast": {
                    key: value if value is None else round(value, 4) for key, value in asdict(pack.forecast).items()
                },
            }
            for pack in plan.packs
        ],
    }


def _decide_runs(sweep: Sweep, retry_failed: bool) -> Decided:
    """A decision per run. A run keeps the folder that it has, even if its name would differ now."""
    folders = {folder.id: folder for folder in sweep.dir.runs()}
    jobs = _jobs(folders.values(), sweep.dir)
    decided = []
    for run in sweep.runs:
        folder = folders.get(run.id)
        named = run if folder is None else replace(run, name=folder.name)
        decided.append((named, decide(folder, retry_failed=retry_failed, job=jobs.get(named.folder))))
    return decided


def _jobs(folders: Iterable[RunDir], sweep: SweepDir) -> dict[str, JobRecord]:
    """The last job of every unfinished run, by its folder's name; Slurm is asked once."""
    unfinished = {folder.path.name for folder in folders if not folder.result.exists()}
    # A pack of 8 runs is one job, and Slurm is asked about it once.
    newest = {run: job for run, job in newest_job_per_run(jobs_of(sweep)).items() if run in unfinished}
    seen = {job.pack.path: job for job in look_up(list({job.pack.path: job for job in newest.values()}.values()))}
    return {run: seen[job.pack.path] for run, job in newest.items()}


def _packs(sweep: Sweep, decided: Decided, inputs: SizingInputs) -> list[Pack]:
    """The packs that train everything that is new or resumable."""
    todo = [(run, decision.step) for run, decision in decided if decision.verdict in TO_TRAIN]
    if not todo:
        return []
    work = {run.id: inputs.work(run.config, step) for run, step in todo}
    router = Router(sweep.dir, partitions_for(sweep.cluster), inputs, _with_smaller_packs(sweep.cluster, decided), work)
    # Part of the packs' ids, so that packs of a later plan have other ids even with the same runs.
    prior_plans = len(list(sweep.dir.plans.glob("*.json")))
    return [_pack(routed, prior_plans) for routed in router.route([run for run, _ in todo])]


def _slots(sweep: Sweep, packs: list[Pack]) -> JobSlots | None:
    """How many of the packs may train at once on Slurm, given what the sweep has in the queue."""
    if not packs or packs[0].partition == LOCAL_PARTITION:
        return None
    refuse_pattern(sweep.dir.path)
    return job_slots(len(packs), sweep.cluster.jobs_at_once(slurm=True), arrays_in_queue(sweep.dir))


def _with_smaller_packs(cluster: ClusterConfig, decided: Decided) -> ClusterConfig:
    """The cluster's settings, with a lower limit of runs per pack if a run ran out of memory in a larger one."""
    # None means no limit.
    limits = [decision.most_runs for _, decision in decided] + [cluster.max_runs_per_pack]
    return cluster.model_copy(update={"max_runs_per_pack": min((most for most in limits if most), default=None)})


def _pack(routed: Routed, prior_plans: int) -> Pack:
    return Pack(
        pack_id(routed.runs, prior_plans),
        routed.partition.name,
        tuple(run.id for run in routed.runs),
        routed.forecast,
        routed.partition.gres,
        routed.minutes,
        routed.path,
        routed.slower,
    )


def _reason(run: Run, decision: RunDecision, inputs: SizingInputs) -> str:
    """The decision's reason, and what could not be checked yet."""
    known = inputs.shape(run.config.model).origin if decision.verdict in TO_TRAIN else "files"
    if known == "files":
        return decision.reason
    unchecked = "sizes from the catalogue," if known == "catalogue" else "architecture and target modules are"
    when = "before anything is submitted" if inputs.is_fetched(run.config.model) else "once the model is fetched"
    return f"{decision.reason}; {unchecked} checked {when}"


def _run_json(planned: PlannedRun) -> dict[str, Any]:
    run = planned.run
    return {
        "id": run.id,
        "name": run.name,
        "verdict": planned.verdict.value,
        "reason": planned.reason,
        "overrides": run.axes,
        "pack": planned.pack,
    }
