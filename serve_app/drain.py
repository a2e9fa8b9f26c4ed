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


class _Alone(Exception):
    """Nobody who could take over has answered for `_ALONE_S`."""


def drain(limit_s: float, port: int) -> None:
    """Empties this machine's node within `limit_s`. Nobody can take over where the cluster's head is away, or goes
    and stays away: then it waits until nobody is connected to `port` any more, or all deadlines are over. Raises
    DrainError."""
    deadlines_end_at = time.monotonic() + min(limit_s, _ALONE_S)
    address = os.environ.get("RAY_ADDRESS", "")
    failure = None
    if _reachable(address):
        # Ray ends a process that has not reached the head for a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(int(limit_s) + 60))
        import ray

        try:
            ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
            empty(ray.get_runtime_context().get_node_id(), limit_s, lambda: _reachable(address))
            return
        except _Alone:
            pass
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            failure = DrainError(f"Ray at {address} can't be asked: {error}")
    while _has_clients(port) and time.monotonic() < deadlines_end_at:
        time.sleep(_EVERY_S)
    if failure is not None:
        raise failure


def empty(node_id: str, limit_s: float, is_there: Callable[[], bool] = lambda: True) -> None:
    """Has Serve move everything off the node. Needs a connection to Ray; `is_there` says whether the head answers.
    Raises DrainError, and _Alone where nobody answers for longer than calls may take."""
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
    heard_at = time.monotonic()
    give_up_at = heard_at + limit_s
    was_empty = False
    while True:
        residents = _residents(node_id) if is_there() else None
        now = time.monotonic()
        if residents is not None:
            heard_at = now
        elif now - heard_at >= _ALONE_S:
            raise _Alone
        # Twice in a row: a head that is just going has no Serve, and a controller that has just come no proxies.
        if residents == [] and was_empty:
            return
        # One that is empty by then is asked once more.
        if now >= give_up_at and residents != []:
            there = ", ".join(residents or ["what Serve's controller, which doesn't answer, would name"])
            raise DrainError(f"after {limit_s:g} s there still are {there}")
        was_empty = residents == []
        time.sleep(_EVERY_S)


def _residents(node_id: str) -> list[str] | None:
    """Serve's replicas and proxy on the node; none where Serve doesn't run. None: nobody knows just now."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return []
    # It comes back, with the head or on a new one.
    except ray.exceptions.RayError:
        return None
    try:
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=_ANSWER_LIMIT_S)
    except ray.exceptions.RayError:
        return None
    replicas = [
        replica
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    ]
    found = [replica["replica_id"] for replica in replicas if replica.get("node_id") == node_id]
    found += ["the proxy"] if node_id in details["proxies"] else []
    # A controller that has just come back doesn't know yet where these run.
    is_recovering = any(replica["state"] == "RECOVERING" for replica in replicas)
    return None if is_recovering and not found else found


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
