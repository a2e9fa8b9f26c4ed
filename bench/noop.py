"""A reranker that does nothing: what is left is the way to it. `import_path: bench.noop:build`."""

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
