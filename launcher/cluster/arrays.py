"""A sweep's job arrays, as values: what they are called, which packs go into which, and how many of their tasks run at once.

Nothing here runs a command. `launcher.cluster.requests` turns an `ArrayRequest` into sbatch's parameters, and
`launcher.cluster.slurm` submits it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.records import JobSlots, Pack
from train.store.layout import SweepDir
from train.store.record_file import FileRecord, read_record


@dataclass(frozen=True)
class JobNames:
    """The names of the jobs of the sweep called `sweep`.

    Jobs are found and cancelled by these names, so two sweeps must never share one: `key` tells namesakes apart.
    """

    sweep: str
    key: str

    def token(self, packs: Sequence[str]) -> str:
        """Eight hexadecimal digits for the array of these packs; a sweep uses no pack id twice."""
        return _digits(self.key, *packs)

    def array(self, packs: Sequence[str]) -> str:
        """The name of the array of these packs."""
        return f"{self.sweep}.{self.token(packs)}"

    @property
    def report(self) -> str:
        """The name of the job that writes the report."""
        return f"{self.sweep}.report.{self.key}"


@dataclass(frozen=True)
class ArrayRequest:
    """Jobs that differ only in their packs. `token` is part of their name, by which they are found if sbatch's answer is lost.

    parallel: how many of them run at once.
    after: numbers of arrays in the queue that have to end before these jobs start.
    follows: tokens of requests of the same submission that have to end first. They are submitted earlier.
    """

    token: str
    name: str
    partition: str
    gres: str
    packs: tuple[str, ...]
    minutes: int | None
    parallel: int
    after: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()


class _Acceptance(FileRecord):
    """What the names need of a plan: when it was accepted, Unix time."""

    accepted: float


def job_names(sweep: SweepDir) -> JobNames:
    """The names for a sweep's jobs, made from its folder and from the time when its first plan was accepted.

    They stay the same until the folder is deleted. A sweep of the same name elsewhere, or one that is submitted again after its
    folder was deleted, gets other names.

    Raises:
        DamagedFile: that plan cannot be read.
    """
    first = read_record(sweep.plans / "1.json", _Acceptance)
    return JobNames(sweep.path.name, _digits(str(sweep.path.resolve()), str(first and first.accepted)))


def job_slots(jobs: int, at_once: int, taken: dict[str, int]) -> JobSlots:
    """The slots for `jobs` new jobs of a sweep that may run `at_once` jobs (``cluster.max_parallel``).

    Slurm limits how many tasks of one array run at once, but has no such limit for a sweep. So each array gets slots of its own,
    and all arrays of a sweep together get no more than `at_once`. The limit of an array cannot grow later. So if less than half
    of the slots that the jobs could use are free, the jobs wait for the arrays that hold the others, and then have all of them.

    ``job_slots(9, 8, {"12": 3})`` gives the 5 free slots; with ``{"12": 5}`` only 3 < 8 / 2 are free, so the jobs wait for
    array 12 and then run 8 at once.

    taken: by the number of each array of this sweep in the queue, how many slots it holds.
    """
    free = at_once - sum(taken.values())
    waits = free < min(jobs, at_once) / 2
    return JobSlots(at_once if waits else free, tuple(taken.items()), waits)


def deal(sizes: Sequence[int], slots: int) -> list[int]:
    """How many of `slots` each array of these sizes gets: at least one, and no more than it has tasks.

    If there are more arrays than slots, every array gets one, and the caller makes array i wait for array ``i - slots``.

    ``deal([10, 5, 1], 8)`` is ``[5, 2, 1]``: after one slot each, the next goes to the array with the most tasks per slot.
    """
    shares = [1] * len(sizes)
    for _ in range(slots - len(sizes)):
        can_take_more = [index for index, size in enumerate(sizes) if shares[index] < size]
        if not can_take_more:
            break
        shares[max(can_take_more, key=lambda index: sizes[index] / shares[index])] += 1
    return shares


def array_requests(names: JobNames, packs: Sequence[Pack], slots: JobSlots, largest: int) -> list[ArrayRequest]:
    """One array per partition and GPU, cut at `largest` tasks. Together they run as many jobs at once as there are slots."""
    by_shape: dict[tuple[str, str], list[Pack]] = {}
    for pack in packs:
        by_shape.setdefault((pack.partition, pack.gres), []).append(pack)
    parts = [group[start : start + largest] for group in by_shape.values() for start in range(0, len(group), largest)]
    shares = deal([len(part) for part in parts], slots.count)
    requests = [_request(names, part, share, slots.after) for part, share in zip(parts, shares, strict=True)]
    # With 2 slots and arrays a, b, c, d (one slot each): c waits for a, d waits for b.
    for index in range(slots.count, len(requests)):
        requests[index] = replace(requests[index], follows=(requests[index - slots.count].token,))
    return requests


def split(requests: Sequence[ArrayRequest], names: JobNames) -> list[ArrayRequest]:
    """The same jobs with the first request in two halves, for a queue that does not take all of it. They share its slots."""
    whole, rest = requests[0], requests[1:]
    middle = math.ceil(len(whole.packs) / 2)
    parts = whole.packs[:middle], whole.packs[middle:]
    shares = deal([len(part) for part in parts], whole.parallel)
    first, second = (_part(whole, names, part, share) for part, share in zip(parts, shares, strict=True))
    # A single slot cannot be shared: the second half waits for the first.
    if whole.parallel == 1:
        second = replace(second, follows=(first.token,))
    halves = (first.token, second.token)
    return [first, second, *(_following(request, whole.token, halves) for request in rest)]


def _request(names: JobNames, packs: list[Pack], share: int, after: tuple[str, ...]) -> ArrayRequest:
    """The array of these packs. Its time limit is that of the longest pack, none if one has none."""
    limits = [pack.minutes for pack in packs if pack.minutes is not None]
    ids = tuple(pack.id for pack in packs)
    return ArrayRequest(
        token=names.token(ids),
        name=names.array(ids),
        partition=packs[0].partition,
        gres=packs[0].gres,
        packs=ids,
        minutes=max(limits) if len(limits) == len(packs) else None,
        parallel=share,
        after=after,
    )


def _part(request: ArrayRequest, names: JobNames, packs: tuple[str, ...], share: int) -> ArrayRequest:
    return replace(request, token=names.token(packs), name=names.array(packs), packs=packs, parallel=share)


def _following(request: ArrayRequest, token: str, others: tuple[str, ...]) -> ArrayRequest:
    """`request`, waiting for `others` where it waited for `token`."""
    follows = (others if followed == token else (followed,) for followed in request.follows)
    return replace(request, follows=tuple(followed for group in follows for followed in group))


def _digits(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
