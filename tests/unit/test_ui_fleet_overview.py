"""`/v1/fleet`: what it makes of what Serve and the nodes say."""

import asyncio

import pytest
from fastapi import FastAPI

from serve_app.gateway import overview
from serve_app.gateway.overview import Node, Overview, Sample
from tests.unit.gateway_double import Gateway

NODES = [Node("aaaaaaaa11", 2, "http://a/metrics"), Node("bbbbbbbb22", 0, None)]


def replica(name, node, state="RUNNING"):
    return {"replica_id": name, "node_id": node, "state": state}


def deployment(replicas, status="HEALTHY", target=1, **resources):
    return {
        "status": status,
        "replicas": replicas,
        "target_num_replicas": target,
        "required_resources": resources,
        "deployment_config": {"user_config": {"cache": {"redis": "redis://:secret@cache"}}},
    }


DETAILS = {
    "applications": {
        "gateway": {
            "status": "RUNNING",
            "deployments": {"Gateway": deployment([replica("g1", "bbbbbbbb22")], CPU=0.25)},
        },
        "small": {
            "status": "DEPLOYING",
            "deployments": {
                "Front": deployment([replica("f1", "bbbbbbbb22")]),
                "Reranker": deployment(
                    [replica("s1", "aaaaaaaa11"), replica("s2", "aaaaaaaa11"), replica("s3", None, "STARTING")],
                    "UPDATING",
                    3,
                    GPU=0.25,
                ),
            },
        },
    }
}
PAGE = rb"""# HELP ray_serve_app_calls_total calls
ray_serve_app_calls_total{path="/v1/search",route="default",status="200",SessionName="x"} 7.0
ray_serve_app_calls_total{path="/v1/search",route="default",status="503",SessionName="x"} 2.0
ray_serve_app_calls_total{path="/v1/fleet",route="",status="200"} 99.0
ray_serve_app_call_seconds_bucket{path="/v1/search",le="0.1"} 5.0
ray_serve_app_degraded_total{stage="sm\"all",reason="timeout"} 3.0
ray_serve_app_reranker_pending_tokens{variant="small",replica="s1"} 300.0
ray_serve_app_reranker_pending_tokens{variant="small",replica="gone"} 1000.0
ray_serve_app_reranker_tokens_per_second{variant="small",replica="s1"} 100.0
ray_serve_app_reranker_target_drain_seconds{variant="small",replica="s1"} 2.0
ray_serve_app_pairs_total{variant="small"} 50.0
ray_node_cpu_count{ip="1.2.3.4"} 2
"""


def summary(samples):
    return overview.summary(DETAILS, NODES, samples, 5.0)


def test_replicas_are_counted_by_state_and_node():
    answer = summary([])
    small = answer["applications"][1]
    assert (small["kind"], small["status"]) == ("variant", "DEPLOYING")
    assert [d["name"] for d in small["deployments"]] == ["Reranker"]
    (reranker,) = small["deployments"]
    assert (reranker["running"], reranker["target"], reranker["num_gpus"]) == (2, 3, 0.25)
    assert reranker["states"] == {"RUNNING": 2, "STARTING": 1}
    assert reranker["nodes"] == {"aaaaaaaa": 2}
    assert answer["nodes"] == [
        {"node": "aaaaaaaa", "gpus": 2, "gpus_used": 0.5, "replicas": 2},
        {"node": "bbbbbbbb", "gpus": 0, "gpus_used": 0, "replicas": 1},
    ]


def test_figures_are_those_of_replicas_that_live():
    answer = summary(overview.parse(PAGE.splitlines()))
    assert answer["calls"] == {"answered": 9, "failed": 2, "degraded": 3}
    assert answer["variants"] == {
        "small": {
            "pending_tokens": 300,
            "tokens_per_s": 100,
            "drain_s": 3,
            "target_drain_s": 2,
            "pairs": 50,
            "cache_hits": 0,
        }
    }


@pytest.mark.parametrize(("pending", "rate", "drain"), [(0, 0, 0), (10, 0, None), (0, 5, 0), (10, 5, 2)])
def test_what_was_never_scored_has_no_drain_time(pending, rate, drain):
    labels = {"variant": "small", "replica": "s1"}
    samples = [
        Sample("reranker_pending_tokens", labels, pending),
        Sample("reranker_tokens_per_second", labels, rate),
    ]
    assert summary(samples)["variants"]["small"]["drain_s"] == drain


def test_without_metrics_it_still_says_what_runs():
    answer = summary(None)
    assert answer["variants"] is None
    assert answer["calls"] is None
    assert len(answer["applications"]) == 2


def test_nothing_of_the_settings_is_in_it():
    assert "secret" not in str(summary([]))


def test_many_who_ask_at_once_share_one_look():
    looks = []

    async def scrape(nodes):
        await asyncio.sleep(0)
        return None

    async def ask():
        found = Overview(lambda: looks.append(1) or (DETAILS, NODES), scrape)
        return await asyncio.gather(*(found.answer() for _ in range(20)))

    answers = asyncio.run(ask())
    assert len(looks) == 1
    assert all(answer is answers[0] for answer in answers)


def test_it_needs_a_key_where_there_are_keys(monkeypatch):
    monkeypatch.setenv("SERVE_APP_API_KEYS", "shop:0123456789abcdef")

    async def scrape(nodes):
        return None

    monkeypatch.setattr(overview, "_look", lambda: (DETAILS, NODES))
    monkeypatch.setattr(overview, "_scrape", scrape)
    gateway = Gateway()
    assert isinstance(gateway.app, FastAPI)
    assert gateway.request("GET", "/v1/fleet").status_code == 401
    answer = gateway.request("GET", "/v1/fleet", headers={"Authorization": "Bearer 0123456789abcdef"})
    assert answer.status_code == 200
    assert answer.json()["applications"][0]["name"] == "gateway"
