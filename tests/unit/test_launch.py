"""`serve-app up` around Ray: what it sets for HAProxy, what stops it, and how it watches Ray's own processes."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.serve._private import constants

from serve_app import launch
from serve_app.launch import LaunchError


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the signals' handlers back."""
    before = {name: signal.getsignal(name) for name in launch._STOP_SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_and_a_second_one_does_not_stop_the_cleanup(
    handlers: None, monkeypatch: pytest.MonkeyPatch, name: signal.Signals
) -> None:
    monkeypatch.setattr(launch, "_descendants", list)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    launch._raise_stop_on_signals()
    with pytest.raises(launch._Stop):
        signal.raise_signal(name)
    launch._stop()
    assert signal.getsignal(name) == signal.SIG_IGN


def test_serve_has_longer_to_stop_than_any_call_may_take(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_descendants", list)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    ended: list[object] = []
    client = SimpleNamespace(shutdown=ended.append)
    monkeypatch.setattr("ray.serve.context._check_cached_client_alive", lambda: (client, True))
    monkeypatch.setattr("ray.shutdown", lambda: ended.append("ray"))
    launch._stop()
    limit_s, then = ended
    # graceful_shutdown_timeout_s of gateway, recall and rerankers.
    assert isinstance(limit_s, int)
    assert limit_s > 65
    assert then == "ray"


def test_under_nohup_the_end_of_the_terminal_stops_nothing(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    launch._raise_stop_on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class Process:
    """A descendant; one without a name ended a moment ago."""

    pid = 7

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        if not self._name:
            raise psutil.NoSuchProcess(self.pid)
        return self._name


def test_a_descendant_that_ends_while_it_is_looked_at_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    raylet, gcs = Process("raylet"), Process("gcs_server")
    monkeypatch.setattr(launch, "_descendants", lambda: [Process(""), raylet, Process("python"), gcs, Process("")])
    watched: list[Any] = []

    def wait(processes: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        watched.extend(processes)
        return processes[:1], processes[1:]

    monkeypatch.setattr(psutil, "wait_procs", wait)
    with pytest.raises(LaunchError, match="Ray ended by itself"):
        launch._await_end_of_ray()
    assert watched == [raylet, gcs]


@pytest.mark.parametrize("there", [[], ["raylet"], ["gcs_server"]])
def test_ray_without_one_of_its_own_processes_has_ended(monkeypatch: pytest.MonkeyPatch, there: list[str]) -> None:
    monkeypatch.setattr(launch, "_descendants", lambda: [Process(name) for name in there])
    with pytest.raises(LaunchError, match="Ray ended by itself"):
        launch._await_end_of_ray()


@pytest.mark.parametrize("given", ["abc", "70000", "0", "-1", "80.5", "\u0663"])
def test_a_port_of_haproxys_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", given)
    with pytest.raises(LaunchError, match=f"^RAY_SERVE_HAPROXY_STATS_PORT is '{given}'; allowed: 1 to 65535$"):
        launch._haproxy_port("RAY_SERVE_HAPROXY_STATS_PORT")


@pytest.mark.parametrize(("given", "port"), [("", 8404), ("9000", 9000)])
def test_a_port_of_haproxys_is_serves_own_or_the_users(
    monkeypatch: pytest.MonkeyPatch, given: str, port: int
) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", given)
    assert launch._haproxy_port("RAY_SERVE_HAPROXY_STATS_PORT") == port


def test_every_user_of_a_machine_has_haproxys_files_for_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 2**32 - 2)
    files = launch._haproxy_files()
    in_serve = {name for name, value in vars(constants).items() if str(value).startswith("/tmp/haproxy-serve")}
    assert files.keys() == in_serve
    for path in files.values():
        assert path.startswith("/tmp/serve-4294967294")
        folder, _, name = path.rpartition("/")
        # With the node's id, and what HAProxy appends until the socket is there.
        assert len(f"{folder}/{'0' * 56}/{name}.{2**22}.tmp") <= 107


def test_nobody_else_gets_at_haproxys_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "serve-1"
    for _ in range(2):
        launch._make_private(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(LaunchError, match="serve-1, where HAProxy's files belong, is another user's; remove it"):
        launch._make_private(folder)
