"""A Ray cluster of several (fake) nodes with logical GPUs on one machine, with Ray's own node autoscaler on."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from serve_app.launch import ENVIRONMENT
from tests.ports import free_port
from tests.system.conftest import ROOT, wait_for

_PR_SET_CHILD_SUBREAPER = 36


def start_head(folder: Path, head: dict[str, int], worker: dict[str, Any]) -> str:
    """Starts a head whose autoscaler adds and removes `worker` nodes, raylets on this machine; its address.

    What `ray.cluster_utils.AutoscalingCluster` does, which needs a file that Ray's wheel hasn't, and stops every
    Ray of the machine before it starts.
    """
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    settings = {
        "cluster_name": "tests",
        "max_workers": worker["max_workers"],
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
            "gpu": {"node_config": {}, "min_workers": 0, **worker},
        },
        "head_node_type": "ray.head.default",
    }
    for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        settings[f"{name}_commands"] = []
    settings |= {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
    settings |= {"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []}
    config = folder / "cluster.json"
    config.write_text(json.dumps(settings))
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}"),
        *(f"--autoscaling-config={config}", f"--temp-dir={folder}", "--include-dashboard=false"),
        *(f"--num-cpus={head['CPU']}", f"--num-gpus={head['GPU']}"),
    ]
    environment = {**os.environ, **ENVIRONMENT, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    # `ray start` asks for a token where an earlier `ray.init` left one, which this process wouldn't send.
    environment["RAY_AUTH_MODE"] = "disabled"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    return address


class Cluster:
    """The running cluster: what Serve and Ray say of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def deploy(self, applications: list[dict[str, Any]]) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = {"proxy_location": "HeadOnly", "applications": applications}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def replicas(self, app: str, deployment: str = "Reranker") -> list[dict[str, Any]]:
        """Of each replica: its state, and the node it is on, or None while it waits for a place."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()["applications"].get(app, {}).get("deployments", {})
        found: list[dict[str, Any]] = details.get(deployment, {}).get("replicas", [])
        return found

    def running(self, app: str) -> int:
        return sum(replica["state"] == "RUNNING" for replica in self.replicas(app))

    def placed(self, app: str) -> list[str]:
        """The nodes of the replicas that have a place and are not on their way out."""
        live = [r for r in self.replicas(app) if r["state"] in ("STARTING", "RUNNING")]
        return [replica["node_id"] for replica in live if replica.get("node_id")]

    def gpu_nodes(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")}

    def wait_gateway(self) -> None:
        """Until the gateway answers and has heard what is deployed."""

        def hears() -> bool:
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                models = self.client.get("/v1/models").json()["data"]
                return all(m["running_replicas"] is not None for m in models if m["kind"] == "variant")
            return False

        wait_for(hears, 240, what="the gateway")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head with one GPU; nodes with one GPU each join when something waits for one, and leave when idle."""
    from ray import serve

    os.environ.update(ENVIRONMENT)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Replicas import the scorers of tests/rollout.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Processes whose parents end (Ray's daemons) become ours, so that all can be ended afterwards.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(psutil.Process().children(recursive=True))
    # Sockets lie in it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        worker = {"resources": {"CPU": 4, "GPU": 1, "object_store_memory": 200_000_000}, "max_workers": 2}
        address = start_head(folder, {"CPU": 6, "GPU": 1}, worker)
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield Cluster(port)
    finally:
        # Not Serve's shutdown, which drains replicas for half a minute.
        ray.shutdown()
        end(set(psutil.Process().children(recursive=True)) - before)
        shutil.rmtree(folder, ignore_errors=True)


def end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=20)
    assert not alive, alive
