"""A system within strangers' reach: it doesn't start without keys, and with keys no port lets them past."""

import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.commands.test_make import ROOT, Serving, interrupt
from tests.commands.test_up import serve_app
from tests.ports import free_port

BODIES = {
    "/v1/search": {"query": "desk lamp"},
    "/v1/rerank": {"query": "lamp", "documents": ["a lamp", "a desk"]},
    "/v2/rerank": {"query": "lamp", "documents": ["a lamp", "a desk"]},
    "/rerank": {"query": "lamp", "texts": ["a lamp", "a desk"]},
    "/v1/score": {"text_1": "lamp", "text_2": "a lamp"},
    "/v1/events": {"events": [{"action_name": "click", "query_id": "1"}]},
    "/v1/rollouts": {"route": "default"},
    "/": {},
}
# A replica's own, by which others call it; and the one by which Ray gives it work.
GRPC_METHODS = ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.CoreWorkerService/PushTask")


HAPROXY = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
# These are the same for all systems of a machine, if nothing else is said.
HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
REFUSED = ("has no API keys", "SERVE_APP_API_KEYS_FILE", "without_keys: true")


@pytest.mark.parametrize(
    ("host", "flags", "where"),
    [("0.0.0.0", {}, "listens on 0.0.0.0"), ("127.0.0.1", HAPROXY, "listens on a port of its own behind HAProxy")],
)
def test_a_gateway_in_reach_of_others_does_not_start_without_keys(
    tmp_path: Path, host: str, flags: dict[str, str], where: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "configs/local.yaml").read_text().replace("host: 127.0.0.1", f"host: {host}"))
    answer = serve_app("up", config, env={**os.environ, **flags})
    assert answer.returncode == 1
    assert "starting Ray" not in answer.stderr
    for text in (where, *REFUSED):
        assert text in answer.stderr


# Where the file is deployed on a cluster, as `serve deploy` does it.
DEPLOY = """
import json, sys, time
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from serve_app.status import applications

config = json.loads(sys.argv[1])
ray.init(address="local", namespace="serve", log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options=config["http_options"])
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
give_up_at = time.monotonic() + 120
said = ""
while "API keys" not in said and time.monotonic() < give_up_at:
    time.sleep(0.5)
    said = "".join(message for app in applications().values() for message in app.messages)
print(said)
serve.shutdown()
ray.shutdown()
"""


def test_the_gateway_itself_refuses_too_where_the_file_is_deployed(tmp_path: Path) -> None:
    port = free_port()
    settings = {"pipelines": {"bm25": {}}, "routes": {"default": {"weights": {"bm25": 100}}}}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [{"name": "Gateway", "user_config": settings}],
            }
        ],
    }
    command = (sys.executable, "-c", DEPLOY, json.dumps(config))
    serving = Serving(tmp_path / "log", port, *command, **HAPROXY, **free_ports(), RAY_USAGE_STATS_ENABLED="0")
    try:
        serving.process.wait(200)
        for text in ("listens on a port of its own behind HAProxy", *REFUSED):
            assert text in serving.log.read_text()
    finally:
        serving.clean_up()


def free_ports() -> dict[str, str]:
    """For HAProxy and the proxy behind it, as environment variables."""
    return {name: str(free_port()) for name in HAPROXY_PORTS}


