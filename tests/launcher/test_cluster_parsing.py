"""What Slurm prints, as a real Slurm 22.05 printed it and as its manual says others do, against the facts read from it."""

from dataclasses import replace

import pytest

from launcher.cluster.inventory import Inventory
from launcher.cluster.parsing import (
    Access,
    LivePartition,
    parse_associations,
    parse_config,
    parse_gres,
    parse_minutes,
    parse_partition_fields,
    parse_qos,
    parse_sinfo,
    with_details,
)

CONFIG = """Configuration data as of 2026-11-24T23:56:02
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = box20010
JobRequeue              = 1
KillWait                = 5 sec
MaxArraySize            = 501
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 22.05.8
SlurmctldParameters     = (null)
"""
SINFO = """t4*|up|1-00:00:00|2|idle|gpu:t4:2|(null)
a100|up|infinite|1|mixed|gpu:a100:4(S:0-1)|a100,nvlink
a100|up|infinite|3|drained|gpu:a100:4(S:0-1)|a100,nvlink
a100|up|infinite|1|allocated*|gpu:a100:4(S:0-1)|a100,nvlink
cpu|down|30:00|9|idle|(null)|(null)
"""
DETAILS = (
    "PartitionName=t4 AllowGroups=lab,staff AllowAccounts=ALL DenyAccounts=guests GraceTime=10 MaxTime=1-00:00:00 "
    "PriorityTier=1 RootOnly=NO PreemptMode=REQUEUE State=UP\n"
    "PartitionName=urgent AllowGroups=ALL AllowAccounts=ALL GraceTime=0 MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF State=UP\n"
)


def test_settings_of_a_real_cluster() -> None:
    settings = parse_config(CONFIG)
    assert (settings.version, settings.cluster, settings.requeue, settings.kill_wait) == (
        "22.05.8",
        "box20010",
        True,
        5,
    )
    assert (settings.preempt_type, settings.preempt_mode) == ("partition_prio", "REQUEUE")
    assert (settings.max_array_size, settings.accounting, settings.user_signal) == (501, True, False)


@pytest.mark.parametrize("key", ["SlurmctldParameters", "PreemptParameters"])
def test_the_users_signal_is_found_where_either_version_has_it(key: str) -> None:
    text = CONFIG.replace("SlurmctldParameters     = (null)", f"{key} = enable_configless,preempt_send_user_signal")
    assert parse_config(text).user_signal


def test_what_a_cluster_does_not_say_is_slurms_default() -> None:
    settings = parse_config("")
    assert (settings.requeue, settings.preempt_type, settings.kill_wait) == (True, "none", 30)
    assert (settings.max_array_size, settings.accounting) == (1001, False)


def test_gpus_are_counted_on_nodes_that_work() -> None:
    t4, a100, cpu = parse_sinfo(SINFO)
    assert (t4.name, t4.default, t4.max_minutes, t4.gpus) == ("t4", True, 1440, {"t4": 4})
    assert (a100.default, a100.max_minutes, a100.gpus) == (False, None, {"a100": 4})
    assert a100.features == {"a100", "nvlink"}
    assert (cpu.up, cpu.max_minutes, cpu.gpus) == (False, 30, {})
    assert (t4.per_node, a100.per_node, cpu.per_node) == ({"t4": 2}, {"a100": 4}, {})


def test_details_complete_a_partition() -> None:
    details = parse_partition_fields(DETAILS)
    t4 = with_details(parse_sinfo(SINFO)[0], details["t4"])
    assert (t4.tier, t4.grace, t4.preempt_mode) == (1, 10, "REQUEUE")
    assert t4.access == Access(frozenset({"lab", "staff"}), None, frozenset({"guests"}), root_only=False)
    urgent = with_details(replace(t4, name="urgent"), details["urgent"])
    assert (urgent.tier, urgent.max_minutes, urgent.access) == (10, None, Access())


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:2", {"": 2}),
        ("gpu:tesla_v100:2(S:0,2),lscratch:1", {"tesla_v100": 2}),
        ("gpu:a100_1g.10gb:7,gpu:a100:1", {"a100_1g.10gb": 7, "a100": 1}),
        ("(null)", {}),
        ("lscratch:900,shard:8", {}),
    ],
)
def test_gres_of_a_node(text: str, gpus: dict[str, int]) -> None:
    assert parse_gres(text) == gpus


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30), ("30:00", 30), ("1:30:00", 90), ("2-00:00:00", 2880), ("1-12", 2160), ("1-12:30", 2190),
        ("infinite", None), ("UNLIMITED", None), ("n/a", None),
    ],
)  # fmt: skip
def test_time_limits(text: str, minutes: int | None) -> None:
    assert parse_minutes(text) == minutes


def test_limits_of_a_user() -> None:
    (lab, guests) = parse_associations("lab|normal,long||5\nguests|normal|2|\n")
    assert (lab.account, lab.qos, lab.max_jobs, lab.max_submit) == ("lab", ("normal", "long"), None, 5)
    assert (guests.max_jobs, guests.max_submit) == (2, None)


def test_a_quality_of_service() -> None:
    (normal, high) = parse_qos("normal|00:00:00||\nhigh|00:01:30|normal,low|20\n")
    assert (normal.grace, normal.preempts) == (0, ())
    assert (high.grace, high.preempts, high.max_submit_per_user) == (90, ("normal", "low"), 20)


@pytest.mark.parametrize(
    ("access", "is_open"),
    [
        (Access(), True),
        (Access(root_only=False, groups=frozenset({"no-such-group"})), False),
        (Access(accounts=frozenset({"lab"})), True),
        (Access(accounts=frozenset({"others"})), False),
        (Access(denied_accounts=frozenset({"lab"})), False),
    ],
)
def test_a_partition_lets_in_whom_its_lists_name(access: Access, is_open: bool) -> None:
    partition = LivePartition("gpu", True, True, None, {"a100": 1}, frozenset(), access=access)
    inventory = Inventory([partition], None, parse_associations("lab|normal||\n"), None)
    assert bool(inventory.open_partitions()) == is_open
