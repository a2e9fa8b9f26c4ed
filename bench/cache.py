"""What the score cache saves: the same search again, and a list of which half was scored before.

    python -m bench.cache [--rounds N]

MiniLM behind the gateway with HAProxy, keys and metrics on; the example catalogue, 100 candidates. One client.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.common import Spread, percentile, save, show
from serve_app.access import API_KEYS
from serve_app.launch import ENVIRONMENT, FAST
from tests import models

ROOT = Path(__file__).parents[1]
_KEY = "a-key-of-the-benchmark"
_QUERIES, _DOCUMENTS = 20, 100


def run(rounds: int) -> dict[str, Any]:
    """In a process of its own, whose environment Serve reads as it is imported."""
    from serve_app.recall.builder import build_index
    from tests.system.conftest import MINILM, System, free_port, reranker, serving

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
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": free_port()},
            "applications": [
                {
                    "name": "gateway",
                    "import_path": "serve_app.gateway:build",
                    "route_prefix": "/",
                    "deployments": [{"name": "Gateway", "user_config": settings}],
                },
                {
                    "name": "catalogue",
                    "import_path": "serve_app.recall:build",
                    "route_prefix": None,
                    "args": {"index": str(index)},
                },
                reranker("minilm", MINILM),
            ],
        }
        system = System(config)
        system.client.headers["Authorization"] = f"Bearer {_KEY}"
        took: dict[str, list[float]] = {"search, first": [], "search, again": [], "rerank, first": []}
        took |= {"rerank, again": [], "rerank, half of it new": []}
        rounds_ms: dict[str, list[float]] = {name: [] for name in took}
        computed: list[int] = []
        with serving(system):
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
                        ms, stage = _call(system.client, path, body)
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
    wanted = {**ENVIRONMENT, **FAST, API_KEYS: f"bench:{_KEY}"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "bench.cache", "--rounds", str(rounds)]
        return subprocess.run(command, env={**os.environ, **wanted}, cwd=ROOT).returncode
    print(save("cache", run(rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
