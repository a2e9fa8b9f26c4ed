"""A reranker that does nothing: what is left is the way to it. `import_path: bench.noop:build`.

`bench.noop:bare` is the least that anybody could put in front of it, as Serve's documentation has it.
"""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.reranker.messages import ScoreRequest, ScoreResult
from serve_app.reranker.router import PrefixRouter


def build(args: dict[str, object]) -> serve.Application:
    return Front.bind(Reranker.bind())


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Front:
    """As a variant has it."""

    def __init__(self, reranker: object) -> None:
        pass


@serve.deployment(
    name="Reranker",
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": 0.1},
    request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
)
class Reranker:
    async def score(self, request: ScoreRequest) -> ScoreResult:
        n = len(request.documents)
        return ScoreResult([0.5] * n, [0.0] * n, 7 * n, 0, 0, "none", 0.0)


bare_app = FastAPI()


def bare(args: dict[str, object]) -> serve.Application:
    return Bare.bind()


@serve.deployment(max_ongoing_requests=2048, ray_actor_options={"num_cpus": 0.25})
@serve.ingress(bare_app)
class Bare:
    """JSON in, one call to the reranker, JSON out."""

    def __init__(self) -> None:
        self._reranker = serve.get_deployment_handle("Reranker", app_name="noop")

    @bare_app.post("/rerank")
    async def rerank(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        result = await self._reranker.score.remote(ScoreRequest(body["query"], body["documents"]))
        return {"results": [{"index": i, "relevance_score": s} for i, s in enumerate(result.scores)]}
