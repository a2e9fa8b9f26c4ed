"""What the score cache saves: the same search again, and a list of which half was scored before.

    python -m bench.cache [--rounds N]

MiniLM behind the gateway with HAProxy, keys and metrics on; the example catalogue, 100 candidates. One client.
"""

import argparse
import random
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
    print(save("cache", run(parser.parse_args().rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
