"""The recall deployment: a thin shell around a `Searcher`."""

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app import tracing
from serve_app.config import RecallArgs
from serve_app.logs import write_soon
from serve_app.recall.messages import RecallRequest, RecallResult
from serve_app.recall.metrics import Metrics
from serve_app.recall.searcher import Searcher
from serve_app.recall.tantivy_index import TantivyIndex


@serve.deployment(
    name="Recall",
    # Searches beyond `threads` wait here, in milliseconds; more wait at the caller, and then are refused.
    max_ongoing_requests=64,
    max_queued_requests=1024,
    health_check_period_s=5,
    # Above the longest deadline a call may ask for by default (limits.max_timeout_ms).
    graceful_shutdown_timeout_s=65,
    ray_actor_options={"num_cpus": 0.5},
)
class Recall:
    """One catalogue's index, opened when the replica starts: a rebuilt index is served after a restart."""

    def __init__(self, args: RecallArgs) -> None:
        index = TantivyIndex(args.index, title_boost=args.title_boost, text_boost=args.text_boost)
        self._searcher = Searcher(index, args.threads)
        self._metrics = Metrics(index.stats())
        replica = serve.get_replica_context()
        tracing.start(replica.app_name, replica.replica_tag)
        write_soon()

    async def search(self, request: RecallRequest) -> RecallResult:
        with tracing.continued("Recall.search", request.traceparent) as span:
            result = await self._searcher.search(request)
            span.set(k=request.k, candidates=len(result.candidates))
            return result

    async def stats(self) -> dict[str, Any]:
        return await self._searcher.stats()

    def check_health(self) -> None:
        """Serve asks every few seconds."""
        self._metrics.tell()
        self._searcher.check()


@serve.deployment(name="Front", ray_actor_options={"num_cpus": 0}, health_check_period_s=5)
class Front:
    """The application's ingress, so that `Recall` isn't: Serve gives every ingress replica an HTTP port and a long
    drain. It answers nothing itself."""

    def __init__(self, recall: DeploymentHandle) -> None:
        self._recall = recall
