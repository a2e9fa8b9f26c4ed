"""A gateway over a fleet that answers from functions: only what stands behind Serve handles is replaced."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from serve_app.gateway.app import create_app
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.service import Service
from serve_app.recall.messages import Candidate, RecallRequest, RecallResult
from serve_app.reranker.messages import ScoreRequest, ScoreResult

SETTINGS: dict[str, Any] = {
    "recall": "catalogue",
    "variants": {"small": {"pairs_per_call": 4, "scripts": ["Latin"]}, "large": {}},
    "pipelines": {
        "bm25": {"recall_k": 10},
        "one": {"recall_k": 10, "stages": [{"variant": "small"}]},
        "fused": {"recall_k": 10, "stages": [{"variant": "small"}], "fusion": {"recall_weight": 0.5}},
        "cascade": {"recall_k": 10, "stages": [{"variant": "small", "keep": 3}, {"variant": "large"}]},
    },
    "routes": {
        "default": {"weights": {"one": 100}, "timeout_ms": 20_000},
        "split": {"weights": {"bm25": 50, "one": 50}},
    },
    "limits": {"max_documents": 20, "max_body_bytes": 20_000, "max_recall_k": 50, "max_query_chars": 100},
}

DOCUMENTS = [f"document number {i} about {'cats' if i % 2 else 'dogs'}" for i in range(10)]

ScoreFunction = Callable[[str, ScoreRequest], list[float]]


def by_number(variant: str, request: ScoreRequest) -> list[float]:
    """The higher a document's number, the better."""
    return [int(document.split()[2]) / 10 for document in request.documents]


class FleetDouble(Fleet):
    """`scores` and `recalls` may raise what a real fleet raises."""

    def __init__(self, scores: ScoreFunction = by_number) -> None:
        super().__init__()
        self.scores = scores
        self.recalls: Callable[[RecallRequest], list[Candidate]] = lambda request: [
            Candidate(str(i), 10.0 - i, "", text, json.dumps({"id": str(i), "text": text, "price": i}))
            for i, text in enumerate(DOCUMENTS[: request.k])
        ]
        self.asked: list[tuple[str, ScoreRequest]] = []

    async def recall(self, app: str, request: RecallRequest) -> RecallResult:
        return RecallResult(self.recalls(request), 0.1)

    async def score(
        self,
        variant: str,
        request: ScoreRequest,
        pairs_per_call: int,
        timeout_s: float,
        *,
        mirrored: bool = False,
        scored: Callable[[int, ScoreResult], None] = lambda part, result: None,
    ) -> list[ScoreResult]:
        self.asked.append((variant, request))
        scores = self.scores(variant, request)
        size = pairs_per_call
        return [
            ScoreResult(some, some, 7 * len(some), 0, 0, "r1", 0.1)
            for some in (scores[i : i + size] for i in range(0, len(scores), size))
        ]


class Gateway:
    """Calls the HTTP application in process: `gateway.post("/v1/search", {...})`."""

    def __init__(self, fleet: Fleet | None = None, settings: dict[str, Any] | None = None) -> None:
        self.fleet = fleet or FleetDouble()
        self.service = Service(self.fleet)
        self.service.configure(settings or SETTINGS)
        self.app = create_app(self.service)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, content=content, headers=headers)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(call())
