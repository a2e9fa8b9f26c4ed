"""A reranker that does nothing: what is left is the way to it. `import_path: bench.noop:build`."""

from ray import serve

from serve_app.reranker.messages import ScoreRequest, ScoreResult


def build(args: dict[str, object]) -> serve.Application:
    return Front.bind(Reranker.bind())


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Front:
    """As a variant has it."""

    def __init__(self, reranker: object) -> None:
        pass


@serve.deployment(name="Reranker", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Reranker:
    async def score(self, request: ScoreRequest) -> ScoreResult:
        n = len(request.documents)
        return ScoreResult([0.5] * n, [0.0] * n, 7 * n, 0, 0, "none", 0.0)
