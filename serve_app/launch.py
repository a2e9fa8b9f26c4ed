"""`serve-app up`: a Ray of its own and Serve on it, in the foreground, and nothing left behind afterwards."""

import contextlib
import ctypes
import errno
import fcntl
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from serve_app.access import API_KEY, API_KEYS, API_KEYS_FILE, local_url, refuse_strangers, secret
from serve_app.configfile import ConfigFile
from serve_app.plan import gpus_at_start, replica_counts

# Engines of the largest models read their weights from a network disk.
_START_LIMIT_S = 1800
# A little more than the longest of our deployments' graceful_shutdown_timeout_s, so that calls under way finish.
_SERVE_STOP_LIMIT_S = 70
# With Ray's end, and what is left over.
_STOP_LIMIT_S = _SERVE_STOP_LIMIT_S + 60
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What our deployments ask for where the file says nothing.
_DEFAULT_CPUS = {
    "serve_app.gateway:build": {"Gateway": 0.25},
    "serve_app.recall:build": {"Recall": 0.5, "Front": 0.0},
    "serve_app.reranker:build": {"Reranker": 1.0, "Front": 0.0},
    "serve_app.rollout:build": {"Rollout": 0.1},
    "serve_app.ui:build": {"Page": 0.1},
}
_PR_SET_CHILD_SUBREAPER = 36
# Serve's environment; `configs/serve.env` has both for clusters, and says why.
ENVIRONMENT = {"RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30"}
# Behind HAProxy every gateway replica, and Serve's own proxy, has a port of its own on the config's host, and
# HAProxy two on all interfaces: only where keys, or the config, let strangers come.
FAST = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "67108864",
}
# Serve's own proxy, for when HAProxy finds no gateway; and HAProxy's two, by the variable that names another.
_FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
_HAPROXY_PORTS = {
    _FALLBACK_PORT: 8500,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
}
_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG),
)
# What a shell doesn't take as it stands.
_OF_THE_SHELL = re.compile(r"""[ \t\n"'()&;$`|<>\\]""")


class LaunchError(Exception):
    """Why the fleet did not start, or did not stop, in one line or a few."""


class _Stop(BaseException):
    """SIGINT, SIGTERM or SIGHUP came."""


def up(config: ConfigFile, port: int | None, verbose: bool) -> None:
    """Serves `config` until SIGINT, SIGTERM or SIGHUP. Raises LaunchError when something does not start.

    Ray, Serve's proxies and the engines are this process's descendants; whatever of them is alive at the end is
    ended, also what Ray itself leaves (HAProxy, engine processes).
    """
    raw = dict(config.raw)
    if port is not None:
        raw["http_options"] = {**raw.get("http_options", {}), "port": port}
    host, port = config.host, port or config.port
    _refuse_unquotable(sys.executable)
    if config.gateways and not _is_open(config):
        # The gateway itself refuses to start, half a minute later.
        try:
            refuse_strangers(host)
        except ValueError as error:
            raise LaunchError(str(error)) from None
    has_haproxy = _is_open(config) and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1"
    if has_haproxy:
        _refuse_host_without_gateways(host)
    _refuse_taken(host, port, "free it, or choose another: --port N, or PORT=N with make")
    if has_haproxy:
        _refuse_taken_beside(host, port)
        _make_private(_haproxy_folder())
    _refuse_missing_indexes(config)
    _adopt_orphans()
    _raise_stop_on_signals()
    with _pid_file(port):
        try:
            needed = {**least_resources(config), "cards": gpus_at_start(config)}
            fast = {**FAST, **_haproxy_files()} if _is_open(config) else {}
            logs = _start(raw, verbose, needed, {**ENVIRONMENT, **fast})
            _print_ready(config, host, port)
            _await_end_of_ray(logs)
        except _Stop:
            # The terminal may be what went.
            with contextlib.suppress(OSError):
                _say("stopping")
        finally:
            _stop()


