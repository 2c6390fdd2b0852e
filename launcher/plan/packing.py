"""Which runs train together: those that share the frozen base, as many as memory holds, in packs of similar length."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable

from launcher.records import ClusterConfig, Run
from train.config import RunConfig

# Beyond this a pack gains no speed (a micro-batch of 16 runs fills an H200) and one lost job would stop too many runs.
MOST_RUNS_PER_PACK = 32

BaseKey = tuple[str, ...]


def base_key(config: RunConfig) -> BaseKey:
    """What runs of one pack have in common: the base, its precision, and how it is held and computed."""
    train = config.train
    shared = (config.model.fingerprint, config.quant, train.dtype, train.residency)
    return tuple(repr(value) for value in (*shared, train.gradient_checkpointing, train.micro_batch_tokens))


def pack_runs(
    runs: list[Run], cluster: ClusterConfig, work_of: Callable[[Run], float], fits: Callable[[list[Run]], bool]
) -> list[list[Run]]:
    """Cut `runs` into the fewest packs that `fits` accepts, of about the same sum of `work_of`.

    A run that does not fit alone gets a pack of its own: a forecast is no reason to refuse it.
    """
    by_base: dict[BaseKey, list[Run]] = {}
    for run in runs:
        by_base.setdefault(base_key(run.config), []).append(run)
    largest = cluster.max_runs_per_pack or MOST_RUNS_PER_PACK
    return [pack for group in by_base.values() for pack in _cut(group, largest, work_of, fits)]


def pack_id(runs: list[Run], prior_plans: int) -> str:
    """Eight hexadecimal digits: a later plan of the same runs is another job with a folder of its own."""
    text = "\n".join([str(prior_plans), *(run.id for run in runs)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _cut(
    group: list[Run], largest: int, work_of: Callable[[Run], float], fits: Callable[[list[Run]], bool]
) -> list[list[Run]]:
    """Try more and more packs until each one fits; what does not fit alone is set apart first."""
    modest = [run for run in group if fits([run])]
    fitting = {run.id for run in modest}
    alone = [[run] for run in group if run.id not in fitting]
    count = math.ceil(len(modest) / largest)
    packs = _balanced(modest, count, work_of)
    while not all(fits(pack) for pack in packs):
        count = min(len(modest), count + max(1, count // 8))
        packs = _balanced(modest, count, work_of)
    return packs + alone


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
