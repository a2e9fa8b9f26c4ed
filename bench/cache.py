"""What the score cache saves: the same search again, and a list of which half was scored before. And what a Redis
behind it costs that doesn't answer.

    python -m bench.cache [--rounds N]

MiniLM behind the gateway with HAProxy, keys and metrics on; the example catalogue, 100 candidates. One client.
Redis without all that: the gateway's scoring alone, 100 new documents a call.
"""

import argparse
import asyncio
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.common import Spread, percentile, save, show
from bench.fleet import HEADERS, catalogue, config, fleet
from tests import models

ROOT = Path(__file__).parents[1]
_QUERIES, _DOCUMENTS = 4, 100
# Calls after Redis has failed, of which the first three wait for it.
_CALLS = 6


def run(rounds: int) -> dict[str, Any]:
    from serve_app.recall.builder import build_index
    from tests.system.conftest import MINILM, reranker

    rng = random.Random(5)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        build_index(ROOT / "examples" / "catalog.jsonl", index)
        settings = {
            "recall": "catalogue",
            "variants": {"minilm": {"pairs_per_call": 64}},
            "pipelines": {"rerank": {"recall_k": _DOCUMENTS, "stages": [{"variant": "minilm"}]}},
            "routes": {"default": {"weights": {"rerank": 100}, "timeout_ms": 60_000}},
        }
        took: dict[str, list[float]] = {"search, first": [], "search, again": [], "rerank, first": []}
        took |= {"rerank, again": [], "rerank, half of it new": []}
        rounds_ms: dict[str, list[float]] = {name: [] for name in took}
        computed: list[int] = []
        served = config(settings, catalogue(index), reranker("minilm", MINILM))
        with fleet(served) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=90) as client:
            for i in range(rounds):
                for name in took:
                    took[name].clear()
                for j in range(_QUERIES):
                    query = f"wireless headphones {rng.choice(('black', 'red', 'blue'))} {i} {j}"
                    search = {"query": query, "top_n": 10}
                    documents = [models.text(rng, 30) for _ in range(_DOCUMENTS + _DOCUMENTS // 2)]
                    whole = {"query": query, "documents": documents[:_DOCUMENTS]}
                    half = {"query": query, "documents": documents[_DOCUMENTS // 2 :]}
                    for name, path, body in (
                        ("search, first", "/v1/search", search),
                        ("search, again", "/v1/search", search),
                        ("rerank, first", "/v1/rerank", whole),
                        ("rerank, again", "/v1/rerank", whole),
                        ("rerank, half of it new", "/v1/rerank", half),
                    ):
                        ms, stage = _call(client, path, body)
                        took[name].append(ms)
                        if name == "rerank, half of it new":
                            computed.append(stage["pairs"] - stage["cache_hits"])
                        elif name.endswith("again"):
                            assert stage["cache_hits"] == stage["pairs"], stage
                for name, values in took.items():
                    rounds_ms[name].append(percentile(values, 0.5))
    result = {
        "p50_ms": {name: Spread.of(values) for name, values in rounds_ms.items()},
        "computed_of_half_new": statistics.mean(computed),
    }
    show(
        f"{_DOCUMENTS} documents; where half are new, {result['computed_of_half_new']:g} pairs are computed",
        ["", "p50 ms"],
        [[name, spread.text()] for name, spread in result["p50_ms"].items()],
    )
    return result


def failing_redis(rounds: int) -> dict[str, Any]:
    """Milliseconds that calls take longer with a Redis behind the cache that is stopped, killed or refuses."""
    from tests.processes.redis_server import RedisServer

    first: dict[str, list[float]] = {"stopped": [], "killed": [], "refusing": []}
    later: dict[str, list[float]] = {how: [] for how in first}
    # A line for every time it goes out.
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        try:
            for _ in range(rounds):
                for how in first:
                    plain = statistics.median(asyncio.run(_calls(None, server)))
                    costs = [ms - plain for ms in asyncio.run(_calls(how, server))]
                    first[how] += costs[:3]
                    later[how] += costs[3:]
        finally:
            server.kill()
            logging.disable(logging.NOTSET)
    result = {
        "first_three_ms": {how: Spread.of(costs) for how, costs in first.items()},
        "later_ms": {how: Spread.of(costs) for how, costs in later.items()},
    }
    show(
        f"A call's added ms where Redis doesn't answer, {rounds} rounds of six calls",
        ["Redis is", "the first three", "the next three"],
        [[how, result["first_three_ms"][how].text(2), result["later_ms"][how].text(2)] for how in first],
    )
    return result


async def _calls(how: str | None, server: Any) -> list[float]:
    """Milliseconds of calls that find nothing, one after the other; without Redis, or after it has failed."""
    from serve_app.config import Cache
    from serve_app.gateway.scoring import Scoring
    from tests.unit.test_gateway_cache import MIB, Replicas, ask

    scoring = Scoring(Replicas())
    password = ":wrong@" if how == "refusing" else ""
    url = f"redis://{password}127.0.0.1:{server.port}/0"
    scoring.configure(Cache(max_bytes=MIB, redis=None if how is None else url))
    if how in ("stopped", "killed"):
        # Not the first call, for which there is a connection to be made.
        await ask(scoring, ["a"])
        if how == "stopped":
            os.kill(server.process.pid, signal.SIGSTOP)
        else:
            server.kill()
    took = []
    for i in range(_CALLS):
        documents = [f"{time.monotonic_ns()} {i} {j}" for j in range(_DOCUMENTS)]
        before = time.monotonic()
        await ask(scoring, documents, size=64)
        took.append((time.monotonic() - before) * 1e3)
    if how == "stopped":
        os.kill(server.process.pid, signal.SIGCONT)
    elif how == "killed":
        server.start()
    if scoring._redis is not None:
        assert scoring.stats()["redis_out"]
        await scoring._redis.close()
    return took


def _call(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    began = time.monotonic()
    answer = client.post(path, json=body)
    ms = (time.monotonic() - began) * 1e3
    meta = answer.raise_for_status().json()["meta"]
    assert "degraded" not in meta, meta
    return ms, meta["stages"][-1]


def main() -> int:
    parser = argparse.ArgumentParser(description="What the score cache saves.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    # Before there is a fleet, which takes some of the machine.
    redis = failing_redis(4 * rounds) if shutil.which("redis-server") else None
    result = run(rounds)
    if redis is None:
        print("What a Redis costs that fails was not measured: redis-server is not installed.")
    print(save("cache", {**result, "failing_redis": redis}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