def down(port: int | None) -> int | None:
    """Stops the `serve-app up` that serves on `port` of this machine, or the only one there is. The port it served
    on; None when there is none. Raises LaunchError when there are several, or when it does not stop."""
    running = {_port_of(path): pid for path in _pid_files() if (pid := _holder_of(path)) is not None}
    if port is None and len(running) > 1:
        raise LaunchError(f"several are up, on ports {', '.join(map(str, sorted(running)))}; say which: --port N")
    found = next(iter(running), None) if port is None else port
    if found is None or found not in running:
        return None
    try:
        process = psutil.Process(running[found])
        process.terminate()
        process.wait(_STOP_LIMIT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise LaunchError(
            f"process {running[found]} did not stop; end it with: kill -9 {running[found]}"
        ) from None
    return found


def least_resources(config: ConfigFile) -> dict[str, float]:
    """CPUs and GPUs that the file's applications ask for at their first number of replicas, as exact as Ray counts
    them: a ten thousandth."""
    needed = {"num_cpus": 0.0, "num_gpus": 0.0}
    for application in config.applications:
        stated = {deployment["name"]: deployment for deployment in application.get("deployments") or []}
        for name in {*stated, *_DEFAULT_CPUS.get(application["import_path"], ())}:
            deployment = stated.get(name, {})
            _, replicas, _ = replica_counts(deployment)
            options = deployment.get("ray_actor_options") or {}
            # Serve takes what the file says in place of all that the code does.
            ours = {} if "ray_actor_options" in deployment else _DEFAULT_CPUS.get(application["import_path"], {})
            default_cpus = ours.get(name, 1.0)
            needed["num_cpus"] += replicas * (options.get("num_cpus", default_cpus) or 0)
            needed["num_gpus"] += replicas * (options.get("num_gpus") or 0)
    return {name: round(amount, 4) for name, amount in needed.items()}


def _is_open(config: ConfigFile) -> bool:
    """Whether strangers may reach the gateway: it has API keys, or says that it needs none."""
    gateways = [a for a in config.applications if a["name"] in config.gateways]
    return _has_keys() or any((application.get("args") or {}).get("without_keys") for application in gateways)


def _has_keys() -> bool:
    return any(map(secret, (API_KEYS, API_KEYS_FILE)))


def _start(raw: dict[str, Any], verbose: bool, needed: dict[str, float], environment: dict[str, str]) -> str:
    """Where Serve's logs are."""
    # Serve reads these as it is imported, and no usage reports leave a machine whose owner was not asked.
    for name, value in {**environment, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    logs = _start_ray(verbose, needed["num_cpus"])
    gpus = ray.cluster_resources().get("GPU", 0)
    if needed["num_gpus"] > gpus:
        raise LaunchError(
            f"the config asks for {needed['num_gpus']:g} GPUs (num_gpus x least replicas), "
            f"this machine has {gpus:g}; serve a config for the CPU, such as configs/local.yaml, "
            "or deploy to a cluster: serve deploy FILE"
        )
    if needed["cards"] > gpus:
        raise LaunchError(
            f"the config's shares need {needed['cards']:g} GPUs, because none is split over two, and this machine "
            f"has {gpus:g}; serve-app plan FILE shows them"
        )
    # Ray put a handler of its own in place, which aborts the process on SIGTERM.
    _raise_stop_on_signals()
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    schema = ServeDeploySchema.model_validate(raw)
    http = schema.http_options.model_dump()
    grpc = schema.grpc_options.model_dump()
    try:
        serve.start(proxy_location=schema.proxy_location, http_options=http, grpc_options=grpc)
    # TimeoutError is Serve's own, of a proxy that takes more than a minute.
    except (ray.exceptions.RayError, TimeoutError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(
            f"Serve's HTTP proxy did not start: {' … '.join(dict.fromkeys((said[0], said[-1])))}\nlogs: {logs}"
        ) from None
    # What `serve run FILE` does; Serve has no public call for a config file.
    _get_global_client().deploy_apps(schema, _blocking=False)
    _await_running([application.name for application in schema.applications], logs)
    return logs


def _start_ray(verbose: bool, needed_cpus: float) -> str:
    """Where Serve's logs are: this Ray's, while `session_latest` is whichever started last on the machine."""
    import ray
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.utils import get_num_cpus

    _say("starting Ray")
    # It warns of fractions of a core.
    ray_says = logging.getLogger("ray._private.utils")
    level = ray_says.level
    ray_says.setLevel(logging.ERROR)
    cores = get_num_cpus(override_docker_cpu_warning=True)
    ray_says.setLevel(level)
    try:
        context = ray.init(
            address="local",
            namespace="serve",
            # On one machine replicas share the cores anyway: too few must not keep one waiting for ever. In a
            # container Ray counts its share of the cores, and has a process ready for each.
            num_cpus=max(1, int(cores), math.ceil(needed_cpus)),
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
        )
    except OSError as error:
        folder = get_default_ray_temp_dir()
        # Ray writes elsewhere, too, and starts processes.
        is_there = str(error.filename or folder).startswith(folder) and error.errno in _UNWRITABLE
        if not is_there and "AF_UNIX path length" not in str(error):
            raise LaunchError(f"Ray did not start: {error}") from None
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise LaunchError(_unwritable(folder, error, variable)) from None
    return f"{context.address_info['session_dir']}/logs/serve"


def _await_running(names: list[str], logs: str) -> None:
    from serve_app.status import applications

    said: dict[str, str] = {}
    give_up_at = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up_at:
        found = applications()
        for name in names:
            application = found.get(name)
            status = application.status if application else "NOT_STARTED"
            if said.get(name) != status:
                said[name] = status
                _say(f"{name}: {status}")
            if application and status == "DEPLOY_FAILED":
                raise LaunchError(f"{name} did not start: {_failure(application.messages)}\nlogs: {logs}")
        if all(said[name] == "RUNNING" for name in names):
            return
        time.sleep(0.5)
    waiting = ", ".join(f"{name} is {status}" for name, status in said.items() if status != "RUNNING")
    raise LaunchError(f"not everything started within {_START_LIMIT_S} s: {waiting}\nlogs: {logs}")


def _await_end_of_ray(logs: str) -> None:
    """Returns only by an exception: a signal's, or LaunchError when Ray's own processes are gone."""
    ray_itself = _processes_of_ray(logs)
    while True:
        gone, _ = psutil.wait_procs(ray_itself, timeout=5)
        if gone:
            raise LaunchError(f"Ray ended by itself (process {gone[0].pid}); see {logs}")


def _processes_of_ray(logs: str) -> list[psutil.Process]:
    found = {}
    for process in _descendants():
        # Some live for a moment only.
        with contextlib.suppress(psutil.Error):
            found[process.name()] = process
    names = ("raylet", "gcs_server")
    if missing := [name for name in names if name not in found]:
        raise LaunchError(f"Ray ended by itself (no process {' or '.join(missing)}); see {logs}")
    return [found[name] for name in names]


def _failure(messages: Sequence[str]) -> str:
    """The line that says what went wrong: the last of the traceback that Serve's message carries."""
    for message in messages:
        lines = [line for line in message.splitlines() if line and not line[0].isspace()]
        errors = [line for line in lines if "Error: " in line or "Exception: " in line]
        if errors:
            start = message.rindex(errors[-1])
            return str(message[start:]).strip()
    return " ".join(filter(None, messages)) or "no reason given"


def _print_ready(config: ConfigFile, host: str, port: int) -> None:
    if not config.gateways:
        return _say("ready; no application of the config is a gateway, so there is no HTTP API")
    name, settings = next(iter(config.gateways.items()))
    prefix = next(a.get("route_prefix") for a in config.applications if a["name"] == name) or "/"
    url = local_url(host, port) + prefix.rstrip("/")
    if settings.recall:
        path, body = "/v1/search", '{"query": "wireless headphones that block out noise", "top_n": 3}'
    else:
        path, body = "/v1/rerank", '{"query": "capital of France", "documents": ["London", "Paris"]}'
    key = f' -H "Authorization: Bearer ${API_KEY}"' if _has_keys() else ""
    _say(f"ready on {url} — try: curl -s {url}{path}{key} -d '{body}'")


def _stop() -> None:
    """Ends Serve and Ray, then whatever descendant is still there; never leaves on a signal halfway."""
    for name in _STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    import ray

    descendants = _descendants()
    if ray.is_initialized():
        # Ray tells the end of Serve's controller as a failure.
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            # Serve's own shutdown lets calls under way finish; Ray's ends what is still there.
            with contextlib.suppress(Exception):
                from ray.serve.context import _check_cached_client_alive

                # serve.shutdown() gives up after 30 s.
                client, _ = _check_cached_client_alive()
                if client is not None:
                    client.shutdown(_SERVE_STOP_LIMIT_S)
            ray.shutdown()
    _end([*descendants, *_descendants()])


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=10)
    if alive:
        raise LaunchError(f"still running: {', '.join(str(process.pid) for process in alive)}")


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _adopt_orphans() -> None:
    """Descendants whose parent ends become our children (Linux), so that none gets out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _refuse_unquotable(python: str) -> None:
    """Ray starts its workers by a shell, to which it names the interpreter without quotes."""
    if _OF_THE_SHELL.search(python):
        raise LaunchError(
            f"Ray can't start {python}: its path has a blank, a quote, a parenthesis or another character that "
            "shells read; move the folder to a path without"
        )


def _refuse_host_without_gateways(host: str) -> None:
    # Of `::` HAProxy makes all addresses of IPv4.
    if host not in ("127.0.0.1", "localhost", "0.0.0.0"):
        raise LaunchError(
            f"http_options.host is {host}, but calls go through HAProxy, which finds the gateways of its machine "
            "only on 127.0.0.1; allowed: 127.0.0.1 or 0.0.0.0, or RAY_SERVE_ENABLE_HA_PROXY=0 in the environment"
        )


def _refuse_taken_beside(host: str, port: int) -> None:
    """The ports that there are besides the gateway's where HAProxy is. Raises LaunchError."""
    taken = {port: "the gateway's"}
    for name in _HAPROXY_PORTS:
        own = _haproxy_port(name)
        if own in taken:
            raise LaunchError(f"{name} is {own}, which is {taken[own]} already; set {name} to another")
        taken[own] = f"{name}'s"
        _refuse_taken(host if name == _FALLBACK_PORT else "0.0.0.0", own, f"free it, or set {name} to another")


def _refuse_taken(host: str, port: int, remedy: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"port {port} on {host} cannot be used ({error.strerror}){_holder(port)}; {remedy}"
            ) from None


def _haproxy_port(name: str) -> int:
    given = os.environ.get(name) or str(_HAPROXY_PORTS[name])
    if not re.fullmatch("[0-9]{1,5}", given) or not 0 < int(given) < 65536:
        raise LaunchError(f"{name} is {given!r}; allowed: 1 to 65535")
    return int(given)


def _haproxy_files() -> dict[str, str]:
    """Serve's settings for HAProxy's files. Without them all users share a folder, which is the first one's."""
    folder = _haproxy_folder()
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    return {
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        **{f"RAY_SERVE_HAPROXY_{name}": f"{folder}/{file}" for name, file in files.items()},
    }


def _haproxy_folder() -> Path:
    # Serve adds a node's id, and the path of a socket may have 107 characters: short, and not in TMPDIR.
    return Path(f"/tmp/serve-{os.getuid()}")


def _make_private(folder: Path) -> None:
    """HAProxy obeys everybody who gets at its socket. Raises LaunchError."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise LaunchError(
            f"can't write to {folder}, where HAProxy's files belong: {error.strerror}; free space there"
        ) from None
    if folder.lstat().st_uid != os.getuid():
        raise LaunchError(f"{folder}, where HAProxy's files belong, is another user's; remove it")


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f": held by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _refuse_missing_indexes(config: ConfigFile) -> None:
    for name, args in config.recalls.items():
        if not Path(args.index).is_dir():
            raise LaunchError(
                f"{name}: there is no index in {args.index}; "
                f"build it: serve-app index build --input FILE --index {args.index}"
            )


def _unwritable(path: Path | str, error: OSError, variable: str = "TMPDIR") -> str:
    why = error.strerror or error
    return f"can't write to {path}: {why}; free space there, or set {variable} to a short path"


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise LaunchError(f"{error.strerror}; free space in one of them, or set TMPDIR to a short path") from None


def _pid_path(port: int) -> Path:
    return _temporary() / f"serve-app-{os.getuid()}-{port}.pid"


def _pid_files() -> list[Path]:
    return sorted(_temporary().glob(f"serve-app-{os.getuid()}-*.pid"))


def _port_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _holder_of(path: Path) -> int | None:
    """The process that holds the pid file; None when nobody does and it was only left behind."""
    try:
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
    except (OSError, ValueError):
        pass
    return None


@contextlib.contextmanager
def _pid_file(port: int) -> Iterator[None]:
    """Holds the port's pid file by a lock: one process serves on a port, and a stale file means nothing."""
    path = _pid_path(port)
    with contextlib.ExitStack() as held:
        try:
            # Unbuffered, so that what a full disk didn't take is not tried again as the file is closed.
            file = held.enter_context(path.open("ab", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except BlockingIOError:
            raise LaunchError(
                f"process {_holder_of(path)} is starting or serving on port {port} already"
            ) from None
        except OSError as error:
            raise LaunchError(_unwritable(path, error)) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _raise_stop_on_signals() -> None:
    def stop(signum: int, frame: object) -> None:
        raise _Stop

    for name in _STOP_SIGNALS:
        # nohup's wish to outlive the terminal holds.
        if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, stop)


def _say(line: str) -> None:
    print(f"serve-app: {line}", flush=True)
