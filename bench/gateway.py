"""What the gateway adds: rerank calls of 10 documents over a reranker that does nothing.

    python -m bench.gateway [--rounds N]

First with Serve's own proxy, then with the environment of configs/serve.env (HAProxy), keys and metrics on: one
client at a time for the latency, then 16 for the calls a second. The load comes from this process and shares the
machine's cores with the fleet: an eighth of the two, on uvloop.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import uvloop

from bench.common import Spread, closed_loop, percentile, save, show
from bench.fleet import HEADERS, config, fleet

_FLEETS = {"Serve's proxy": False, "HAProxy": True}
_CLIENTS = 16
_DOCUMENTS = [f"A document of some words that nobody reads, number {i}" for i in range(10)]
_SETTINGS = {
    "variants": {"noop": {}},
    "pipelines": {"rerank": {"stages": [{"variant": "noop"}]}},
    "routes": {"default": {"weights": {"rerank": 100}}},
    "cache": None,
}
_NOOP = {"name": "noop", "import_path": "bench.noop:build", "route_prefix": None, "args": {}}


def bodies() -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        yield {"query": f"some words {number}", "documents": _DOCUMENTS}


def run(rounds: int) -> dict[str, Any]:
    latencies: dict[str, list[float]] = {name: [] for name in _FLEETS}
    slow: dict[str, list[float]] = {name: [] for name in _FLEETS}
    rates: dict[str, list[float]] = {name: [] for name in _FLEETS}
    for name, fast in _FLEETS.items():
        # One at a time: an idle Ray takes a sixth of a core, which is one in twelve here.
        with fleet(config(_SETTINGS, _NOOP), fast=fast) as base:
            url = f"{base}/v1/rerank"
            uvloop.run(closed_loop(url, bodies(), _CLIENTS, 3, HEADERS))
            for _ in range(rounds):
                took = uvloop.run(closed_loop(url, bodies(), 1, 2, HEADERS))
                latencies[name].append(percentile(took, 0.5) * 1e3)
                slow[name].append(percentile(took, 0.99) * 1e3)
                rates[name].append(len(uvloop.run(closed_loop(url, bodies(), _CLIENTS, 4, HEADERS))) / 4)
    result = {
        name: {
            "p50_ms": Spread.of(latencies[name]),
            "p99_ms": Spread.of(slow[name]),
            "calls_per_s": Spread.of(rates[name]),
        }
        for name in _FLEETS
    }
    show(
        "10 documents over a reranker that does nothing",
        ["", "p50 ms, one client", "p99 ms", f"calls/s, {_CLIENTS} clients"],
        [
            [name, figures["p50_ms"].text(), figures["p99_ms"].text(), figures["calls_per_s"].text()]
            for name, figures in result.items()
        ],
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="What the gateway adds.")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(save("gateway", run(arguments.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
