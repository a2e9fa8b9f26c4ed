"""Prometheus is told of rollouts, by the names that docs/operations.md has."""

import re

import httpx

from tests.metrics import exported, named
from tests.rollout.conftest import RolloutSystem
from tests.system.conftest import wait_for
from tests.system.test_metrics import OF_ROLLOUTS

NO_GUARDS = {"error_rate": {"threshold": 1}}


def test_prometheus_is_told_where_a_rollout_is(fleet: RolloutSystem) -> None:
    rollout = fleet.operator.start(
        route="third", stable="stable", canary="slow", guards=NO_GUARDS, steps=[{"set_weight": 40}, {"pause": {}}]
    )
    fleet.operator.wait(rollout, status="paused")
    # What a replica before this one told is there for some seconds.
    wait_for(lambda: (_weight("third"), _state("third")) == (40, {"paused"}), 60, 2, "the weight")
    assert not {name for name in named() if name.startswith(OF_ROLLOUTS)} - exported()
    assert fleet.operator.act(rollout, "abort").status_code == 200
    wait_for(lambda: (_weight("third"), _state("third")) == (0, {"aborted"}), 60, 2, "the end")


def _weight(route: str) -> float | None:
    weights = _samples("ray_serve_app_rollout_weight_percent", f'route="{route}"')
    return max(weights.values(), default=None)


def _state(route: str) -> set[str]:
    states = _samples("ray_serve_app_rollout_state", f'route="{route}"')
    return {re.findall(r'state="(\w+)"', labels)[0] for labels, value in states.items() if value == 1}


def _samples(name: str, label: str) -> dict[str, float]:
    """By labels."""
    import ray

    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
    found = re.findall(rf"^{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found if label in labels}
