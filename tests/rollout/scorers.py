"""Rerankers without a model, each good or bad in its own way: `import_path: tests.rollout.scorers:build`.

`args`: `takes_ms`; `behaviour`, one of good, raises, hangs and shuffles; and `revision`, with which scores are
the revision's own, and are said to be.
"""

import asyncio
import hashlib
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

    def __init__(self, takes_ms: float = 20, behaviour: str = "good", revision: str = "") -> None:
        self._takes_s = takes_ms / 1e3
        self._behaviour = behaviour
        self._revision = revision

    async def score(self, request: ScoreRequest) -> ScoreResult:
        if self._behaviour == "raises":
            raise RuntimeError("made to fail")
        await asyncio.sleep(120 if self._behaviour == "hangs" else self._takes_s)
        if self._behaviour == "shuffles":
            scores = [random.random() for _ in request.documents]
        elif self._revision:
            scores = [_fraction(f"{self._revision} {text}") for text in request.documents]
        else:
            words = set(request.query.lower().split())
            scores = [len(words & set(text.lower().split())) / len(words) for text in request.documents]
        tokens, took_ms = len(request.documents), self._takes_s * 1e3
        return ScoreResult(scores, scores, tokens, 0, 0, self._behaviour, took_ms, fingerprint=self._revision)

    async def info(self) -> dict[str, Any]:
        return {"fingerprint": self._revision}


def _fraction(text: str) -> float:
    """In [0, 1), the same for the same text; float32 has it, too."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big") / 2**16
