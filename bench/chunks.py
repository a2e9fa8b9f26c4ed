"""Chunks on two replicas: how many pairs a handle call should carry, and what a query's own replica is worth.

    python -m bench.chunks [--rounds N]

Two replicas of one core each. Sizes of chunks take turns on calls of 200 short documents, one at a time and four
at once, through the gateway's own code for handle calls. Then the same variant with Serve's own router beside it:
long queries that each come three times with other documents, one call at a time; and one query that all of eight
clients ask at once, whose replica is then the busier one.
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
    with tempfile.TemporaryDirectory() as folder:
        model = models.qwen3_without_weights(Path(folder) / "model", **SHAPES["tiny"])
        args = {
            "model": str(model),
            "kind": "qwen3-reranker",
            "engine": {"max_model_len": 1024, "load_format": "dummy"},
        }
        two = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
        variants = [
            reranker("own", args, **two),
            {**reranker("serves", args, **two), "import_path": "bench.chunks:serves_router"},
        ]
        settings = {
            "variants": {"own": {}, "serves": {}},
            "pipelines": {"rerank": {"stages": [{"variant": "own"}]}},
            "routes": {"default": {"weights": {"rerank": 100}}},
        }
        with serving(System(config(settings, *variants))):
            return asyncio.run(_measure(rounds))


async def _measure(rounds: int) -> dict[str, Any]:
    rng, fleet = random.Random(3), Fleet()

    async def call(variant: str, query: str, documents: int, size: int) -> tuple[int, int]:
        """Tokens, and those of them that were cached."""
        request = ScoreRequest(query, [models.text(rng, 20) for _ in range(documents)])
        parts = await fleet.score(variant, request, even_chunk(documents, size), 120.0)
        return sum(part.tokens for part in parts), sum(part.cached_tokens for part in parts)

    async def clients(at_once: int, calls: int, one: Callable[[], Awaitable[Any]]) -> tuple[list[float], float]:
        """Seconds of each call, and of all."""
        took: list[float] = []

        async def client() -> None:
            for _ in range(calls):
                began = time.monotonic()
                await one()
                took.append(time.monotonic() - began)

        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(at_once)))
        return took, time.monotonic() - began

    for variant in _ROUTERS:
        await clients(4, 2, lambda variant=variant: call(variant, models.text(rng, 5), 64, 16))  # type: ignore[misc]
    rates: dict[tuple[int, int], list[float]] = {}
    p50s: dict[tuple[int, int], list[float]] = {}
    again: dict[str, dict[str, list[float]]] = {name: {"ms": [], "computed": []} for name in _ROUTERS}
    crowds: dict[str, list[float]] = {name: [] for name in _ROUTERS}
    for n in range(rounds):
        for at_once, calls in AT_ONCE.items():
            for size in SIZES[n % len(SIZES) :] + SIZES[: n % len(SIZES)]:
                took, whole = await clients(
                    at_once,
                    -(-calls // at_once),
                    lambda size=size: call("own", models.text(rng, 5), _DOCUMENTS, size),  # type: ignore[misc]
                )
                rates.setdefault((at_once, size), []).append(len(took) * _DOCUMENTS / whole)
                p50s.setdefault((at_once, size), []).append(percentile(took, 0.5) * 1e3)
        for variant in _ROUTERS if n % 2 else reversed(_ROUTERS):
            tokens, later = [], []
            for _ in range(6):
                query = models.text(rng, _QUERY_WORDS)
                for time_ in range(3):
                    began = time.monotonic()
                    all_tokens, cached = await call(variant, query, 8, 64)
                    if time_:
                        later.append(time.monotonic() - began)
                        tokens.append(all_tokens - cached)
            again[variant]["ms"].append(percentile(later, 0.5) * 1e3)
            again[variant]["computed"].append(sum(tokens) / len(tokens))
        for variant in _ROUTERS if n % 2 else reversed(_ROUTERS):
            query = models.text(rng, _QUERY_WORDS)
            took, whole = await clients(8, 3, lambda variant=variant, query=query: call(variant, query, 32, 64))  # type: ignore[misc]
            crowds[variant].append(len(took) * 32 / whole)
    sizes = {
        at_once: {
            size: {"pairs_per_s": Spread.of(rates[at_once, size]), "p50_ms": Spread.of(p50s[at_once, size])}
            for size in SIZES
        }
        for at_once in AT_ONCE
    }
    show(
        f"Calls of {_DOCUMENTS} documents on two replicas, by pairs_per_call",
        [
            "pairs_per_call",
            *(f"{what}, {n} at once" for n in AT_ONCE for what in ("p50 ms", "pairs/s")),
        ],
        [
            [str(size), *(sizes[n][size][what].text() for n in AT_ONCE for what in ("p50_ms", "pairs_per_s"))]
            for size in SIZES
        ],
    )
    routers = {
        name: {
            "again_p50_ms": Spread.of(again[name]["ms"]),
            "again_tokens_computed": Spread.of(again[name]["computed"]),
            "crowd_pairs_per_s": Spread.of(crowds[name]),
        }
        for name in _ROUTERS
    }
    show(
        "Routers: the second and third call of a long query, and eight clients with one query",
        ["", "p50 ms, again", "tokens computed, again", "pairs/s, eight clients"],
        [[_ROUTERS[name], *(spread.text(4) for spread in found.values())] for name, found in routers.items()],
    )
    return {"sizes": sizes, "routers": routers}


def main() -> int:
    parser = argparse.ArgumentParser(description="Chunks on two replicas.")
    parser.add_argument("--rounds", type=int, default=5)
    print(save("chunks", run(parser.parse_args().rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
