"""Draining a node whose head is away; tests/draining drains one of a running cluster."""

import re
import socket
import threading
import time

import pytest

from serve_app.drain import DrainError, _reachable, drain
from tests.ports import free_port


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
