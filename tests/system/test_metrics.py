"""What docs/operations.md, the alert rules and the dashboard name is what a running fleet exports."""

import contextlib

import httpx

from tests.metrics import exported, named
from tests.system.conftest import System, wait_for

# These need rollouts: tests/rollout/test_metrics.py.
OF_ROLLOUTS = "ray_serve_app_rollout_"
# Serve has these from the first failure on.
OF_FAILURES = {"ray_serve_health_check_failures_total", "ray_serve_num_deployment_http_error_requests_total"}


def test_every_metric_that_is_named_is_exported(system: System) -> None:
    with httpx.Client(base_url=system.url, timeout=60) as client:
        body = {"query": "desk lamp", "model": "qwen-f32", "documents": [f"lamp number {i}" for i in range(20)]}
        for _ in range(2):
            # The second time the cache has them.
            assert client.post("/v1/rerank", json=body).status_code == 200
        # The same head before other documents.
        assert client.post("/v1/rerank", json={**body, "documents": ["a lamp", "a desk"]}).status_code == 200
        for _ in range(2):
            assert client.post("/v1/search", json={"query": "desk lamp"}).status_code == 200
        # More than can be scored in time.
        late = {**body, "documents": [f"number {i} " * 100 for i in range(200)], "timeout_ms": 300}
        degraded = client.post("/v1/rerank", json=late).json()["meta"]["degraded"]
        assert degraded[0]["reason"] == "timeout"
    wanted = {name for name in named() - OF_FAILURES if not name.startswith(OF_ROLLOUTS)}
    assert len(wanted) > 15

    def missing() -> set[str]:
        return wanted - exported()

    with contextlib.suppress(AssertionError):
        wait_for(lambda: not missing(), 60, 2)
    assert not missing()
