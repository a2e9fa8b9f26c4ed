"""Evaluation: the queries of a BEIR-layout folder sent through a running gateway: how good, and how fast."""

import asyncio
from pathlib import Path

import httpx

from serve_app.evaluation.client import EvaluationError, Gateway
from serve_app.evaluation.dataset import DatasetError, read_dataset
from serve_app.evaluation.measure import measure
from serve_app.evaluation.report import Report

# A day; a gateway's own limit (limits.max_timeout_ms) is far below.
MAX_TIMEOUT_S = 86_400

__all__ = ["DatasetError", "EvaluationError", "Report", "evaluate"]


def evaluate(
    dataset: Path | str,
    url: str,
    route: str | None = None,
    models: list[str] | None = None,
    concurrency: int = 4,
    top_n: int = 100,
    timeout_s: float = 30.0,
    limit: int | None = None,
    ignore_identical_ids: bool = False,
    progress: bool | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Report:
    """Measures recall alone and every pipeline of the gateway at `url` on the judged queries of `dataset`.

    `route` restricts this to the pipelines that get that route's calls now, `models` to these names (pipelines
    or variants). `concurrency` queries are under way at once; each has the deadline `timeout_s`, also at the
    gateway. `top_n` results are asked for, 100 for recall@100. `limit` takes the first so many judged queries.
    `ignore_identical_ids` leaves out an answered document whose id is the query's, as BEIR does.
    `progress` draws a bar on stderr; None: if that is a terminal. `transport` is for tests.

    Raises `DatasetError` for a bad folder, and `EvaluationError` when the gateway cannot be asked at all.
    Queries that fail one by one count as answered with nothing, and are reported. Where the gateway goes away
    later, or Ctrl-C comes, the report has the systems that were finished, if any were, and says so in `stopped`.
    """
    for name, value in (("concurrency", concurrency), ("top_n", top_n), ("limit", limit)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}; allowed: 1 or more")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise EvaluationError(f"timeout_s is {timeout_s:g}; allowed: more than 0, up to {MAX_TIMEOUT_S:,}")
    data = read_dataset(Path(dataset), limit)

    async def run() -> Report:
        async with Gateway(url, timeout_s, concurrency, transport) as gateway:
            return await measure(data, gateway, route, models, concurrency, top_n, ignore_identical_ids, progress)

    return asyncio.run(run())
