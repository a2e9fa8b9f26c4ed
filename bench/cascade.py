"""What a cascade costs and loses: a cheap stage over all candidates and a dear one over the best of them, beside
either alone, on a real collection.

    python -m bench.cascade [--dataset DIR] [--queries N]

The dear stage is MiniLM over whole documents, the cheap one the same model over their first tokens. Cost is
counted in tokens computed, which is what a GPU is paid for; milliseconds are this machine's, one query at a time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.common import percentile, save, show
from bench.fleet import HEADERS, catalogue, config, fleet

ROOT = Path(__file__).parents[1]
# Of real documents where it is there, else the example catalogue with its judged queries.
CRANFIELD = ROOT.parent / "shared" / "data" / "cranfield"
EXAMPLES = ROOT / "examples"
_RECALL_K, _KEEP, _FIRST_TOKENS = 100, 30, 32
_FUSION = {"method": "minmax", "recall_weight": 0.3}
PIPELINES: dict[str, dict[str, Any]] = {
    "bm25": {"recall_k": _RECALL_K},
    "cheap": {
        "recall_k": _RECALL_K,
        "stages": [{"variant": "minilm", "max_tokens_per_doc": _FIRST_TOKENS}],
        "fusion": _FUSION,
    },
    "dear": {"recall_k": _RECALL_K, "stages": [{"variant": "minilm"}], "fusion": _FUSION},
    "cascade": {
        "recall_k": _RECALL_K,
        "stages": [
            {"variant": "minilm", "max_tokens_per_doc": _FIRST_TOKENS, "keep": _KEEP},
            {"variant": "minilm"},
        ],
        "fusion": _FUSION,
    },
}


def run(dataset: Path, queries: int) -> dict[str, Any]:
    from serve_app.evaluation.dataset import read_dataset
    from serve_app.evaluation.metrics import means, quality
    from serve_app.recall.builder import build_index
    from tests.system.conftest import MINILM, reranker

    data = read_dataset(dataset, queries)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        build_index(EXAMPLES / "catalog.jsonl" if dataset == EXAMPLES else dataset, index)
        settings = {
            "recall": "catalogue",
            "variants": {"minilm": {"pairs_per_call": 64}},
            "pipelines": PIPELINES,
            "routes": {"default": {"weights": {"dear": 100}, "timeout_ms": 60_000}},
            "cache": None,
        }
        served = config(
            settings, catalogue(index), reranker("minilm", {**MINILM, "engine": {"max_model_len": 256}})
        )
        orders: dict[str, dict[str, list[str]]] = {name: {} for name in PIPELINES}
        tokens: dict[str, list[int]] = {name: [] for name in PIPELINES}
        took_ms: dict[str, list[float]] = {name: [] for name in PIPELINES}
        with fleet(served) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=90) as client:
            for query in data.queries:
                for name in PIPELINES:
                    sent = {"query": query.text, "model": name, "top_n": _RECALL_K}
                    began = time.monotonic()
                    answer = client.post("/v1/search", json=sent).raise_for_status().json()
                    took_ms[name].append((time.monotonic() - began) * 1e3)
                    assert "degraded" not in answer["meta"], answer["meta"]
                    orders[name][query.id] = [result["id"] for result in answer["results"]]
                    tokens[name].append(sum(stage.get("tokens", 0) for stage in answer["meta"]["stages"]))
    result: dict[str, Any] = {"dataset": dataset.name, "queries": len(data.queries), "pipelines": {}}
    for name in PIPELINES:
        found = means(list(quality(data.grades, orders[name]).values()))
        result["pipelines"][name] = {
            "ndcg@10": found["ndcg@10"],
            "tokens_per_query": statistics.mean(tokens[name]),
            "p50_ms": percentile(took_ms[name], 0.5),
            "p95_ms": percentile(took_ms[name], 0.95),
        }
    dear = result["pipelines"]["dear"]["tokens_per_query"]
    show(
        f"{dataset.name}, {len(data.queries)} queries, {_RECALL_K} candidates, {_KEEP} kept for the dear stage",
        ["pipeline", "nDCG@10", "tokens a query", "of dear's", "p50 ms", "p95 ms"],
        [
            [
                name,
                f"{figures['ndcg@10']:.4f}",
                f"{figures['tokens_per_query']:,.0f}",
                f"{figures['tokens_per_query'] / dear:.0%}",
                f"{figures['p50_ms']:,.0f}",
                f"{figures['p95_ms']:,.0f}",
            ]
            for name, figures in result["pipelines"].items()
        ],
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="What a cascade costs and what it loses.")
    parser.add_argument("--dataset", type=Path, default=CRANFIELD if CRANFIELD.is_dir() else EXAMPLES)
    parser.add_argument("--queries", type=int, default=225)
    arguments = parser.parse_args()
    print(save("cascade", run(arguments.dataset, arguments.queries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
