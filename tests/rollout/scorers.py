"""Rerankers without a model, each good or bad in its own way: `import_path: tests.rollout.scorers:build`.

`args`: `takes_ms`, and `behaviour`, one of good, raises, hangs and shuffles.
"""

import asyncio
import random
from typing import Any

from ray import serve

from serve_app.reranker.messages import ScoreRequest, ScoreResult


def build(args: dict[str, Any]) -> serve.Application:
    return Reranker.bind(**args)


@serve.deployment(
    name="Reranker",
    max_ongoing_requests=64,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=2,
    graceful_shutdown_wait_loop_s=0.1,
    ray_actor_options={"num_cpus": 0.1},
)
class Reranker:
    """Scores a document by the part of the query's words that it has."""

    def __init__(self, takes_ms: float = 20, behaviour: str = "good") -> None:
        self._takes_s = takes_ms / 1e3
        self._behaviour = behaviour

    async def score(self, request: ScoreRequest) -> ScoreResult:
        if self._behaviour == "raises":
            raise RuntimeError("made to fail")
        await asyncio.sleep(120 if self._behaviour == "hangs" else self._takes_s)
        if self._behaviour == "shuffles":
            scores = [random.random() for _ in request.documents]
        else:
            words = set(request.query.lower().split())
            scores = [len(words & set(text.lower().split())) / len(words) for text in request.documents]
        return ScoreResult(scores, scores, len(request.documents), 0, 0, self._behaviour, self._takes_s * 1e3)
