"""A node goes from a cluster of two under load: `serve-app drain` first, then the node's processes are killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from serve_app.drain import _residents, empty
from tests.rollout.conftest import Load, scorer, settings, variant
from tests.system.conftest import (
    System,
    catalog_index,  # noqa: F401
    free_port,
    wait_for,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            made.add_node(num_cpus=4)
        ray.init(address=made.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        # Without Serve's own shutdown: it would wait for what was on the node that is gone.
        if ray.is_initialized():
            ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def system(cluster: Cluster, catalog_index: Path) -> System:  # noqa: F811
    http = {"host": "127.0.0.1", "port": free_port()}
    gateway = {**settings(["stable"]), "rollout": None}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": http,
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "args": {"without_keys": True},
                "deployments": [{"name": "Gateway", "num_replicas": 2, "user_config": gateway}],
            },
            {
                "name": "catalogue",
                "import_path": "serve_app.recall:build",
                "route_prefix": None,
                "args": {"index": str(catalog_index)},
            },
            scorer("stable", {"takes_ms": 100}),
        ],
    }
    serve.start(proxy_location="HeadOnly", http_options=http)
    made = System(config)
    made.deploy(config)
    made.wait_running()
    return made


def test_no_call_is_lost_when_a_node_is_drained_and_goes(cluster: Cluster, system: System) -> None:
    nodes = {node.node_id: node for node in cluster.worker_nodes}
    # The node of the only scorer, which takes calls all the while.
    (leaving,) = (node for node in nodes if any(variant("stable") in name for name in _replicas(node)))
    assert _residents(leaving)
    with Load(system.url, rate=30) as load:
        wait_for(lambda: len(load.calls) > 60, 60, what="calls before")
        empty(leaving, 120)
        assert not _residents(leaving)
        cluster.remove_node(nodes[leaving], allow_graceful=False)
        gone_at = len(load.calls)
        wait_for(lambda: len(load.calls) > gone_at + 150, 60, what="calls after")
    load.check_no_client_paid()
    (staying,) = nodes.keys() - {leaving}
    assert any(variant("stable") in name for name in _replicas(staying))


def _replicas(node: str) -> list[str]:
    """With the names of their applications."""
    from ray.serve.context import _get_global_client

    applications = _get_global_client().get_serve_details()["applications"]
    return [
        f"{name}#{replica['replica_id']}"
        for name, application in applications.items()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica["node_id"] == node
    ]
