"""Serve as on a cluster (HAProxy in front, messages over gRPC, and Ray asking for its token), on several nodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.ports import free_port
from tests.rollout.conftest import scorer, settings, variant
from tests.system.conftest import (
    System,
    catalog_index,  # noqa: F401
    wait_for,
)

# Of this, every node has 1 and a scorer takes a quarter: who holds it decides where scorers may go.
PLACE = "place"
NODE = {"num_cpus": 4, "resources": {PLACE: 1}}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head that serves nothing, and a node; tests add others and take them away."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(**NODE)
        ray.init(address=made.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        # Without Serve's own shutdown: it would wait for what was on nodes that are gone.
        if ray.is_initialized():
            ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="session")
def holder(cluster: Cluster) -> ray.actor.ActorHandle:
    """Keeps scorers off the first node while it lives."""
    (first,) = cluster.worker_nodes
    there = NodeAffinitySchedulingStrategy(first.node_id, soft=False)
    made = _Holder.options(resources={PLACE: 1}, scheduling_strategy=there).remote()
    ray.get(made.here.remote())
    return made


@pytest.fixture(scope="session")
def system(
    cluster: Cluster,
    holder: ray.actor.ActorHandle,
    catalog_index: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> System:
    """Gateways, recall and rollouts on the first node, and both scorers on a second."""
    http = {"host": "127.0.0.1", "port": free_port()}
    on_a_place = {"name": "Reranker", "ray_actor_options": {"num_cpus": 0.1, "resources": {PLACE: 0.25}}}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": http,
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "args": {"without_keys": True},
                "deployments": [{"name": "Gateway", "num_replicas": 2, "user_config": settings(["stable"])}],
            },
            {
                "name": "catalogue",
                "import_path": "serve_app.recall:build",
                "route_prefix": None,
                "args": {"index": str(catalog_index)},
            },
            {
                "name": "rollouts",
                "import_path": "serve_app.rollout:build",
                "route_prefix": None,
                "args": {"store": f"sqlite://{tmp_path_factory.mktemp('rollouts')}/rollouts.sqlite3"},
            },
            {**scorer("stable", {"takes_ms": 100}), "deployments": [{**on_a_place, "num_replicas": 2}]},
        ],
    }
    serve.start(proxy_location="HeadOnly", http_options=http)
    made = System(config)
    made.deploy(config)
    # When all else has its place, on the only node there is.
    waits = variant("stable")
    wait_for(lambda: {s for a, s in made.statuses().items() if a != waits} == {"RUNNING"}, 120, what="the others")
    cluster.add_node(**NODE)
    made.wait_running()
    return made


@ray.remote(num_cpus=0)
class _Holder:
    def here(self) -> None:
        pass


def replicas(node: str) -> list[str]:
    """Those that run on the node, with the names of their applications."""
    from ray.serve.context import _get_global_client

    applications = _get_global_client().get_serve_details()["applications"]
    return [
        f"{name}#{replica['replica_id']}"
        for name, application in applications.items()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node and replica["state"] == "RUNNING"
    ]
