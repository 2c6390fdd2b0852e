"""How the jobs of a sweep share ``cluster.max_parallel``: those of one command among each other, and with those of earlier ones.

Slurm limits how many tasks of one array run at once, and knows nothing of sweeps. So every array gets lanes of its own, as many as its
limit; all arrays of a sweep together get no more than there are. Lanes that are taken come free when their array has ended, which
is what a dependency can wait for: arrays for which none are left wait for arrays that have some.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.records import Lanes


def lanes_for(jobs: int, at_once: int, taken: dict[str, int]) -> Lanes:
    """Lanes for so many new jobs: those that are free, unless they are fewer than half of what the jobs could use.

    A limit cannot grow later. So rather than crawl to their end on a rest of lanes, jobs wait until they can have them all.
    """
    free = at_once - sum(taken.values())
    waits = free < min(jobs, at_once) / 2
    return Lanes(at_once if waits else free, tuple(taken.items()), waits)


def deal(sizes: Sequence[int], lanes: int) -> list[int]:
    """`lanes` dealt out over arrays of these sizes: never more than an array has tasks, and at least one each.

    Where there are more arrays than lanes the first ones get one each, and so does every other: that of the array `lanes` before it,
    once that has ended.
    """
    shares = [1] * len(sizes)
    for _ in range(lanes - len(sizes)):
        open_ones = [place for place, size in enumerate(sizes) if shares[place] < size]
        if not open_ones:
            break
        shares[max(open_ones, key=lambda place: sizes[place] / shares[place])] += 1
    return shares
