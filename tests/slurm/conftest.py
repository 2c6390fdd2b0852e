"""A real Slurm for the tests that ask for `cluster`. Without Slurm they are skipped, and on CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeps import PAIR, SEEDS, Lab

from real_cluster import Cluster, NoCluster, cluster_folder

CLUSTER_TEST_SECONDS = 600
# They take about as long as the others.
ONE_HALF = {"test_preemption", "test_box"}


# Before pytest-xdist looks at the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers of pytest-xdist (``--dist loadgroup``) have a cluster each, whose settings their tests change.

    They go first: they wait most of the time, and the other tests fill the gaps.
    """
    for item in items:
        if _on_cluster(item):
            item.add_marker(pytest.mark.slurm)
            half = "one" if item.path.stem in ONE_HALF else "other"
            item.add_marker(pytest.mark.xdist_group(f"slurm: {half} half"))
            item.add_marker(pytest.mark.timeout(CLUSTER_TEST_SECONDS))
    items.sort(key=lambda item: not _on_cluster(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest 9.2 hides the groups from pytest-xdist 3.8, and then every worker would start a cluster without a word."""
    parted = hasattr(session.config, "workerinput")
    if parted and any(_on_cluster(item) and "@slurm" not in item.nodeid for item in session.items):
        raise pytest.UsageError("the tests on Slurm are not kept together; run them with --dist loadgroup")


def _on_cluster(item: pytest.Item) -> bool:
    return "running_cluster" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """The cluster of this process. Use `cluster`."""
    folder = cluster_folder()
    try:
        cluster = Cluster(folder)
    except NoCluster as problem:
        shutil.rmtree(folder.path)
        _unavailable(str(problem))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Cluster:
    """The running cluster with its usual settings and an empty queue, whatever the test before did to it."""
    running_cluster.reset()
    return running_cluster


@pytest.fixture(scope="session")
def project(running_cluster: Cluster) -> Path:
    """The ordinary user's copy of the project, with a cache that all sweeps share."""
    return running_cluster.project("project")


@pytest.fixture
def lab(cluster: Cluster, project: Path) -> Lab:
    """Sweeps of the ordinary user on the running cluster."""
    return Lab(cluster, project)


@pytest.fixture
def pair(lab: Lab) -> dict[str, bytes]:
    """The journals of `sweeps.PAIR` if nobody disturbs them."""
    return lab.undisturbed("undisturbed", *PAIR)


@pytest.fixture
def seeds(lab: Lab) -> dict[str, bytes]:
    """The journals of `sweeps.SEEDS` if nobody disturbs them."""
    return lab.undisturbed("undisturbed-seeds", *SEEDS, "cluster.max_parallel=2")


def _unavailable(reason: str) -> None:
    """Skip with the reason; where CI is set nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"CI has to run the tests on a real Slurm: {reason}")
    pytest.skip(f"NOT TESTED ON SLURM: {reason}")
