"""Draining a node whose head is away, or goes meanwhile; tests/draining drains one of a running cluster."""

import os
import re
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from serve_app import drain as draining
from serve_app.drain import DrainError, _Alone, _reachable, _residents, drain, empty
from tests.ports import free_port

RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


def test_without_a_head_it_waits_for_the_last_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        draining = threading.Thread(target=drain, args=(60, port))
        draining.start()
        draining.join(2)
        assert draining.is_alive()
        client.close()
        accepted.close()
        draining.join(10)
        assert not draining.is_alive()


def test_without_a_head_it_waits_no_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        began = time.monotonic()
        drain(2, server.getsockname()[1])
        assert 2 <= time.monotonic() - began < 10
        client.close()


def test_the_head_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DrainError, match="RAY_ADDRESS is ''; allowed: the head's HOST:PORT"):
        drain(1, 8000)


@pytest.mark.parametrize(
    "address",
    [
        "auto",
        "head",
        "ray://head:10001",
        "head:abc",
        "head:",
        ":6379",
        "head:0",
        "head:65536",
        "::1:6379",
        "[::1]",
    ],
)
def test_what_is_no_address_is_no_head_that_is_away(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(DrainError, match=rf"RAY_ADDRESS is '{re.escape(address)}'; allowed: the head's HOST:PORT"):
        drain(1, free_port())


def test_a_head_on_ipv6_is_found() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        assert _reachable(f"[::1]:{server.getsockname()[1]}")


# ---- while the head goes


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(draining, "time", made)
    gcs = SimpleNamespace(drain_node=lambda *asked: (True, ""))
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=gcs))
    return made


def answers(monkeypatch: pytest.MonkeyPatch, *given: list[str] | None) -> list[list[str] | None]:
    """Of Serve, one after the other; the last stays. Those that are left."""
    left = list(given)
    monkeypatch.setattr(draining, "_residents", lambda node: left.pop(0) if left[1:] else left[0])
    return left


@pytest.mark.parametrize(
    "given",
    [
        [["a"], ["a"], [], []],
        # The head comes back.
        [["a"], None, None, ["a"], [], []],
        # It is lost in the middle, which looks empty once.
        [["a"], [], None, None, ["a"], [], None, [], []],
    ],
)
def test_a_node_is_empty_when_serve_says_so_twice(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, given: list[list[str] | None]
) -> None:
    left = answers(monkeypatch, *given, ["more"])
    empty("node", 480)
    assert left == [["more"]]


def test_what_a_head_that_is_away_says_counts_for_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    answers(monkeypatch, [])
    there = [True, False, True, False, True, True]
    empty("node", 480, lambda: there.pop(0))
    assert not there


def test_where_nobody_answers_any_more_it_waits_no_longer_than_calls_may_take(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    answers(monkeypatch, ["a"], None)
    began = clock.now
    with pytest.raises(_Alone):
        empty("node", 480)
    assert 60 < clock.now - began < 70


@pytest.mark.parametrize(
    ("last", "named"),
    [(["a", "the proxy"], "a, the proxy"), (None, "what Serve's controller, which doesn't answer")],
)
def test_a_node_that_stays_full_is_an_error(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, last: list[str] | None, named: str
) -> None:
    answers(monkeypatch, last)
    with pytest.raises(DrainError, match=f"after 30 s there still are {named}"):
        empty("node", 30)


def test_a_node_that_becomes_empty_at_the_end_is_asked_once_more(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    answers(monkeypatch, *[["a"]] * 5, [])
    empty("node", 5)


def serve(monkeypatch: pytest.MonkeyPatch, details: Any) -> None:
    """What Serve's controller answers, or what is raised."""
    asked = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr("ray.get_actor", lambda *name, **where: asked)

    def get(reference: object, timeout: float) -> Any:
        if isinstance(details, Exception):
            raise details
        return details

    monkeypatch.setattr("ray.get", get)


def replica(state: str, **known: str) -> dict[str, Any]:
    replicas = [{"replica_id": "a", "state": state, **known}]
    return {"x": {"deployments": {"d": {"replicas": replicas}}}}


@pytest.mark.parametrize(
    ("applications", "proxies", "found"),
    [
        ({}, {}, []),
        (replica("RUNNING", node_id="node"), {"node": {}}, ["a", "the proxy"]),
        (replica("RUNNING", node_id="other"), {"node": {}}, ["the proxy"]),
        (replica("STOPPING", node_id="node"), {}, ["a"]),
        (replica("STARTING"), {"other": {}}, []),
        # Of a controller that has just come back.
        (replica("RECOVERING"), {}, None),
        (replica("RECOVERING"), {"node": {}}, ["the proxy"]),
    ],
)
def test_residents_are_what_serve_has_on_the_node(
    monkeypatch: pytest.MonkeyPatch, applications: Any, proxies: Any, found: list[str] | None
) -> None:
    serve(monkeypatch, {"applications": applications, "proxies": proxies})
    assert _residents("node") == found


def test_a_controller_that_does_not_answer_leaves_open_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ray.exceptions.GetTimeoutError())
    assert _residents("node") is None

    def away(*name: str, **where: str) -> None:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr("ray.get_actor", away)
    assert _residents("node") is None


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address; it answers, and nothing behind it."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(draining, "_reachable", lambda address: True)
    monkeypatch.setattr("ray.init", lambda **settings: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    # Put back in the end, whatever drain() makes of it.
    monkeypatch.setenv(RECONNECT, "")
    monkeypatch.delenv(RECONNECT)
    return address


def clients(monkeypatch: pytest.MonkeyPatch, *connected: bool) -> list[bool]:
    left = list(connected)
    monkeypatch.setattr(draining, "_has_clients", lambda port: left.pop(0))
    return left


def test_a_head_that_goes_is_waited_for_and_costs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, head: str
) -> None:
    answers(monkeypatch, ["a"], None)
    left = clients(monkeypatch, True)
    drain(480, 8000)
    # What was under way is over.
    assert not left
    # Ray would have ended the process after a minute.
    assert float(os.environ[RECONNECT]) > 480


@pytest.mark.parametrize("where", ["ray.init", "ray.get_runtime_context"])
def test_where_ray_cannot_be_asked_the_last_client_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, head: str, where: str
) -> None:
    def fail(**settings: object) -> None:
        raise ConnectionError("the head went")

    monkeypatch.setattr(where, fail)
    left = clients(monkeypatch, True, True, False)
    with pytest.raises(DrainError, match=f"^Ray at {head} can't be asked: the head went$"):
        drain(480, 8000)
    assert not left


def test_a_drain_that_fails_on_the_way_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, head: str
) -> None:
    def fail(*asked: object) -> None:
        raise ray.exceptions.RpcError("UNAVAILABLE")

    gcs = SimpleNamespace(drain_node=fail)
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=gcs))
    clients(monkeypatch, False)
    with pytest.raises(DrainError, match="can't be asked"):
        drain(480, 8000)
