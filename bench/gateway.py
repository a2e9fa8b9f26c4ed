"""What the gateway adds: rerank calls of 10 documents over a reranker that does nothing.

    python -m bench.gateway [--rounds N]

First with Serve's own proxy, then with the environment of configs/serve.env (HAProxy), keys and metrics on: one
client at a time for the latency, then 16 for the calls a second. In turns with a bare application of Serve's,
which hands the JSON on and does nothing else: what is above it is ours. The load comes from this process and
shares the machine's cores with the fleet: an eighth of the two, on uvloop.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import uvloop

from bench.common import Spread, closed_loop, percentile, save, show
from bench.fleet import HEADERS, config, fleet

_FLEETS = {"Serve's proxy": False, "HAProxy": True}
_PATHS = {"gateway": "/v1/rerank", "bare Serve": "/bare/rerank"}
_CLIENTS = 16
_DOCUMENTS = [f"A document of some words that nobody reads, number {i}" for i in range(10)]
_SETTINGS = {
    "variants": {"noop": {}},
    "pipelines": {"rerank": {"stages": [{"variant": "noop"}]}},
    "routes": {"default": {"weights": {"rerank": 100}}},
    "cache": None,
}
_NOOP = {"name": "noop", "import_path": "bench.noop:build", "route_prefix": None, "args": {}}
_BARE = {"name": "bare", "import_path": "bench.noop:bare", "route_prefix": "/bare", "args": {}}


def bodies() -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        yield {"query": f"some words {number}", "documents": _DOCUMENTS}


def run(rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for proxy, fast in _FLEETS.items():
        # One at a time: an idle Ray takes a sixth of a core, which is one in twelve here.
        with fleet(config(_SETTINGS, _NOOP, _BARE), fast=fast) as base:
            for name, figures in _fleet(base, rounds).items():
                result[f"{proxy}, {name}"] = figures
    show(
        "10 documents over a reranker that does nothing",
        ["", "p50 ms, one client", "p99 ms", f"calls/s, {_CLIENTS} clients"],
        [
            [name, figures["p50_ms"].text(), figures["p99_ms"].text(), figures["calls_per_s"].text()]
            for name, figures in result.items()
        ],
    )
    return result


def _fleet(base: str, rounds: int) -> dict[str, dict[str, Spread]]:
    names = list(_PATHS)
    figures: dict[str, dict[str, list[float]]] = {
        name: {"p50_ms": [], "p99_ms": [], "calls_per_s": []} for name in names
    }
    for name in names:
        uvloop.run(closed_loop(base + _PATHS[name], bodies(), _CLIENTS, 3, HEADERS))
    for i in range(rounds):
        for name in names if i % 2 else reversed(names):
            took, _ = uvloop.run(closed_loop(base + _PATHS[name], bodies(), 1, 2, HEADERS))
            figures[name]["p50_ms"].append(percentile(took, 0.5) * 1e3)
            figures[name]["p99_ms"].append(percentile(took, 0.99) * 1e3)
            calls, seconds = uvloop.run(closed_loop(base + _PATHS[name], bodies(), _CLIENTS, 4, HEADERS))
            figures[name]["calls_per_s"].append(len(calls) / seconds)
    return {name: {what: Spread.of(values) for what, values in taken.items()} for name, taken in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="What the gateway adds.")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(save("gateway", run(arguments.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
