"""Which runs train together: those that share the frozen base, in packs of similar length that use every device there is."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

from launcher.estimate.workload import BaseKey, base_key
from launcher.records import Run

# Beyond this a pack gains no speed (a micro-batch of 16 runs fills an H200) and one lost job would stop too many runs.
MOST_RUNS_PER_PACK = 32


@dataclass(frozen=True)
class DeviceModel:
    """What is asked about runs on one kind of device: whether it holds a pack, how long the pack takes, when it is full.

    slots: packs that train side by side. full_packs: as many packs of a list of runs as still keep their devices busy.
    """

    fits: Callable[[list[Run]], bool]
    seconds: Callable[[list[Run]], float]
    full_packs: Callable[[list[Run]], int]
    slots: int


def by_base(runs: list[Run]) -> list[list[Run]]:
    """The runs that could train together, in their order."""
    groups: dict[BaseKey, list[Run]] = {}
    for run in runs:
        groups.setdefault(base_key(run.config), []).append(run)
    return list(groups.values())


def pack_runs(runs: list[Run], largest: int, work_of: Callable[[Run], float], bench: DeviceModel) -> list[list[Run]]:
    """Cut runs that share a base into packs of about the same sum of `work_of`, for the shortest time until the last one ends.

    The fewest packs that fit are split further only for devices that would stand idle, and only while every pack still keeps its
    own device busy. A run that does not fit alone gets a pack of its own.
    """
    modest = [run for run in runs if bench.fits([run])]
    fitting = {run.id for run in modest}
    alone = [[run] for run in runs if run.id not in fitting]
    if not modest:
        return alone
    fewest = _fewest(modest, largest, work_of, bench.fits)
    candidates = [fewest, *(_balanced(modest, count, work_of) for count in _counts(len(fewest), modest, bench))]
    fitting_ones = [packs for packs in candidates if all(bench.fits(pack) for pack in packs)]
    return min(fitting_ones, key=lambda packs: makespan(list(map(bench.seconds, packs)), bench.slots)) + alone


def makespan(seconds: list[float], slots: int) -> float:
    """When the last of these jobs ends if `slots` run side by side and the longest are started first."""
    free_at = [0.0] * slots
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + job)
    return max(free_at)


def pack_id(runs: list[Run], prior_plans: int) -> str:
    """Eight hexadecimal digits: a later plan of the same runs is another job with a folder of its own."""
    text = "\n".join([str(prior_plans), *(run.id for run in runs)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _fewest(
    group: list[Run], largest: int, work_of: Callable[[Run], float], fits: Callable[[list[Run]], bool]
) -> list[list[Run]]:
    """Try more and more packs until each one fits."""
    count = math.ceil(len(group) / largest)
    packs = _balanced(group, count, work_of)
    while not all(fits(pack) for pack in packs):
        count = min(len(group), count + max(1, count // 8))
        packs = _balanced(group, count, work_of)
    return packs


def _counts(fewest: int, group: list[Run], bench: DeviceModel) -> list[int]:
    """Higher numbers of packs that may be quicker: those that use all slots in their last round too."""
    most = min(bench.full_packs(group), len(group))
    return [count for count in range(bench.slots, most + 1, bench.slots) if count > fewest] + [most] * (most > fewest)


def _balanced(group: list[Run], count: int, work_of: Callable[[Run], float]) -> list[list[Run]]:
    """`count` packs of nearly equal size: the longest run first, each to the least loaded pack that has room."""
    order = {run.id: place for place, run in enumerate(group)}
    packs: list[list[Run]] = [[] for _ in range(count)]
    open_packs = [(0.0, 0, index) for index in range(count)]  # a heap of load, runs and place of each pack with room
    for run in sorted(group, key=work_of, reverse=True):
        load, size, index = heapq.heappop(open_packs)
        packs[index].append(run)
        if size + 1 < math.ceil(len(group) / count):
            heapq.heappush(open_packs, (load + work_of(run), size + 1, index))
    return [sorted(pack, key=lambda run: order[run.id]) for pack in packs if pack]
