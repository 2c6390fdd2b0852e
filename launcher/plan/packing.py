"""Which runs train together: those that share the frozen base, in packs of similar length that use every device there is.

A worked example. Five runs of 6, 5, 4, 3 and 2 million training tokens share a base. A device holds three of them, and a pack takes
60 s plus 10 s per million tokens. `_balanced` makes these cuts, and `makespan` says when the last pack ends:

=====  ==============================  =======================  =========  =========
packs  cut                             seconds                  on 2 GPUs  on 4 GPUs
=====  ==============================  =======================  =========  =========
2      6+3+2 | 5+4                     170 150                  170        170
3      6 | 5+2 | 4+3                   120 130 130              250        130
4      6 | 5 | 4 | 3+2                 120 110 100 110          220        120
5      6 | 5 | 4 | 3 | 2               120 110 100 90 80        290        170
=====  ==============================  =======================  =========  =========

Two packs are the fewest that fit. On 2 GPUs they are also the fastest cut, because every further pack pays the 60 s again. On 4 GPUs
two would stand idle, so 4 packs and 5 packs are tried as well, and 4 packs win, if such small packs still keep a GPU busy
(`DeviceModel.full_packs`).
"""

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
    """What packing needs to know about one kind of device.

    fits: whether the device holds these runs as one pack. seconds: how long that pack takes.
    full_packs: the most packs into which these runs can be cut so that each pack still keeps its device busy.
    slots: how many packs train side by side.
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


def pack_runs(runs: list[Run], largest: int, work_of: Callable[[Run], float], device: DeviceModel) -> list[list[Run]]:
    """Cut runs that share a base into packs of about the same sum of `work_of`, so that the last one ends as early as possible.

    The fewest packs that fit are split further only for devices that would stand idle, and only while every pack still keeps its
    own device busy. A run that does not fit even by itself gets a pack of its own: on this machine a forecast refuses nothing.

    largest: the most runs of a pack.
    """
    small = [run for run in runs if device.fits([run])]
    small_ids = {run.id for run in small}
    too_large = [[run] for run in runs if run.id not in small_ids]
    if not small:
        return too_large
    fewest = _fewest(small, largest, work_of, device.fits)
    candidates = [fewest, *(_balanced(small, count, work_of) for count in _counts(len(fewest), small, device))]
    # More packs are not always smaller ones: a balanced cut may put the two largest runs together.
    fitting = [packs for packs in candidates if all(device.fits(pack) for pack in packs)]
    # `fewest` comes first, so it wins a tie.
    return min(fitting, key=lambda packs: makespan(list(map(device.seconds, packs)), device.slots)) + too_large


def makespan(seconds: list[float], slots: int) -> float:
    """When the last of these jobs ends if `slots` run side by side and the longest are started first.

    ``makespan([120, 110, 100, 110], 2)`` is 220: the slots end their first jobs at 120 and 110, and their second ones at 220 each.
    """
    # A heap: `free_at[0]` is the slot that is free first.
    free_at = [0.0] * slots
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + job)
    return max(free_at)


def pack_id(runs: list[Run], prior_plans: int) -> str:
    """Eight hexadecimal digits. A later plan of the same runs gets another id, so that its job has a folder of its own."""
    text = "\n".join([str(prior_plans), *(run.id for run in runs)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _fewest(
    group: list[Run], largest: int, work_of: Callable[[Run], float], fits: Callable[[list[Run]], bool]
) -> list[list[Run]]:
    """The first cut of which every pack fits, trying more and more packs."""
    count = math.ceil(len(group) / largest)
    packs = _balanced(group, count, work_of)
    while not all(fits(pack) for pack in packs):
        # One more pack, or an eighth more: a thousand runs need few tries.
        count = min(len(group), count + max(1, count // 8))
        packs = _balanced(group, count, work_of)
    return packs


def _counts(fewest: int, group: list[Run], device: DeviceModel) -> list[int]:
    """Higher numbers of packs that may be faster: multiples of the slots, and the most that keep their devices busy.

    With any other number some slots are idle in the last round. With 4 slots, at most 10 full packs and 3 that fit: 4, 8 and 10.
    """
    most = min(device.full_packs(group), len(group))
    rounds = [count for count in range(device.slots, most + 1, device.slots) if count > fewest]
    return rounds + [most] * (most > fewest)


def _balanced(group: list[Run], count: int, work_of: Callable[[Run], float]) -> list[list[Run]]:
    """At most `count` packs of nearly equal work: the longest run first, each to the least loaded pack that has room.

    A pack has room for ``ceil(runs / count)`` runs. For the 2 packs of the example that is 3: 6 and 5 open the packs, 4 joins 5,
    3 joins 6, and of the packs 6+3 and 5+4 the first takes 2. Within a pack the runs keep the order of `group`.
    """
    order = {run.id: place for place, run in enumerate(group)}
    packs: list[list[Run]] = [[] for _ in range(count)]
    # A heap of (load, number of runs, index) of each pack that has room. Once a pack is full it is not pushed back.
    open_packs = [(0.0, 0, index) for index in range(count)]
    for run in sorted(group, key=work_of, reverse=True):
        load, size, index = heapq.heappop(open_packs)
        packs[index].append(run)
        if size + 1 < math.ceil(len(group) / count):
            heapq.heappush(open_packs, (load + work_of(run), size + 1, index))
    return [sorted(pack, key=lambda run: order[run.id]) for pack in packs if pack]
