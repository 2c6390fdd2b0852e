"""Where packs go: each to the cheapest partition that holds it, cut so that the last one ends as early as possible.

An example. A sweep has 8 runs over a 1B model and 8 over a 7B one, four times the tokens in all. Partition `t4` holds only runs over
the 1B model, `a100` holds both, and 8 jobs may run at once. Two groups form, one per base. `t4` has the smaller GPU, so the 1B
group goes there and the 7B group to `a100`. The 8 slots are shared by tokens: 8 x 1/5 = 1.6, rounded to 2, for the first group and
8 x 4/5 = 6.4, rounded to 6, for the second. `launcher.plan.packing` then cuts each group for its slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.config import ClusterConfig
from launcher.estimate.devices import LOCAL_PARTITION, Partition
from launcher.estimate.forecaster import Forecaster
from launcher.estimate.workload import SizingInputs, Workload
from launcher.plan.packing import MOST_RUNS_PER_PACK, DeviceModel, by_base, pack_runs
from launcher.plan.refusal import refuse
from launcher.records import Forecast, Run
from train.sizing import ComputePath
from train.store.layout import SweepDir

# Time limits are this much above the forecast, which is right to about that factor.
TIME_MARGIN = 1.5
# For loading from a slow disk, and for saving when asked to stop.
TIME_SPARE_MINUTES = 10


@dataclass(frozen=True)
class Routed:
    """Runs that will train as one pack in a partition; `path` and `slower` as in `Pack`."""

    partition: Partition
    runs: list[Run]
    forecast: Forecast
    path: ComputePath | None = None
    slower: float = 1.0

    @property
    def minutes(self) -> int | None:
        """The time limit to ask for. Short limits start earlier, and a job that reaches its limit saves and is requeued."""
        if self.partition.name == LOCAL_PARTITION:
            return None
        wanted = math.ceil(TIME_MARGIN * self.forecast.seconds / 60) + TIME_SPARE_MINUTES
        return min(wanted, self.partition.max_minutes or wanted)


class Router:
    """Routes the runs of one sweep. `work` holds what is left of each run, by id."""

    def __init__(
        self,
        sweep: SweepDir,
        partitions: tuple[Partition, ...],
        inputs: SizingInputs,
        cluster: ClusterConfig,
        work: dict[str, Workload],
    ) -> None:
        self._partitions = partitions
        self._inputs = inputs
        self._cluster = cluster
        self._work = work
        self._forecasters = {partition: Forecaster(sweep, partition, inputs) for partition in partitions}

    def route(self, runs: list[Run]) -> list[Routed]:
        """A pack and a partition for every run.

        Raises:
            BadInput: a run fits no partition of the cluster.
        """
        placed = [(group, self._cheapest(group, holding)) for group, holding in self._groups(runs)]
        # The jobs that may run at once are shared among the groups by their tokens, so that all groups end at about the same time.
        # Runs of which nothing is left to train have no tokens.
        total = sum(self._tokens(group) for group, _ in placed) or 1.0
        routed = []
        for group, partition in placed:
            share = self._slots(partition) * self._tokens(group) / total
            routed += self._cut(group, partition, max(1, round(share)))
        return routed

    def _groups(self, runs: list[Run]) -> list[tuple[list[Run], list[Partition]]]:
        """The runs that share a base, and the partitions that hold each of them by itself."""
        groups = []
        for group in by_base(runs):
            # Runs of one base may differ in size: a large rank fits fewer partitions.
            parts: dict[tuple[Partition, ...], list[Run]] = {}
            for run in group:
                parts.setdefault(tuple(self._holding(run)), []).append(run)
            groups += [(part, list(holding)) for holding, part in parts.items()]
        return groups

    def _holding(self, run: Run) -> list[Partition]:
        """The partitions that hold a run by itself. On this machine a try costs minutes, so a forecast does not refuse it."""
        work = [self._work[run.id]]
        holding = [p for p, forecaster in self._forecasters.items() if forecaster.fits([run], work)]
        if not holding and self._partitions[0].name != LOCAL_PARTITION:
            refuse(run, self._forecasters, self._inputs)
        return holding or list(self._partitions)

    def _cheapest(self, group: list[Run], holding: list[Partition]) -> Partition:
        """The lowest price of the whole group if every partition has a price.

        Otherwise the smallest GPU; of equal ones the lowest tier, whose jobs preempt no others; then the partition with most GPUs.
        """

        def price(partition: Partition) -> float:
            packs = self._cut(group, partition, self._slots(partition))
            return sum(pack.forecast.usd or 0.0 for pack in packs)

        def size(partition: Partition) -> tuple[float, int, int]:
            return partition.device.memory_gib, partition.tier, -(partition.gpus or 0)

        if len(holding) > 1 and all(partition.usd_per_gpu_hour is not None for partition in holding):
            return min(holding, key=lambda partition: (price(partition), size(partition)))
        return min(holding, key=size)

    def _cut(self, group: list[Run], partition: Partition, slots: int) -> list[Routed]:
        """The packs of a group in one partition."""
        forecaster = self._forecasters[partition]

        def forecast(runs: list[Run]) -> Forecast:
            return forecaster.forecast(runs[0].config, self._work_of(runs))

        device = DeviceModel(
            fits=lambda runs: forecaster.fits(runs, self._work_of(runs)),
            seconds=lambda runs: forecast(runs).seconds,
            # So many packs that each step still has the tokens that fill the device.
            full_packs=lambda runs: max(
                1, int(sum(work.step_tokens for work in self._work_of(runs)) / partition.full_tokens)
            ),
            slots=slots,
        )
        largest = self._cluster.max_runs_per_pack or MOST_RUNS_PER_PACK
        packs = pack_runs(group, largest, lambda run: self._work[run.id].train_tokens, device)
        shape = self._inputs.shape(group[0].config.model)
        # What the catalogue says is checked once the model is fetched.
        path = None if shape.assumed else shape.path
        return [
            Routed(partition, runs, forecast(runs), path, forecaster.slowdown(runs[0].config, self._work_of(runs)))
            for runs in packs
        ]

    def _slots(self, partition: Partition) -> int:
        """How many packs train side by side there."""
        jobs = self._cluster.jobs_at_once(slurm=partition.name != LOCAL_PARTITION)
        return min(jobs, partition.jobs or jobs)

    def _work_of(self, runs: list[Run]) -> list[Workload]:
        return [self._work[run.id] for run in runs]

    def _tokens(self, runs: list[Run]) -> float:
        return sum(work.train_tokens for work in self._work_of(runs))
