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
        # The load is to reach the replicas.
        "cache": None,
    }
    return {
        "name": "gateway",
        "import_path": "serve_app.gateway:build",
        "route_prefix": "/",
        "deployments": [{"name": "Gateway", "user_config": settings}],
    }


def minilm(gpus: float, **scaling: Any) -> dict[str, Any]:
    settings = {
        "metrics_interval_s": 0.5,
        "look_back_period_s": 5,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 5,
        "policy": {
            "policy_function": "serve_app.autoscaling:DrainTime",
            "policy_kwargs": {"target_drain_s": 2, "max_utilization": 0.8},
        },
        **scaling,
    }
    options = {"num_cpus": 0.5, "num_gpus": gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    args = {**MINILM, "engine": {"dtype": "float32", "max_model_len": 256}}
    return reranker("minilm", args, ray_actor_options=options, autoscaling_config=settings)


def fixed(replicas: int) -> dict[str, Any]:
    """Without engines: what counts is where they are."""
    options = {"num_cpus": 0.1, "num_gpus": 0.25}
    return {
        "name": "quarters",
        "import_path": "tests.rollout.scorers:build",
        "route_prefix": None,
        "args": {},
        "deployments": [{"name": "Reranker", "ray_actor_options": options, "num_replicas": replicas}],
    }


def documents(rng: random.Random, count: int, words: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


class OpenLoad:
    """Calls at a rate, whether or not earlier ones are answered. `answers`: seconds, status, degraded."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[tuple[float, int, bool]] = []

    async def run(self, calls_per_s: float, seconds: float, body: Any, rng: random.Random | None = None) -> None:
        """At even intervals, or with `rng` at random ones (Poisson)."""
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            due, end = time.monotonic(), time.monotonic() + seconds
            while due < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self._call(client, body()))
                due += rng.expovariate(calls_per_s) if rng else 1 / calls_per_s

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
    """The `many` with which a `mixed` call takes one replica `work_s` on average, on this machine at its best:
    what else it does meanwhile would make the load too small. May leave more than one replica for a while."""
    body = {
        "model": "minilm",
        "query": "red",
        "documents": documents(random.Random(0), 64, 30),
        "timeout_ms": 60_000,
    }
    took = []
    for _ in range(5):
        start = time.monotonic()
        assert "degraded" not in cluster.client.post("/v1/rerank", json=body).json()["meta"]
        took.append(time.monotonic() - start)
    return max(1, round(work_s * 3 / 4 / (min(took) / 64)))


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
    """A sleeping variant of half a GPU a replica: two find a place on the head, a third on a new node."""
    sleeping = {"min_replicas": 0, "downscale_to_zero_delay_s": 12, "upscale_delay_s": 0}
    cluster.deploy([gateway("minilm"), minilm(0.5, max_replicas=3, **sleeping)])
    cluster.wait_gateway()
    assert not cluster.replicas("minilm")
    return cluster


def test_calls_to_a_sleeping_variant_wait_within_their_deadline_or_degrade(scaling: Cluster) -> None:
    body = {"model": "minilm", "query": "red light", "documents": ["a red light", "blue steel"]}
    hurried = scaling.client.post("/v1/rerank", json={**body, "timeout_ms": 1000})
    assert hurried.status_code == 200, hurried.text
    assert hurried.json()["meta"]["degraded"][0]["reason"] == "timeout"
    patient = scaling.client.post("/v1/rerank", json={**body, "timeout_ms": 60_000})
    assert patient.status_code == 200, patient.text
    assert "degraded" not in patient.json()["meta"]
    assert patient.json()["results"][0]["index"] == 0


def test_many_tiny_calls_add_no_replica(scaling: Cluster) -> None:
    rng = random.Random(1)
    load = OpenLoad(str(scaling.client.base_url))

    async def run() -> None:
        task = asyncio.create_task(load.run(8, 15, lambda: tiny(rng)))
        assert await until(task, lambda: len(scaling.replicas("minilm")) > 1, 25) is None
        await task

    asyncio.run(run())
    assert {status for _, status, _ in load.answers} == {200}
    assert not any(degraded for *_, degraded in load.answers)


def test_a_step_of_large_calls_adds_replicas_and_a_node_and_both_go_again(scaling: Cluster) -> None:
    rng = random.Random(2)
    load = OpenLoad(str(scaling.client.base_url))
    # One call a second takes a third of a replica, eight take nearly three.
    many = many_of(scaling, 0.35)
    wait_for(
        lambda: len(scaling.replicas("minilm")) == 1, 120, what="one replica, after what was measured is over"
    )

    async def run() -> tuple[float | None, float | None]:
        await load.run(1, 10, lambda: mixed(rng, many))
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
    wait_for(lambda: not scaling.replicas("minilm"), 240, what="the variant to sleep")
    wait_for(lambda: len(scaling.gpu_nodes()) == 1, 120, what="the node to leave")


def test_four_quarters_fill_a_gpu_and_the_fifth_waits_for_another(cluster: Cluster) -> None:
    (head,) = cluster.gpu_nodes()
    cluster.deploy([fixed(4)])
    wait_for(lambda: cluster.running("quarters") == 4, 300, what="four replicas")
    assert cluster.placed("quarters") == [head] * 4
    assert cluster.gpu_nodes() == {head}
    cluster.deploy([fixed(5)])
    wait_for(lambda: len(cluster.replicas("quarters")) == 5, 60, what="a fifth replica")
    assert cluster.placed("quarters") == [head] * 4
    wait_for(lambda: cluster.running("quarters") == 5, 300, what="the fifth replica")
    assert sorted(cluster.placed("quarters"), key=head.__ne__)[:4] == [head] * 4
    assert len(set(cluster.placed("quarters"))) == 2


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_minutes_at_sixty_per_cent_cause_at_most_one_action(cluster: Cluster) -> None:
    cluster.deploy([gateway("minilm"), minilm(0.5, min_replicas=1, max_replicas=3, downscale_delay_s=60)])
    wait_for(lambda: cluster.running("minilm") == 1, 300, what="the first replica")
    cluster.wait_gateway()
    many = many_of(cluster, 0.12)
    wait_for(
        lambda: len(cluster.replicas("minilm")) == 1, 300, what="one replica, after what was measured is over"
    )
    rng, load, seen = random.Random(3), OpenLoad(str(cluster.client.base_url)), [1]
    started = time.monotonic()

    async def run() -> None:
        task = asyncio.create_task(load.run(5, 660, lambda: mixed(rng, many), rng))
        while not task.done():
            now = len([r for r in cluster.replicas("minilm") if r["state"] in ("STARTING", "RUNNING")])
            if now != seen[-1]:
                print(f"{time.monotonic() - started:.0f} s: {now} replicas")
                if time.monotonic() - started > 60:
                    seen.append(now)
                else:
                    seen[:] = [now]
            await asyncio.sleep(0.5)
        await task

    asyncio.run(run())
    took = sorted(seconds for seconds, *_ in load.answers)
    print(f"{len(took)} calls, p50 {took[len(took) // 2]:.2f} s, p95 {took[len(took) * 95 // 100]:.2f} s")
    assert {status for _, status, _ in load.answers} == {200}
    assert len(seen) - 1 <= 1
