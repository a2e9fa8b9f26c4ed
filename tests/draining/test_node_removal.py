"""A node goes from a cluster of two under load: `serve-app drain` first, then the node's processes are killed."""

import ray
from ray.cluster_utils import Cluster

from serve_app.drain import _residents, empty
from tests.draining.conftest import replicas
from tests.rollout.conftest import Load, variant
from tests.system.conftest import System, wait_for


def test_no_call_is_lost_when_a_node_is_drained_and_goes(
    cluster: Cluster, system: System, holder: ray.actor.ActorHandle
) -> None:
    # The scorers may go to any node.
    ray.kill(holder)
    nodes = {node.node_id: node for node in cluster.worker_nodes}
    # The node of the scorers, which take calls all the while; after a loss, of everything.
    (leaving,) = (node for node in nodes if any(variant("stable") in name for name in replicas(node)))
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
    assert any(variant("stable") in name for name in replicas(staying))
