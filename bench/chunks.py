"""Chunks on two replicas: how many pairs a handle call should carry, and what a query's own replica is worth.

    python -m bench.chunks [--rounds N]

Two replicas of one core each, a tiny model, through the gateway's own code for handle calls. Sizes of chunks take
turns on calls of 200 short documents, one at a time and four at once. Then a variant beside the same one with
Serve's own router: long queries that come again and again with other documents, at a sixth of what the replicas
can do, where the heads of all queries fit into both prefix caches together but not into one; and one query that
eight clients ask at once, whose replica would be the busier one.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from bench.common import Spread, percentile, save, show
from bench.engine import SHAPES
from bench.fleet import config
from serve_app.config import RerankerArgs
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.scoring import even_chunk
from serve_app.reranker.messages import ScoreRequest
from tests import models

SIZES = (16, 32, 64, 128, 200)
AT_ONCE = {1: 5, 4: 8}
_DOCUMENTS = 200
# The prefix that a query's replica has: what a long question, a page or a function is searched by.
_QUERY_WORDS = 300
# Tokens of keys and values, 256 bytes each in the tiny model.
_KV_CACHE_BYTES = 12_288 * 256
# Their heads have 450 tokens each, 13,500 in all. Calls of eight documents, each of which takes a core 25 ms.
_QUERIES, _CALLS, _CALLS_PER_S = 30, 90, 12.0
_ROUTERS = {"own": "the query's replica first", "serves": "Serve's two at random"}


def serves_router(args: RerankerArgs) -> serve.Application:
    """A variant with Serve's own router: `import_path: bench.chunks:serves_router`."""
    from serve_app.reranker.deployment import Front, Reranker

    plain = Reranker.options(request_router_config=RequestRouterConfig())  # type: ignore[attr-defined]
    return Front.bind(plain.bind(args))  # type: ignore[attr-defined]


def run(rounds: int) -> dict[str, Any]:
    from tests.system.conftest import System, reranker, serving

    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    two = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
    with tempfile.TemporaryDirectory() as folder:
        model = models.qwen3_without_weights(Path(folder) / "model", **SHAPES["tiny"])

        def arguments(**engine: Any) -> dict[str, Any]:
            engine = {"max_model_len": 1024, "load_format": "dummy", **engine}
            return {"model": str(model), "kind": "qwen3-reranker", "engine": engine}

        small_cache = arguments(kv_cache_memory_bytes=_KV_CACHE_BYTES)
        variants = [
            reranker("large-cache", arguments(), **two),
            reranker("own", small_cache, **two),
            {**reranker("serves", small_cache, **two), "import_path": "bench.chunks:serves_router"},
        ]
        settings = {
            "variants": {variant["name"]: {} for variant in variants},
            "pipelines": {"rerank": {"stages": [{"variant": "own"}]}},
            "routes": {"default": {"weights": {"rerank": 100}}},
        }
        with serving(System(config(settings, *variants))):
            return {"sizes": asyncio.run(_sizes(rounds)), "routers": asyncio.run(_routers(rounds))}


class _Caller:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._fleet = Fleet()

    def words(self, n: int) -> str:
        return models.text(self.rng, n)

    async def call(self, variant: str, query: str, documents: int, size: int = 64) -> tuple[float, int]:
        """Seconds that it took, and tokens that were computed for it."""
        began = time.monotonic()
        request = ScoreRequest(query, [self.words(20) for _ in range(documents)])
        parts = await self._fleet.score(variant, request, even_chunk(documents, size), 120.0)
        return time.monotonic() - began, sum(part.tokens - part.cached_tokens for part in parts)


async def _clients(
    at_once: int, calls: int, one: Callable[[], Awaitable[tuple[float, int]]]
) -> tuple[list[float], float]:
    """Seconds of each call, and of all."""
    took: list[float] = []

    async def client() -> None:
        for _ in range(calls):
            took.append((await one())[0])

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return took, time.monotonic() - began