class Guarded(Serving):
    """configs/local.yaml for all interfaces, which has keys."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        config = folder / "config.yaml"
        config.write_text((ROOT / "configs/local.yaml").read_text().replace("host: 127.0.0.1", "host: 0.0.0.0"))
        self.keys = folder / "keys.yaml"
        made = [serve_app("key", name) for name in ("first", "second")]
        self.lines = [answer.stdout for answer in made]
        self.secrets = [answer.stderr.strip().partition(": ")[2] for answer in made]
        self.keys.write_text(self.lines[0])
        environment = {"SERVE_APP_API_KEYS_FILE": str(self.keys), "CONFIG": str(config)}
        self.beside = free_ports()
        super().__init__(folder / "log", self.port, **environment, **self.beside)
        self.ready = self.wait_ready()

    def search(self, key: str) -> subprocess.CompletedProcess[str]:
        given = {"SERVE_APP_API_KEY": key, "SERVE_APP_URL": f"http://127.0.0.1:{self.port}"}
        return serve_app("search", "desk lamp", env={**os.environ, **given})

    def open_ports(self) -> dict[int, str]:
        """What other machines can reach, with the process that listens there."""
        found = {}
        for process in self.family():
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip):
                    found[connection.laddr.port] = name_of(process)
        return found


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = None
    try:
        made = Guarded(tmp_path_factory.mktemp("guarded"))
        yield made
        interrupt(made, made.port)
        made.process.wait(120)
        psutil.wait_procs(made.family(), timeout=10)
        assert not made.family()
    finally:
        if made is not None:
            made.clean_up()


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def name_of(process: psutil.Process) -> str:
    """`ray::ServeReplica` of `ray::ServeReplica:gateway:Gateway`, or the program."""
    command = process.cmdline()
    # Ray adds the method that an actor runs at the moment: ray::ServeController.listen_for_change.
    if actor := re.match(r"ray::\w+", command[0]):
        return actor[0]
    script = next((part for part in command[1:] if part.endswith((".py", "serve-app"))), None)
    return Path(script or command[0]).name


def documented() -> dict[str, str]:
    """By process, what docs/operations.md says of its ports."""
    table = (ROOT / "docs" / "operations.md").read_text().partition("## Ports")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", table, re.M)
    return {name: said for names, said in rows for name in names.split(", ")}


def test_with_keys_every_port_in_reach_is_known_and_haproxy_is_the_way_in(guarded: Guarded) -> None:
    ports = guarded.open_ports()
    assert ports[guarded.port] == "haproxy"
    assert ports[int(guarded.beside["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])] == "ray::ProxyActor"
    assert list(ports.values()).count("ray::ServeReplica") >= 2 * 4, "the replicas listen too"
    unknown = set(ports.values()) - documented().keys()
    assert not unknown


def test_no_port_in_reach_answers_a_call_without_a_key(guarded: Guarded) -> None:
    ports = guarded.open_ports()
    answered, refused = [], []
    for port, process in ports.items():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
            for path, body in BODIES.items():
                try:
                    status = client.post(path, json=body).status_code
                except httpx.HTTPError:
                    # No HTTP server, or only of HTTP/2.
                    break
                if status < 400:
                    answered.append((port, process, path))
                elif status == 401:
                    refused.append((port, process, path))
    assert not answered
    # The gateway's replica has a port of its own, past HAProxy, and asks for a key there too.
    asking = {(process, path) for _, process, path in refused}
    for path in ("/v1/search", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/v1/events"):
        assert {("haproxy", path), ("ray::ServeReplica", path), ("ray::ProxyActor", path)} <= asking
    behind = next(port for port, process, _ in refused if process == "ray::ServeReplica")
    key = {"Authorization": f"Bearer {guarded.secrets[0]}"}
    answer = httpx.post(f"http://127.0.0.1:{behind}/v1/search", json=BODIES["/v1/search"], headers=key)
    assert answer.status_code == 200, "the port is the gateway's, and the key is what was missing"


def test_no_port_in_reach_takes_work_without_rays_token(guarded: Guarded) -> None:
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    taken, closed = [], set()
    for port, process in guarded.open_ports().items():
        for method in GRPC_METHODS:
            without = code(port, method)
            if without is grpc.StatusCode.UNAUTHENTICATED:
                closed.add(process)
                if process == "ray::ServeReplica":
                    held = code(port, method, ("authorization", f"Bearer {token}"))
                    assert held is not grpc.StatusCode.UNAUTHENTICATED, "the token is what was missing"
            elif without not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED) and not (
                # HAProxy itself answers, in plain HTTP.
                process == "haproxy" and without is grpc.StatusCode.UNKNOWN
            ):
                taken.append((port, process, method, without))
    assert not taken
    assert "ray::ServeReplica" in closed
    # Whoever may deploy runs code of his own.
    for port, process in guarded.open_ports().items():
        try:
            deploys = httpx.get(f"http://127.0.0.1:{port}/api/serve/applications/", timeout=5)
        except httpx.HTTPError:
            continue
        # Servers of metrics answer whatever they are asked for.
        assert deploys.status_code >= 400 or "applications" not in deploys.text, (port, process)


def code(port: int, method: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_with_keys_haproxy_answers_whoever_has_one_and_keys_rotate(guarded: Guarded) -> None:
    first, second = guarded.secrets
    curl = subprocess.run(
        guarded.ready.partition("try: ")[2],
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SERVE_APP_API_KEY": first},
    )
    assert '"rerank_score":0.' in curl.stdout
    assert "lamp" in guarded.search(first).stdout.lower()
    for key in ("", second):
        assert "401: give an API key" in guarded.search(key).stderr
    new = guarded.keys.with_suffix(".new")
    new.write_text(guarded.lines[1])
    new.replace(guarded.keys)
    give_up_at = time.monotonic() + 30
    while guarded.search(second).returncode:
        assert time.monotonic() < give_up_at
    assert "401: give an API key" in guarded.search(first).stderr
    assert not any(secret in guarded.log.read_text() for secret in guarded.secrets)
