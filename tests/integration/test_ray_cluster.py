"""A Ray cluster of two nodes, joined by its address: the same bits, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.bench.ray_nodes import RayNodes, ray_nodes
from orchestrator.compute import ComputeClient, ComputeConfig, Limits, cluster, errors
from orchestrator.config import DaemonConfig
from orchestrator.rounds import reduce as reduce_module
from orchestrator.store import Store
from orchestrator.store.bucket import Bucket
from tests.integration.conftest import START_S
from tests.integration.test_reducers_on_ray import two_rounds
from tests.support.object_store import ObjectStore
from tests.support.proxy import Proxy
from tests.support.workbench import Workbench

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def config(compute_config: ComputeConfig, nodes: RayNodes) -> ComputeConfig:
    return replace(
        compute_config,
        address=nodes.address,
        token_file=nodes.token_file,
        private_networks=nodes.networks,
    )


@pytest.fixture(scope="module")
def joined(config: ComputeConfig) -> Iterator[ComputeClient]:
    with ComputeClient(config) as client:
        yield client


def test_two_nodes_give_the_digests_of_one_process(
    joined: ComputeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = joined.wait_ready(2 * START_S)
    assert len(facts["nodes"]) == 2
    assert facts["num_cpus"] == 2
    bench = Workbench(tmp_path)
    try:
        expected = two_rounds(bench)
        bench.engine.compute, bench.engine.workers = joined, facts["num_cpus"]
        monkeypatch.setattr(reduce_module, "RUN_BYTES", 1)
        assert two_rounds(bench) == expected
    finally:
        bench.close()


def test_the_nodes_read_a_bucket_themselves(
    joined: ComputeClient,
    tmp_path: Path,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = joined.wait_ready(2 * START_S)
    results = []
    with Proxy(object_store.address) as line:
        section = object_store.section("cluster", line.address)
        config = DaemonConfig.model_validate({"store": section})
        for number, compute in enumerate((None, joined)):
            bench = Workbench(tmp_path / str(number), compute)
            if compute is not None:
                monkeypatch.setattr(reduce_module, "RUN_BYTES", 1)
                bench.engine.workers = facts["num_cpus"]
                bucket = Bucket(config.store, bench.home.store, direct=True)
                bench.engine.store = bench.store = Store(bench.home.store, bucket)
            try:
                results.append(two_rounds(bench))
            finally:
                bench.close()
        assert line.down.nbytes > 1 << 20, "the bytes came over the line"
    assert results[0] == results[1]


def test_tasks_are_spread_over_the_nodes(joined: ComputeClient, nodes: RayNodes) -> None:
    joined.wait_ready(2 * START_S)
    found = joined.map("where_am_i", [{}] * 8, START_S)
    homes = set()
    for number, head in enumerate(nodes.heads):
        below = {p.pid for p in head.children(recursive=True)}
        homes |= {number for answer in found if answer["pid"] in below}
    assert homes == {0, 1}


def test_a_plugin_runs_at_the_orchestrator_closed_off(joined: ComputeClient, keys: Path) -> None:
    facts = joined.wait_ready(2 * START_S)
    if facts["level"] != "mounts":
        pytest.skip("this host grants no namespaces")
    limits = Limits(seconds=60, memory_bytes=256 << 20)
    assert joined.isolated("where_am_i", {}, limits)["interfaces"] == ["lo"]
    assert joined.isolated("lists", {"path": str(keys)}, limits) == {"names": []}


def test_a_cluster_on_networks_that_nobody_named_is_refused(config: ComputeConfig) -> None:
    with ComputeClient(replace(config, private_networks=("198.51.100.0/24",))) as client:
        with pytest.raises(errors.ComputeExposed, match="It was not used") as caught:
            client.wait_ready(2 * START_S)
        assert config.address.rpartition(":")[2] in str(caught.value.facts["where"])


def test_a_missing_token_is_named(config: ComputeConfig, tmp_path: Path) -> None:
    missing = str(tmp_path / "token")
    refused = pytest.raises(errors.ComputeNotReady, match=r"token_file .*token can't be read")
    with ComputeClient(replace(config, token_file=missing)) as client, refused:
        client.wait_ready(2 * START_S)


def test_a_node_that_is_unlike_the_orchestrator_is_named() -> None:
    own = {"unseen": [], "versions": {"torch": "2.13", "processor": "AVX2"}}
    cluster._require_same("192.0.2.7", own, own)
    for answer, match in (
        ({**own, "unseen": ["/srv/home/store"]}, r"192\.0\.2\.7 does not see /srv/home/store"),
        (
            {**own, "versions": {"torch": "2.12", "processor": "AVX2"}},
            r"torch 2\.12 where .* 2\.13",
        ),
        ({**own, "versions": {"torch": "2.13", "processor": "SSE"}}, "processor SSE where"),
    ):
        with pytest.raises(errors.ComputeNotReady, match=match):
            cluster._require_same("192.0.2.7", own, answer)
