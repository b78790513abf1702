"""Hosts for the tests of the launcher: started once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launched_job import RUNNERS, Way, way_by_ssh, why_no_runner
from servers import Servers, why_not
from slurm_cluster import Cluster, why_no_slurm


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Three ssh servers."""
    if why := why_not():
        pytest.skip(why)
    with Servers(tmp_path_factory.mktemp("servers"), 3) as started:
        yield started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of two nodes."""
    if why := why_no_slurm():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as started:
        yield started


@pytest.fixture(scope="session")
def by_slurm(cluster: Cluster) -> Way:
    """Two nodes with two slots each, in an order that is not Slurm's."""
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text("worker-2 slots=2\nworker-1 slots=2\n")
    return Way("slurm", hostfile, "srun", "slurmstepd", "", cluster.environment)


@pytest.fixture(scope="session", params=RUNNERS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """Each runner, with two hosts of two slots; for a test that asks for it, `here`: this machine with four."""
    name: str = request.param
    if name == "here":
        hostfile = tmp_path_factory.mktemp(name) / "hostfile"
        hostfile.write_text("localhost slots=4\n")
        return Way(name, hostfile, "", "")
    if why := why_no_runner(name):
        pytest.skip(why)
    if name == "slurm":
        found = request.getfixturevalue("by_slurm")
        assert isinstance(found, Way)
        return found
    servers: Servers = request.getfixturevalue("servers")
    return way_by_ssh(name, tmp_path_factory.mktemp(name), servers.hostfile(2), servers.config)