async def _sizes(rounds: int) -> dict[int, dict[int, dict[str, Spread]]]:
    caller = _Caller(3)
    await _clients(4, 2, lambda: caller.call("large-cache", caller.words(5), 64, 16))
    rates: dict[tuple[int, int], list[float]] = {}
    p50s: dict[tuple[int, int], list[float]] = {}
    for n in range(rounds):
        for at_once, calls in AT_ONCE.items():
            for size in SIZES[n % len(SIZES) :] + SIZES[: n % len(SIZES)]:
                took, whole = await _clients(
                    at_once,
                    -(-calls // at_once),
                    lambda size=size: caller.call("large-cache", caller.words(5), _DOCUMENTS, size),  # type: ignore[misc]
                )
                rates.setdefault((at_once, size), []).append(len(took) * _DOCUMENTS / whole)
                p50s.setdefault((at_once, size), []).append(percentile(took, 0.5) * 1e3)
    sizes = {
        at_once: {
            size: {"p50_ms": Spread.of(p50s[at_once, size]), "pairs_per_s": Spread.of(rates[at_once, size])}
            for size in SIZES
        }
        for at_once in AT_ONCE
    }
    show(
        f"Calls of {_DOCUMENTS} documents on two replicas, by pairs_per_call",
        ["pairs_per_call", *(f"{what}, {n} at once" for n in AT_ONCE for what in ("p50 ms", "pairs/s"))],
        [[str(size), *(spread.text() for n in AT_ONCE for spread in sizes[n][size].values())] for size in SIZES],
    )
    return sizes


async def _routers(rounds: int) -> dict[str, dict[str, Spread]]:
    caller = _Caller(5)
    found: dict[str, dict[str, list[float]]] = {
        name: {"again_p50_ms": [], "again_tokens": [], "crowd_pairs_per_s": []} for name in _ROUTERS
    }
    for variant in _ROUTERS:
        await _clients(4, 2, lambda variant=variant: caller.call(variant, caller.words(5), 16))  # type: ignore[misc]
    for n in range(rounds):
        in_turn = list(_ROUTERS) if n % 2 else list(reversed(_ROUTERS))
        queries = [caller.words(_QUERY_WORDS) for _ in range(_QUERIES)]
        # The same calls at the same times for both.
        asked = [(caller.rng.expovariate(_CALLS_PER_S), caller.rng.choice(queries)) for _ in range(_CALLS)]
        for variant in in_turn:
            again = await _arriving(caller, variant, asked)
            found[variant]["again_p50_ms"].append(percentile([took for took, _ in again], 0.5) * 1e3)
            found[variant]["again_tokens"].append(sum(tokens for _, tokens in again) / len(again))
        query = caller.words(_QUERY_WORDS)
        for variant in in_turn:
            took, whole = await _clients(
                8, 2, lambda variant=variant, query=query: caller.call(variant, query, 32)
            )  # type: ignore[misc]
            found[variant]["crowd_pairs_per_s"].append(len(took) * 32 / whole)
    routers = {name: {what: Spread.of(values) for what, values in of.items()} for name, of in found.items()}
    show(
        "Routers: long queries that come again, and eight clients with one query",
        ["", "p50 ms, again", "tokens computed, again", "pairs/s, eight clients"],
        [[_ROUTERS[name], *(spread.text(4) for spread in of.values())] for name, of in routers.items()],
    )
    return routers


async def _arriving(caller: _Caller, variant: str, asked: list[tuple[float, str]]) -> list[tuple[float, int]]:
    """Seconds and tokens of the calls whose query had come before."""
    calls: list[asyncio.Task[tuple[float, int]]] = []
    seen: set[str] = set()
    again: list[bool] = []
    for pause_s, query in asked:
        await asyncio.sleep(pause_s)
        calls.append(asyncio.create_task(caller.call(variant, query, 8)))
        again.append(query in seen)
        seen.add(query)
    answers = await asyncio.gather(*calls)
    return [answer for answer, was_seen in zip(answers, again, strict=True) if was_seen]


def main() -> int:
    parser = argparse.ArgumentParser(description="Chunks on two replicas.")
    parser.add_argument("--rounds", type=int, default=5)
    print(save("chunks", run(parser.parse_args().rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
