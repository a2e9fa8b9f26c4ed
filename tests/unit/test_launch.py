"""`serve-app up` around Ray: what it refuses before, what it sets for HAProxy, what stops it, and how it watches
Ray's own processes."""

import errno
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.serve._private import constants

from serve_app import launch
from serve_app.configfile import load
from serve_app.launch import LaunchError
from tests.ports import free_port

CONFIG = Path(__file__).parents[2] / "configs" / "local.yaml"
FALLBACK, STATS, METRICS = launch._HAPROXY_PORTS


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
        launch._await_end_of_ray("the logs")
    assert watched == [raylet, gcs]


@pytest.mark.parametrize("there", [[], ["raylet"], ["gcs_server"]])
def test_ray_without_one_of_its_own_processes_has_ended(monkeypatch: pytest.MonkeyPatch, there: list[str]) -> None:
    monkeypatch.setattr(launch, "_descendants", lambda: [Process(name) for name in there])
    with pytest.raises(LaunchError, match="Ray ended by itself"):
        launch._await_end_of_ray("the logs")


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


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With keys, and so HAProxy, on ports of its own; nothing starts."""
    monkeypatch.setenv("SERVE_APP_API_KEYS", "shop:0123456789abcdef")
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    for name in launch._HAPROXY_PORTS:
        monkeypatch.setenv(name, str(free_port()))
    monkeypatch.setattr(launch, "_haproxy_folder", lambda: tmp_path / "haproxy")
    monkeypatch.setattr(launch, "_refuse_missing_indexes", passed)


class Passed(Exception):
    """Nothing was refused before the files that the config names."""


def passed(config: object) -> None:
    raise Passed


def up(folder: Path, host: str, port: int | None = None) -> None:
    path = folder / "config.yaml"
    path.write_text(CONFIG.read_text().replace("host: 127.0.0.1", f'host: "{host}"'))
    launch.up(load(path), port or free_port(), verbose=False)


@pytest.mark.parametrize("host", ["10.0.0.7", "127.0.0.2", "::1", "::"])
def test_a_host_on_which_haproxy_finds_no_gateway_is_refused(keys: None, tmp_path: Path, host: str) -> None:
    said = f"^http_options.host is {host}, .*; allowed: 127.0.0.1 or 0.0.0.0, or RAY_SERVE_ENABLE_HA_PROXY=0 in"
    with pytest.raises(LaunchError, match=said):
        up(tmp_path, host)


@pytest.mark.parametrize(
    ("host", "haproxy"), [("127.0.0.1", "1"), ("localhost", "1"), ("0.0.0.0", "1"), ("127.0.0.2", "0")]
)
def test_a_host_on_which_its_gateways_are_found_is_not(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, haproxy: str
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", haproxy)
    with pytest.raises(Passed):
        up(tmp_path, host)


def test_the_ports_beside_the_gateways_are_those_that_serve_takes() -> None:
    assert {name: getattr(constants, name) for name in launch._HAPROXY_PORTS} == launch._HAPROXY_PORTS


def test_a_port_that_another_fleet_of_the_user_would_share_is_refused(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv(FALLBACK, str(taken := other.getsockname()[1]))
        with pytest.raises(LaunchError, match=rf"^port {taken} on 127\.0\.0\.1 .*, or set {FALLBACK} to another$"):
            up(tmp_path, "127.0.0.1")


def test_one_port_for_two_things_is_refused(keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = os.environ[METRICS]
    monkeypatch.setenv(STATS, port)
    with pytest.raises(LaunchError, match=f"^{METRICS} is {port}, which is {STATS}'s already; set {METRICS} to"):
        up(tmp_path, "127.0.0.1")
    with pytest.raises(LaunchError, match=f"^{STATS} is {port}, which is the gateway's already"):
        up(tmp_path, "127.0.0.1", int(port))


@pytest.mark.parametrize(
    "name", ["my shop", "it's", '"', "(1)", "a&b", "a;b", "a$b", "a`b", "商店", "a-b_c.d+e@f"]
)
def test_a_folder_is_refused_where_a_shell_would_not_find_its_python(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.symlink_to("/bin/true")
    # As Ray starts a worker.
    starts = subprocess.run(["bash", "-c", f"exec {python}"], capture_output=True, timeout=60).returncode == 0
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(Passed if starts else LaunchError) as caught:
        up(tmp_path, "127.0.0.1")
    assert starts is name.isalpha() or name == "a-b_c.d+e@f"
    if not starts:
        assert str(caught.value).startswith(f"Ray can't start {python}: its path has a blank")
        assert "move the folder" in str(caught.value)


class Ray:
    """In place of ray.init: what it was given, and where its session is."""

    def __init__(self, error: Exception | None = None) -> None:
        self.given: dict[str, Any] = {}
        self.address_info = {"session_dir": "/elsewhere/ray/session_1"}
        self._error = error

    def __call__(self, **given: Any) -> "Ray":
        self.given = given
        if self._error:
            raise self._error
        return self


@pytest.mark.parametrize(("cores", "needed", "given"), [(2, 0.25, 2), (2, 3.5, 4), (0.5, 0, 1)])
def test_ray_has_the_cores_of_its_container_or_what_the_config_needs(
    monkeypatch: pytest.MonkeyPatch, cores: float, needed: float, given: int
) -> None:
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("ray.init", ray := Ray())
    logs = launch._start_ray(False, needed)
    assert ray.given["num_cpus"] == given
    assert logs == "/elsewhere/ray/session_1/logs/serve", "its own session's, not the machine's latest"


TOO_LONG = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /t/ray/s"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/t/ray"), "No space left on device"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(TOO_LONG), TOO_LONG),
    ],
)
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_ray_cannot_write_to_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, error: OSError, why: str, variable: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/t")
    monkeypatch.setattr("ray.init", Ray(error))
    with pytest.raises(LaunchError) as caught:
        launch._start_ray(False, 1)
    assert str(caught.value) == (
        f"can't write to /t/ray: {why}; free space there, or set {variable} to a short path"
    )


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/x/.ray"),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
    ],
)
def test_what_else_keeps_ray_from_starting_is_said_as_it_is(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr("ray.init", Ray(error))
    with pytest.raises(LaunchError) as caught:
        launch._start_ray(False, 1)
    assert str(caught.value) == f"Ray did not start: {error}"


def hold(while_held: Callable[[], None]) -> None:
    with launch._pid_file(8000):
        while_held()


def test_a_pid_file_that_cannot_be_written_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = tmp_path / "8000.pid"
    full.symlink_to("/dev/full")
    for path in (full, tmp_path / "none" / "8000.pid"):
        monkeypatch.setattr(launch, "_pid_path", lambda port, path=path: path)
        with pytest.raises(LaunchError, match=rf"^can't write to {path}: .*; free space there, or set TMPDIR to"):
            hold(lambda: pytest.fail("it is not held"))


def test_what_fails_while_the_pid_file_is_held_is_none_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail() -> None:
        (file,) = launch._pid_files()
        assert launch._holder_of(file) == int(file.read_text()) == os.getpid()
        with pytest.raises(
            LaunchError, match=f"process {os.getpid()} is starting or serving on port 8000 already"
        ):
            hold(fail)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        hold(fail)
    assert not launch._pid_files()


def test_without_any_folder_for_pid_files_both_commands_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    for command in (lambda: launch._pid_path(8000), lambda: launch.down(None)):
        with pytest.raises(
            LaunchError, match=r"^No usable temporary directory found in .*; free space in one of them"
        ):
            command()


def test_a_folder_for_haproxys_files_that_cannot_be_made_is_one_clear_line() -> None:
    with pytest.raises(
        LaunchError, match=r"^can't write to /nowhere/serve-1, where HAProxy's files belong: No such"
    ):
        launch._make_private(Path("/nowhere/serve-1"))
