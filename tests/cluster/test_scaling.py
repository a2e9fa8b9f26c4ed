"""Replicas by the backlog in tokens, GPUs by fractions, nodes by Ray's autoscaler; engines on the CPU."""

import asyncio
import random
import time
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Cluster
from tests.system.conftest import MINILM, reranker, wait_for

WORDS = ("red", "blue", "light", "warm", "soft", "strong", "small", "cotton", "steel", "glass", "wood", "travel")


def gateway(*variants: str) -> dict[str, Any]:
    settings = {
        "variants": {name: {"pairs_per_call": 16} for name in variants},
        "pipelines": {"rerank": {"stages": [{"variant": variants[0]}]}},
        "routes": {"default": {"weights": {"rerank": 100}, "timeout_ms": 3000}},
    }
    return {
        "name": "gateway",
        "import_path": "serve_app.gateway:build",
        "route_prefix": "/",
        "deployments": [{"name": "Gateway", "user_config": settings}],
    }


def minilm(gpus: float, **scaling: Any) -> dict[str, Any]:
    settings = {
        "metrics_interval_s": 1,
        "look_back_period_s": 5,
        "upscale_delay_s": 1,
        "downscale_delay_s": 10,
        "policy": {
            "policy_function": "serve_app.autoscaling:DrainTime",
            "policy_kwargs": {"target_drain_s": 1.5, "max_utilization": 0.8},
        },
        **scaling,
    }
    options = {"num_cpus": 0.5, "num_gpus": gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    args = {**MINILM, "engine": {"dtype": "float32", "max_model_len": 256}}
    return reranker("minilm", args, ray_actor_options=options, autoscaling_config=settings)


def documents(rng: random.Random, count: int, words: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


class OpenLoad:
    """Calls at a rate, whether or not earlier ones are answered. `answers`: seconds, status, degraded."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[tuple[float, int, bool]] = []

    async def run(self, calls_per_s: float, seconds: float, body: Any) -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            start = time.monotonic()
            for i in range(int(calls_per_s * seconds)):
                await asyncio.sleep(max(0.0, start + i / calls_per_s - time.monotonic()))
                group.create_task(self._call(client, body()))

    async def _call(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        start = time.monotonic()
        answer = await client.post("/v1/rerank", json=body)
        degraded = answer.status_code == 200 and "degraded" in answer.json()["meta"]
        self.answers.append((time.monotonic() - start, answer.status_code, degraded))


def mixed(rng: random.Random, many: int) -> dict[str, Any]:
    """5 titles, `many` descriptions, or three times as many."""
    count, words = rng.choice([(5, 6), (many, 30), (3 * many, 30)])
    return {"model": "minilm", "query": "warm red light", "documents": documents(rng, count, words)}


def many_of(cluster: Cluster, work_s: float) -> int:
    """The `many` with which a `mixed` call takes one replica `work_s` on average, on this machine, now."""
    body = {
        "model": "minilm",
        "query": "red",
        "documents": documents(random.Random(0), 64, 30),
        "timeout_ms": 60_000,
    }
    took = []
    for _ in range(3):
        start = time.monotonic()
        assert "degraded" not in cluster.client.post("/v1/rerank", json=body).json()["meta"]
        took.append(time.monotonic() - start)
    return max(1, round(work_s * 3 / 4 / (sorted(took)[1] / 64)))


def tiny(rng: random.Random) -> dict[str, Any]:
    return {"model": "minilm", "query": "red", "documents": documents(rng, 3, 2)}


async def until(load: "asyncio.Task[None]", condition: Any, limit_s: float) -> float | None:
    """Seconds until `condition` holds while the load goes on; None when it does not within `limit_s`."""
    start = time.monotonic()
    while time.monotonic() - start < limit_s and not load.done():
        if await asyncio.to_thread(condition):
            return time.monotonic() - start
        await asyncio.sleep(0.2)
    return None


@pytest.fixture(scope="module")
def scaling(cluster: Cluster) -> Cluster:
    """A variant of half a GPU a replica, of which two find a place on the head, and a third on a new node."""
    cluster.deploy([gateway("minilm"), minilm(0.5, min_replicas=1, max_replicas=3)])
    wait_for(lambda: cluster.running("minilm") == 1, 300, what="the first replica")
    cluster.wait_gateway("minilm")
    return cluster


def test_many_tiny_calls_add_no_replica(scaling: Cluster) -> None:
    rng = random.Random(1)
    load = OpenLoad(str(scaling.client.base_url))

    async def run() -> None:
        task = asyncio.create_task(load.run(8, 30, lambda: tiny(rng)))
        assert await until(task, lambda: len(scaling.replicas("minilm")) > 1, 40) is None
        await task

    asyncio.run(run())
    assert {status for _, status, _ in load.answers} == {200}
    assert not any(degraded for *_, degraded in load.answers)


def test_a_step_of_large_calls_adds_replicas_and_a_node_and_both_go_again(scaling: Cluster) -> None:
    rng = random.Random(2)
    load = OpenLoad(str(scaling.client.base_url))
    # One call a second takes a fifth of a replica, eight take one and a half.
    many = many_of(scaling, 0.19)

    async def run() -> tuple[float | None, float | None]:
        await load.run(1, 20, lambda: mixed(rng, many))
        assert len(scaling.replicas("minilm")) == 1
        task = asyncio.create_task(load.run(8, 100, lambda: mixed(rng, many)))
        second = await until(task, lambda: len(scaling.placed("minilm")) >= 2, 60)
        third = await until(task, lambda: len(set(scaling.placed("minilm"))) == 2, 90)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return second, third

    second, third = asyncio.run(run())
    print(f"second replica placed after {second} s, third on a node of its own {third} s later")
    assert second is not None
    assert third is not None
    assert {status for _, status, _ in load.answers} == {200}
    assert len(scaling.gpu_nodes()) == 2
    wait_for(lambda: len(scaling.replicas("minilm")) == 1, 180, what="the replicas to go")
    wait_for(lambda: len(scaling.gpu_nodes()) == 1, 120, what="the node to leave")
