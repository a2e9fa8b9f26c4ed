"""`serve-app drain`: empties this machine's Ray node before it goes, so that no call goes with it.

Serve starts replicas elsewhere first, then lets those here finish what they have, and takes the proxy out last.
"""

import os
import re
import socket
import time
from collections.abc import Callable

import psutil

# What calls under way may still take where nobody can be asked to take over: the longest deadline, and some.
_ALONE_S = 65.0
_EVERY_S = 1.0
_ANSWER_LIMIT_S = 10.0
_HEAD = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(%\w+)?\]):(?P<port>[0-9]{1,5})")


class DrainError(Exception):
    """Why the node isn't empty, in one line."""


def drain(limit_s: float, port: int) -> None:
    """Empties this machine's node within `limit_s`. When the cluster's head is away, nobody can take over: then it
    waits until nobody is connected to `port` any more, or all deadlines are over. Raises DrainError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not _reachable(address):
        _wait(lambda: not _has_clients(port), min(limit_s, _ALONE_S))
        return
    import ray

    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    empty(ray.get_runtime_context().get_node_id(), limit_s)


def empty(node_id: str, limit_s: float) -> None:
    """Has Serve move everything off the node. Needs a connection to Ray. Raises DrainError."""
    import ray
    from ray.core.generated import autoscaler_pb2

    # What `ray drain-node` does, which is hidden and would start a process of its own.
    gcs = ray._private.worker.global_worker.gcs_client
    accepted, reason = gcs.drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
        "serve-app drain",
        int((time.time() + limit_s) * 1000),
    )
    if not accepted:
        raise DrainError(f"Ray doesn't drain node {node_id}: {reason}")
    if not _wait(lambda: not _residents(node_id), limit_s):
        raise DrainError(f"after {limit_s:g} s there still are {', '.join(_residents(node_id))}")


def _residents(node_id: str) -> list[str]:
    """Serve's replicas and proxy on the node; none where Serve doesn't run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return []
    try:
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=_ANSWER_LIMIT_S)
    except ray.exceptions.RayError:
        # It comes back, with the head or on a new one.
        return ["what Serve's controller, which doesn't answer, would name"]
    found = [
        replica["replica_id"]
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node_id
    ]
    return [*found, *(["the proxy"] if node_id in details["proxies"] else [])]


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    give_up_at = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(_EVERY_S)
    return True


def _reachable(address: str) -> bool:
    """Ray itself would wait for minutes for a head that is gone."""
    named = _HEAD.fullmatch(address)
    port = int(named["port"]) if named else 0
    if named is None or not 0 < port < 65536:
        # What is no address reaches nobody either, and calls would go with the node.
        raise DrainError(f"RAY_ADDRESS is {address!r}; allowed: the head's HOST:PORT, or [IPV6]:PORT")
    try:
        socket.create_connection((named["host"].strip("[]"), port), timeout=5).close()
    except OSError:
        return False
    return True


def _has_clients(port: int) -> bool:
    connections = psutil.net_connections("tcp")
    return any(c.status == psutil.CONN_ESTABLISHED and c.laddr and c.laddr[1] == port for c in connections)
