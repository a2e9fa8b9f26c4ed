"""A node goes without a word: its raylet is killed, and with it go the replicas that it has."""

import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.draining.conftest import NODE, replicas
from tests.rollout.conftest import TIMEOUT_MS, Call, Load, variant
from tests.system.conftest import System, wait_for


@pytest.mark.parametrize("lost", ["raylet", "machine"])
def test_calls_are_answered_in_time_while_the_rerankers_node_dies(
    cluster: Cluster, system: System, holder: ray.actor.ActorHandle, lost: str
) -> None:
    (dying,) = (node for node in cluster.worker_nodes if scorers(node.node_id))
    assert scorers(dying.node_id) == 2
    assert not any(name.startswith("gateway") for name in replicas(dying.node_id))
    raylet = psutil.Process(dying.all_processes["raylet"][0].process.pid)
    if lost == "raylet":
        cluster.add_node(**NODE)
    else:
        # There is room beside the gateways.
        ray.kill(holder)
    with Load(system.url, rate=10) as load:
        wait_for(lambda: len(load.calls) > 30, 60, what="calls before")
        processes = [raylet, *(raylet.children(recursive=True) if lost == "machine" else ())]
        for process in processes:
            process.kill()
        killed_at = time.time()
        others = [node.node_id for node in cluster.worker_nodes if node is not dying]
        wait_for(lambda: sum(map(scorers, others)) == 2, 120, 0.2, "scorers on another node")
        placed_s = time.time() - killed_at
        back = len(load.calls)
        wait_for(lambda: len(load.calls) > back + 50, 60, what="calls after")
    cluster.remove_node(dying, allow_graceful=False)
    if lost == "machine":
        cluster.add_node(**NODE)

    degraded = [call for call in load.calls if call.status == 200 and "degraded" in call.meta]
    recovered_s = max((call.ended for call in degraded), default=killed_at) - killed_at
    print(
        f"\n{lost} lost: {len(load.calls)} calls, {len(degraded)} of them degraded: "
        f"{ {why(call) for call in degraded} }; "
        f"the slowest took {max(call.took_s for call in load.calls):.2f} s of {TIMEOUT_MS / 1e3:g}; "
        f"replicas back after {placed_s:.1f} s, whole answers after {recovered_s:.1f} s"
    )
    assert not load.errors, load.errors[:3]
    failed = [(call.status, call.body) for call in load.calls if call.status != 200]
    assert not failed, failed[:3]
    # The deadline is the gateway's; what a busy machine adds is not judged here, a client left waiting is.
    late = [call.took_s for call in load.calls if call.took_s > 2 * TIMEOUT_MS / 1e3]
    assert not late, late
    # Who went without a stage is told which, and why.
    assert {why(call) for call in degraded} <= {(variant("stable"), "timeout"), (variant("stable"), "unavailable")}
    assert all("degraded" not in call.meta for call in load.calls[-30:])


def scorers(node: str) -> int:
    return sum(name.startswith(variant("stable")) for name in replicas(node))


def why(call: Call) -> tuple[str, str]:
    (found,) = call.meta["degraded"]
    return found["stage"], found["reason"]
