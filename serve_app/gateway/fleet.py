"""The gateway's way to the other applications: Serve handles, with deadlines, retries and circuit breakers."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.gateway.breaker import Breaker
from serve_app.gateway.pipeline import StageFailure
from serve_app.recall.messages import RecallRequest, RecallResult
from serve_app.reranker.messages import PromptTooLongError, ScoreRequest, ScoreResult

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_STATUS_EVERY_S = 2.0
# A replica that dies takes its calls with it; they go to another one this many times.
_ATTEMPTS = 3
# A timeout says something about a variant only if the variant had at least this long.
_TELLING_TIMEOUT_S = 1.0


@dataclass(slots=True)
class AppStatus:
    """What Serve says of an application: its status word and the replicas that run by deployment."""

    status: str
    running: dict[str, int] = field(default_factory=dict)


class Fleet:
    """Calls recall and reranker applications by name. One per gateway replica, on its event loop."""

    def __init__(self) -> None:
        # None until Serve has answered once.
        self.apps: dict[str, AppStatus] | None = None
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}
        self._breakers: dict[str, Breaker] = {}
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Starts following what is deployed, off the request path; does nothing when it already does."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    def running(self, app: str, deployment: str) -> int | None:
        """Replicas that run now; None when it is not known yet."""
        if self.apps is None:
            return None
        status = self.apps.get(app)
        return status.running.get(deployment, 0) if status else 0

    def status(self, app: str) -> str:
        """Serve's word for the application's state; NOT_DEPLOYED where Serve does not know it."""
        status = (self.apps or {}).get(app)
        return status.status if status else "NOT_DEPLOYED"

    async def recall(self, app: str, request: RecallRequest) -> RecallResult:
        """Raises StageFailure."""
        result: RecallResult = await self._guarded(
            app, request.timeout_s, lambda: self._call(app, "Recall", "search", request)
        )
        return result

    async def score(
        self, variant: str, request: ScoreRequest, pairs_per_call: int, timeout_s: float
    ) -> ScoreResult:
        """Scores all documents of `request`, in calls of `pairs_per_call` that spread over the replicas.

        Raises StageFailure when any part could not be scored, and PromptTooLongError.
        """
        documents = request.documents
        chunks = [documents[i : i + pairs_per_call] for i in range(0, len(documents), pairs_per_call)]
        requests = [
            ScoreRequest(
                query=request.query,
                documents=chunk,
                instruction=request.instruction,
                max_tokens_per_doc=request.max_tokens_per_doc,
                priority=request.priority,
                request_id=request.request_id,
                timeout_s=timeout_s,
            )
            for chunk in chunks
        ]
        parts: list[ScoreResult] = await self._guarded(
            variant,
            timeout_s,
            lambda: _all_or_none([self._call(variant, "Reranker", "score", part) for part in requests]),
        )
        return ScoreResult(
            scores=[score for part in parts for score in part.scores],
            logits=[logit for part in parts for logit in part.logits],
            tokens=sum(part.tokens for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
            truncated=sum(part.truncated for part in parts),
            revision=parts[0].revision,
            took_ms=max(part.took_ms for part in parts),
        )

    async def _guarded(self, app: str, timeout_s: float, work: Any) -> Any:
        """`work` within `timeout_s`, not begun at all while the application is known to be down; whatever goes
        wrong becomes a StageFailure."""
        if self.apps is not None and app not in self.apps:
            raise StageFailure("unavailable", f"{app} is not deployed", retry_after_s=5)
        breaker = self._breakers.setdefault(app, Breaker())
        if not breaker.allows():
            raise StageFailure("unavailable", f"{app} has not answered its last calls", retry_after_s=1)
        succeeded: bool | None = None
        try:
            async with asyncio.timeout(timeout_s):
                result = await work()
            succeeded = True
            return result
        except PromptTooLongError:
            succeeded = True
            raise
        except Exception as error:
            failure = _stage_failure(app, error, timeout_s)
            if failure.reason == "error":
                logger.exception("%s failed", app)
            if failure.reason == "timeout":
                succeeded = False if timeout_s >= _TELLING_TIMEOUT_S else None
            elif failure.reason != "overloaded":
                succeeded = False
            raise failure from error
        finally:
            breaker.settled(succeeded)

    async def _call(self, app: str, deployment: str, method: str, request: Any) -> Any:
        for attempt in range(_ATTEMPTS):
            response = getattr(self._handle(app, deployment), method).remote(request)
            try:
                return await response
            except asyncio.CancelledError:
                # Serve's plain mode does not pass a cancelled wait on to the replica.
                response.cancel()
                raise
            except RayActorError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _handle(self, app: str, deployment: str) -> DeploymentHandle:
        if (app, deployment) not in self._handles:
            self._handles[app, deployment] = serve.get_deployment_handle(deployment, app_name=app)
        return self._handles[app, deployment]

    async def _watch(self) -> None:
        while True:
            try:
                self.apps = await asyncio.to_thread(_read_status)
            except Exception as error:
                # The controller may be restarting; what was known stays in force.
                logger.warning("Serve's status could not be read: %s", error)
            await asyncio.sleep(_STATUS_EVERY_S)


def _read_status() -> dict[str, AppStatus]:
    return {
        name: AppStatus(
            app.status.value,
            {
                deployment: status.replica_states.get("RUNNING", 0)
                for deployment, status in app.deployments.items()
            },
        )
        for name, app in serve.status().applications.items()
    }


async def _all_or_none(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls in order; when one fails, the others are cancelled and awaited first."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stage_failure(app: str, error: Exception, timeout_s: float) -> StageFailure:
    # Serve hands on a replica's exception wrapped in its plain mode, bare in its fast one.
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, TimeoutError):
        return StageFailure("timeout", f"{app} did not answer within {timeout_s * 1e3:.0f} ms")
    if isinstance(cause, BackPressureError):
        return StageFailure("overloaded", f"{app} has too many calls waiting", retry_after_s=1)
    if isinstance(cause, RayActorError):
        return StageFailure("unavailable", f"{app} lost its replicas", retry_after_s=5)
    if isinstance(cause, DeploymentUnavailableError):
        return StageFailure("unavailable", f"{app} failed to deploy", retry_after_s=30)
    if isinstance(cause, RayServeException):
        return StageFailure("unavailable", f"{app} is not deployed or not ready", retry_after_s=5)
    return StageFailure("error", f"{app} failed with {type(cause).__name__}")
