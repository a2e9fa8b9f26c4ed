"""What Prometheus is told, as far as it needs no running system; tests/system/test_metrics.py scrapes one."""

from ray.serve._private.config import DeploymentConfig

from serve_app.autoscaling import DrainTime
from serve_app.reranker.metrics import _target_drain_s
from serve_app.rollout.machine import State
from serve_app.rollout.metrics import newest
from serve_app.rollout.store import Rollout

NOW = 1_000_000.0


def rollout(id, route, status, since=NOW - 10):
    return Rollout(id, route, {}, State(status=status, since=since).to_json())


def test_the_newest_rollout_of_a_route_counts():
    stored = [
        rollout("third", "default", "step"),
        rollout("second", "search", "inconclusive"),
        rollout("first", "default", "rolled_back"),
    ]
    assert {route: state.status for route, state in newest(stored, NOW).items()} == {
        "default": "step",
        "search": "inconclusive",
    }


def test_a_rollout_that_ended_is_told_of_for_an_hour_and_an_open_one_for_ever():
    long_ago = NOW - 3 * 86_400
    stored = [
        rollout("a", "just-rolled-back", "rolled_back", NOW - 3_000),
        rollout("b", "long-ago", "rolled_back", long_ago),
        rollout("c", "waiting", "inconclusive", long_ago),
    ]
    assert set(newest(stored, NOW)) == {"just-rolled-back", "waiting"}


def test_the_drain_time_that_is_aimed_at_is_the_policys():
    policy = {"policy_function": "serve_app.autoscaling:DrainTime", "policy_kwargs": {"target_drain_s": 7}}
    scaling = {"min_replicas": 1, "max_replicas": 2}
    assert _target_drain_s(DeploymentConfig(autoscaling_config={**scaling, "policy": policy})) == 7
    default = DrainTime().target_drain_s
    assert _target_drain_s(DeploymentConfig(autoscaling_config=scaling)) == default
    assert _target_drain_s(DeploymentConfig()) == default
