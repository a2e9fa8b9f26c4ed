"""What the gateway adds: rerank calls of 10 documents over a reranker that does nothing.

    python -m bench.gateway [--rounds N]

Two fleets are up at once, one with Serve's own proxy and one with the environment of configs/serve.env (HAProxy),
and take turns: one client at a time for the latency, then 16 for the calls a second. The load comes from this
process and shares the machine's cores with them.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import Spread, closed_loop, percentile, save, show
from serve_app.access import API_KEYS
from serve_app.launch import ENVIRONMENT, FAST

ROOT = Path(__file__).parents[1]
_FLEETS = {"Serve's proxy": "plain", "HAProxy": "fast"}
_CLIENTS = 16
_KEY = "a-key-of-the-benchmark"
_HEADERS = {"Authorization": f"Bearer {_KEY}"}
_DOCUMENTS = [f"A document of some words that nobody reads, number {i}" for i in range(10)]


def config(port: int) -> dict[str, Any]:
    settings = {
        "variants": {"noop": {}},
        "pipelines": {"rerank": {"stages": [{"variant": "noop"}]}},
        "routes": {"default": {"weights": {"rerank": 100}}},
        "cache": None,
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "gateway",
                "import_path": "serve_app.gateway:build",
                "route_prefix": "/",
                "deployments": [{"name": "Gateway", "user_config": settings}],
            },
            {"name": "noop", "import_path": "bench.noop:build", "route_prefix": None, "args": {}},
        ],
    }


def serve_until_told(port: int) -> None:
    """Serves, says `ready` on stdout, and stops at the end of stdin."""
    from tests.system.conftest import System, serving

    with serving(System(config(port))):
        print("ready", flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def fleet(mode: str) -> Iterator[str]:
    """The URL of a fleet of its own process."""
    from tests.system.conftest import free_port

    port = free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gateway", "--serve", str(port)],
        env={
            **os.environ,
            **ENVIRONMENT,
            **(FAST if mode == "fast" else {}),
            API_KEYS: f"bench:{_KEY}",
            "PYTHONPATH": path,
        },
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "ready":
                break
        else:
            raise RuntimeError(f"the {mode} fleet did not start: exit {process.wait()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()


def bodies() -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        yield {"query": f"some words {number}", "documents": _DOCUMENTS}


def run(rounds: int) -> dict[str, Any]:
    latencies: dict[str, list[float]] = {name: [] for name in _FLEETS}
    slow: dict[str, list[float]] = {name: [] for name in _FLEETS}
    rates: dict[str, list[float]] = {name: [] for name in _FLEETS}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(fleet(mode)) + "/v1/rerank" for name, mode in _FLEETS.items()}
        for url in urls.values():
            asyncio.run(closed_loop(url, bodies(), _CLIENTS, 3, _HEADERS))
        for _ in range(rounds):
            for name, url in urls.items():
                took = asyncio.run(closed_loop(url, bodies(), 1, 2, _HEADERS))
                latencies[name].append(percentile(took, 0.5) * 1e3)
                slow[name].append(percentile(took, 0.99) * 1e3)
                rates[name].append(len(asyncio.run(closed_loop(url, bodies(), _CLIENTS, 4, _HEADERS))) / 4)
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
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_told(arguments.serve)
        return 0
    print(save("gateway", run(arguments.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
