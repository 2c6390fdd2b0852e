"""Packs go to the cheapest partition that holds them and are cut for the shortest time; what fits nowhere is refused with help."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.cluster import partitions as cluster_partitions
from launcher.cluster.inventory import Inventory
from launcher.cluster.parsing import LivePartition
from launcher.cluster.partitions import choose_partitions
from launcher.compose.composer import compose
from launcher.config import ClusterConfig, PartitionConfig
from launcher.doctor.site import site_text
from launcher.errors import ClusterError
from launcher.estimate.devices import Partition, gpu_device
from launcher.estimate.forecaster import Forecaster
from launcher.estimate.gpus import known_gpu
from launcher.estimate.workload import SizingInputs
from launcher.plan.packing import DeviceModel, makespan, pack_runs
from launcher.plan.planner import make_plan
from launcher.records import Plan
from train.errors import BadInput
from train.section import parse_section
from train.store.layout import CacheDir
from train.store.storage import make_folder, write_json, write_text

T4 = PartitionConfig(gpu="t4", gpus=4, max_minutes=1440)
A100 = PartitionConfig(gpu="a100", gpus=4, max_minutes=60)
LLAMA = ["model=llama2_7b", "data=alpaca"]


def live(name: str, gpus: dict[str, int], tier: int = 1, features: frozenset[str] = frozenset()) -> LivePartition:
    return LivePartition(name, True, False, 1440, gpus, features, tier)


def described(**partitions: PartitionConfig) -> list[str]:
    """The overrides that describe a whole cluster, so that none is asked."""
    return [
        f"cluster.partitions.{name}.{key}={value}"
        for name, partition in partitions.items()
        for key, value in partition.model_dump(exclude_none=True).items()
    ]


def plan(tmp_path: Path, *overrides: str, **partitions: PartitionConfig) -> Plan:
    shared = ["cluster=slurm", f"root={tmp_path}/runs", f"cache={tmp_path}/cache"]
    return make_plan(compose([*shared, *described(**partitions or {"t4": T4, "a100": A100}), *overrides]))


def places(made: Plan) -> list[str]:
    return [pack.partition for pack in made.packs]


def test_a_pack_goes_to_the_smallest_gpu_that_holds_it(tmp_path: Path) -> None:
    assert places(plan(tmp_path, *LLAMA)) == ["t4"]
    too_large_for_a_t4 = ["model=own", "model.source=acme/Llama-34B", "data=alpaca"]
    assert places(plan(tmp_path, *too_large_for_a_t4)) == ["a100"]


def test_the_runs_of_one_sweep_may_go_to_several_partitions(tmp_path: Path) -> None:
    made = plan(tmp_path, "quant=nf4,none", "model=own", "model.source=acme/Llama-13B", "data=alpaca")
    by_run = {planned.run.axes["quant"]: planned.pack for planned in made.runs}
    partition = {pack.id: pack.partition for pack in made.packs}
    assert (partition[by_run["nf4"]], partition[by_run["none"]]) == ("t4", "a100")


@pytest.mark.parametrize(("usd", "chosen"), [(0.01, "a100"), (100.0, "t4")])
def test_prices_decide_where_every_partition_has_one(tmp_path: Path, usd: float, chosen: str) -> None:
    t4 = T4.model_copy(update={"usd_per_gpu_hour": 1.0})
    made = plan(tmp_path, *LLAMA, t4=t4, a100=A100.model_copy(update={"usd_per_gpu_hour": usd}))
    assert places(made) == [chosen]
    forecast = made.packs[0].forecast
    assert forecast.usd == pytest.approx(forecast.gpu_hours * {"a100": usd, "t4": 1.0}[chosen])


def test_a_pack_says_what_its_job_is_asked_for_with(tmp_path: Path) -> None:
    short = plan(tmp_path, *LLAMA).packs[0]
    assert short.gres == "gpu:t4:1"
    assert short.minutes is not None
    assert 60 * short.minutes > short.forecast.seconds
    (long,) = plan(tmp_path, *LLAMA, "train.max_steps=1000000", a100=A100).packs
    assert (long.gres, long.minutes) == ("gpu:a100:1", 60)
    assert long.forecast.seconds > 3600


def test_full_packs_are_spread_over_the_gpus_there_are(tmp_path: Path) -> None:
    def sizes(parallel: int) -> list[int]:
        seeds = [*LLAMA, "train.seed=range(0,16)", "train.batch_size=8", f"cluster.max_parallel={parallel}"]
        return sorted(len(pack.runs) for pack in plan(tmp_path, *seeds, a100=A100).packs)

    assert sizes(1) == [16]
    assert sizes(2) == [8, 8]
    assert sizes(4) == [4, 4, 4, 4]
    # The partition has four.
    assert sizes(16) == [4, 4, 4, 4]


def test_small_packs_are_not_torn_apart(tmp_path: Path) -> None:
    assert [len(pack.runs) for pack in plan(tmp_path, "model=tiny", "sweep=rank", "cluster.max_parallel=8").packs] == [
        4
    ]


@pytest.mark.parametrize(
    ("slots", "full", "largest"), [(1, 9, 9), (2, 9, 9), (4, 9, 9), (4, 3, 9), (3, 9, 2), (5, 7, 4)]
)
def test_no_other_number_of_packs_ends_earlier(tmp_path: Path, slots: int, full: int, largest: int) -> None:
    """Against every number of packs of equal runs that memory and full devices allow."""
    runs = list(compose(["train.seed=range(0,9)", "model=tiny", f"root={tmp_path}"]).runs)
    bench = DeviceModel(lambda pack: True, lambda pack: 10.0 + len(pack), lambda pack: full, slots)
    packs = pack_runs(runs, largest, lambda run: 1.0, bench)
    assert sorted(run.id for pack in packs for run in pack) == sorted(run.id for run in runs)
    assert max(map(len, packs)) <= largest
    fewest = -(-len(runs) // largest)
    ends = []
    for count in range(fewest, max(fewest, min(full, len(runs))) + 1):
        seconds = [10.0 + len(runs[place::count]) for place in range(count)]
        ends.append(makespan(seconds, slots))
    assert makespan([10.0 + len(pack) for pack in packs], slots) == min(ends)


def test_makespan_is_never_below_what_is_possible() -> None:
    for jobs in itertools.product([1.0, 2.0, 5.0], repeat=4):
        for slots in (1, 2, 3):
            assert max(max(jobs), sum(jobs) / slots) <= makespan(list(jobs), slots) <= sum(jobs)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["model.source=acme/Llama-34B", "quant=none"], "quant=nf4"),
        (["model.source=acme/Llama-34B", "train.residency=resident"], "train.residency=nf4"),
        (["model.source=acme/Llama-13B", "lora.r=4096", "lora.target_modules=all-linear"], "lora.r="),
    ],
)
def test_what_fits_nowhere_is_refused_with_a_change_that_fits(tmp_path: Path, overrides: list[str], hint: str) -> None:
    base = ["model=own", "data=alpaca"]
    with pytest.raises(BadInput, match="more than any partition has room for") as caught:
        plan(tmp_path, *base, *overrides)
    advice = re.search(r"With (.*) it would take .* and fit (\w+)\.", str(caught.value))
    assert advice is not None, caught.value
    assert hint in advice[1]
    changed = {word.partition("=")[0]: word for word in [*overrides, *advice[1].split()]}
    assert places(plan(tmp_path, *base, *changed.values())) == [advice[2]]


def test_what_was_measured_on_one_gpu_corrects_the_forecast_for_that_kind(tmp_path: Path) -> None:
    """Clusters say ``a100``, the trainer writes what the driver calls it."""
    sweep = compose(["lora.r=4,8", *LLAMA, f"root={tmp_path}/runs", f"cache={tmp_path}/cache"])
    inputs = SizingInputs(CacheDir(sweep.cache))
    kinds = [Partition(name, gpu_device(name, 40.0)) for name in ("a100", "l40s")]
    work = [inputs.work(run.config) for run in sweep.runs]

    def forecasts() -> list[float]:
        return [Forecaster(sweep.dir, kind, inputs).forecast(sweep.runs[0].config, work).vram_gib for kind in kinds]

    before = forecasts()
    for run in sweep.runs:
        folder = sweep.run_dir(run)
        make_folder(folder.path)
        write_text(folder.config, yaml.safe_dump(run.config.model_dump()))
        facts_of_run = {"device": "NVIDIA A100-SXM4-40GB", "attempts": 1, "seconds": 100.0, "gpu_hours": 50 / 3600}
        facts_of_run |= {"steps": 60, "train_loss": 1.0, "tokens_per_second": 100.0}
        write_json(folder.result, facts_of_run | {"peak_memory_gib": 1.5 * before[0]})
    pack = sweep.dir.pack("abc")
    make_folder(pack.path)
    write_json(
        pack.pack,
        {"id": "abc", "sweep_dir": "s", "cache": "c", "runs": [sweep.run_dir(run).path.name for run in sweep.runs]},
    )
    assert forecasts() == pytest.approx([1.5 * before[0], before[1]])


def test_a_model_beyond_every_change_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="smaller model"):
        plan(tmp_path, "model=own", "model.source=acme/Llama-70B", "data=alpaca", t4=T4)


def test_partitions_are_completed_from_the_cluster() -> None:
    inventory = Inventory(
        [live("gpu", {"a100": 8, "t4": 2}), live("old", {"": 4}, features=frozenset({"v100", "ib"}))], None, None, None
    )
    found = choose_partitions(ClusterConfig(kind="slurm"), inventory)
    assert [(p.name, p.gres, p.device.memory_gib, p.gpus, p.max_minutes) for p in found] == [
        ("gpu", "gpu:a100:1", 40.0, 8, 1440),
        ("gpu", "gpu:t4:1", 15.0, 2, 1440),
        ("old", "gpu:1", 16.0, 4, 1440),
    ]
    named = {"gpu": PartitionConfig(gpu="a100", memory_gib=80.0, usd_per_gpu_hour=2.0)}
    (only,) = choose_partitions(ClusterConfig(kind="slurm", partitions=named), inventory)
    assert (only.device.memory_gib, only.gpus, only.usd_per_gpu_hour) == (80.0, 8, 2.0)


def test_a_partition_that_pushes_others_out_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = Inventory([live("urgent", {"t4": 8}, tier=10), live("t4", {"t4": 4})], None, None, None)
    monkeypatch.setattr(cluster_partitions, "take_inventory", lambda: inventory)
    sweep = compose(["cluster=slurm", "model=tiny", f"root={tmp_path}/runs", f"cache={tmp_path}/cache"])
    assert places(make_plan(sweep)) == ["t4"]


def test_a_written_site_knows_which_partition_pushes_others_out(tmp_path: Path) -> None:
    described = [live("urgent", {"t4": 8}, tier=10), live("t4", {"t4": 4}, tier=2)]
    site = parse_section(ClusterConfig, yaml.safe_load(site_text("site", described)), "cluster")
    assert [(p.name, p.tier) for p in cluster_partitions.partitions_for(site)] == [("urgent", 10), ("t4", 2)]
    sweep = compose(["cluster=slurm", "model=tiny", f"root={tmp_path}/runs", f"cache={tmp_path}/cache"])
    assert places(make_plan(replace(sweep, cluster=site))) == ["t4"]


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (ClusterConfig(kind="slurm", partitions={"b100": PartitionConfig()}), "no such partition; it has gpu"),
        (ClusterConfig(kind="slurm"), "cluster.partitions.gpu.memory_gib=24"),
    ],
)
def test_what_cannot_be_placed_says_what_to_set(cluster: ClusterConfig, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        choose_partitions(cluster, Inventory([live("gpu", {"mystery": 2})], None, None, None))


def test_slurm_that_does_not_answer_is_no_empty_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="does not answer"):
        cluster_partitions.partitions_for(ClusterConfig(kind="slurm"))


@pytest.mark.parametrize(
    ("name", "memory_gib"),
    [
        ("a100", 40.0), ("nvidia_a100_80gb_pcie", 80.0), ("a100-sxm4-80gb", 80.0), ("NVIDIA A100-PCIE-40GB", 40.0), ("a100_80", 80.0),
        ("a100_1g.10gb", 10.0), ("Tesla T4", 15.0), ("tesla_t4", 15.0), ("NVIDIA H200", 140.4), ("NVIDIA H100 80GB HBM3", 79.6),
        ("v100-32g", 32.0), ("tesla_v100-sxm2-16gb", 16.0), ("rtx_3090", 24.0), ("gtx1080ti", 11.0), ("quadro_rtx_6000", 24.0),
        ("nvidia_a2", 15.0), ("NVIDIA L20", 45.0), ("geforce_rtx_3080", 10.0), ("rtx3080ti", 12.0), ("rtx_4080", 16.0),
        ("NVIDIA RTX 6000 Ada Generation", 48.0), ("l40s", 45.0), ("l4", 22.5), ("NVIDIA A10", 22.5), ("rtxa4000", 16.0),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_any_usual_name(name: str, memory_gib: float) -> None:
    model = known_gpu(name)
    assert model is not None
    assert model.memory_gib == memory_gib


@pytest.mark.parametrize("name", ["gpu", "mystery", "", "mi250", "shard", "a2000", "cuda2"])
def test_other_gpus_are_not_guessed(name: str) -> None:
    assert known_gpu(name) is None


def test_the_larger_gpu_needs_more_tokens_to_be_full() -> None:
    t4, h200 = (Partition("p", gpu_device(name, 15.0)).full_tokens for name in ("t4", "h200"))
    assert 1000 <= t4 <= 2000
    assert 4000 <= h200 <= 5000


def test_a_job_on_several_gpus_takes_their_time_together_and_less_of_it(tmp_path: Path) -> None:
    words = (*LLAMA, "train.batch_size=64", "train.max_steps=1000")
    one, four = (plan(tmp_path, *words, f"cluster.gpus_per_job={gpus}").packs[0] for gpus in (1, 4))
    assert one.forecast.seconds / 4 < four.forecast.seconds < one.forecast.seconds / 3
    assert four.forecast.gpu_hours == pytest.approx(4 * four.forecast.seconds / 3600)
    # Of each: the base, and a share of the step.
    assert four.forecast.vram_gib <= one.forecast.vram_gib


def test_as_many_jobs_run_side_by_side_as_have_gpus(tmp_path: Path) -> None:
    words = ("train.seed=range(0,8)", "train.batch_size=64", *LLAMA)
    packs = {gpus: len(plan(tmp_path, *words, f"cluster.gpus_per_job={gpus}").packs) for gpus in (1, 2, 4)}
    # Four GPUs.
    assert packs == {1: 4, 2: 2, 4: 1}


def test_a_job_asks_for_no_more_gpus_than_a_node_has() -> None:
    nodes = {"small": replace(live("small", {"t4": 8}), per_node={"t4": 2}),
             "large": replace(live("large", {"a100": 8}), per_node={"a100": 4})}  # fmt: skip
    inventory = Inventory([*nodes.values()], None, None, None)
    assert [p.name for p in choose_partitions(ClusterConfig(kind="slurm", gpus_per_job=4), inventory)] == ["large"]
    with pytest.raises(BadInput, match=r"no node of small, large has more than 4 GPUs .* at most 4"):
        choose_partitions(ClusterConfig(kind="slurm", gpus_per_job=8), inventory)
    unknown = ClusterConfig(kind="slurm", gpus_per_job=8, partitions={"t4": T4})
    # There are no more in all.
    with pytest.raises(BadInput, match="no node of t4 has more than 4"):
        choose_partitions(unknown, None)
