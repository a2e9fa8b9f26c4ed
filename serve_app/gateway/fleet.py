"""The gateway's way to the other applications: Serve handles, with deadlines, retries and circuit breakers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app import tracing
from serve_app.gateway.breaker import Breaker
from serve_app.gateway.fingerprints import Fingerprints
from serve_app.gateway.pipeline import StageFailure
from serve_app.recall.messages import RecallRequest, RecallResult
from serve_app.reranker.messages import EngineFullError, PromptTooLongError, ScoreRequest, ScoreResult
from serve_app.status import AppStatus, applications

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_STATUS_EVERY_S = 2.0
# A replica that dies or is stopped takes its calls with it; they go to another one this many times.
_ATTEMPTS = 3
# What Serve's messages over gRPC meet then, where Serve itself doesn't call it an actor's error.
_GONE = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.INTERNAL)
# A timeout says something about a variant only if the variant had at least this long.
_TELLING_TIMEOUT_S = 1.0
# What says which fingerprint an application's answers have now.
_TOLD_BY = {"Reranker": "info", "Recall": "stats"}
# An index that was rebuilt is served after a restart, which may fall between two looks at the status. A variant's
# takes longer; and asking one now and then would be load to its autoscaling.
_RECALL_ASKED_EVERY_S = 10.0
# One that is asked for its fingerprint and answers later than this is asked again.
_INFO_TIMEOUT_S = 2.0


class Fleet:
    """Calls recall and reranker applications by name. One per gateway replica, on its event loop."""

    def __init__(self) -> None:
        # None until Serve has answered once.
        self.apps: dict[str, AppStatus] | None = None
        self.fingerprints = Fingerprints()
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}
        self._methods: dict[tuple[str, str, str], DeploymentHandle] = {}
        self._breakers: dict[str, Breaker] = {}
        self._watching: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[None]] = {}

    def watch(self) -> None:
        """Starts following what is deployed, off the request path; does nothing when it already does."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    def running(self, app: str, deployment: str) -> int | None:
        """Replicas that run now; None when Serve does not know the deployment, or has not been heard yet."""
        status = (self.apps or {}).get(app)
        return status.running.get(deployment) if status else None

    def status(self, app: str) -> str:
        """Serve's word for the application's state; NOT_DEPLOYED where Serve does not know it."""
        status = (self.apps or {}).get(app)
        return status.status if status else "NOT_DEPLOYED"

    async def recall(self, app: str, request: RecallRequest) -> RecallResult:
        """Raises StageFailure."""
        with tracing.call_to(f"recall {app}"):
            request = replace(request, traceparent=tracing.traceparent())
            asked_at = time.monotonic()
            (result,) = await self._guarded(app, "Recall", "search", [request], request.timeout_s)
        answer: RecallResult = result
        self.fingerprints.heard(app, answer.fingerprint, asked_at)
        return answer

    async def ask(self, app: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Calls the rollout application. Raises what it raises, and TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self._call(app, "Rollout", method, *arguments)

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
        """Scores all documents of `request`, in calls of `pairs_per_call` that spread over the replicas; their
        answers in order. `scored` is called with the number and the answer of each as it comes. What a `mirrored`
        call meets opens no circuit breaker: live calls may go to the same variant.

        Raises StageFailure when any part could not be scored, and PromptTooLongError.
        """
        with tracing.call_to(f"rerank {variant}") as span:
            span.set(documents=len(request.documents), mirrored=mirrored)
            return await self._score(variant, request, pairs_per_call, timeout_s, mirrored, scored)

    async def _score(
        self,
        variant: str,
        request: ScoreRequest,
        pairs_per_call: int,
        timeout_s: float,
        mirrored: bool,
        scored: Callable[[int, ScoreResult], None],
    ) -> list[ScoreResult]:
        asked_at = time.monotonic()
        documents, traceparent = request.documents, tracing.traceparent()
        requests = [
            replace(
                request,
                documents=documents[i : i + pairs_per_call],
                timeout_s=timeout_s,
                part=part,
                traceparent=traceparent,
            )
            for part, i in enumerate(range(0, len(documents), pairs_per_call))
        ]

        def heard(part: int, result: ScoreResult) -> None:
            self.fingerprints.heard(variant, result.fingerprint, asked_at)
            scored(part, result)

        results: list[ScoreResult] = await self._guarded(
            variant, "Reranker", "score", requests, timeout_s, mirrored=mirrored, heard=heard
        )
        return results

    async def _guarded(
        self,
        app: str,
        deployment: str,
        method: str,
        requests: Sequence[Any],
        timeout_s: float,
        mirrored: bool = False,
        heard: Callable[[int, Any], None] = lambda part, result: None,
    ) -> list[Any]:
        """The answers to all `requests` within `timeout_s`; none is sent while the application is known to be
        down. `heard` gets each as it comes. Whatever goes wrong becomes a StageFailure."""
        if timeout_s <= 0:
            raise StageFailure("timeout", f"no time was left for {app}")
        if self.running(app, deployment) is None and self.apps is not None:
            raise StageFailure("unavailable", f"{app} is not deployed", retry_after_s=5)
        breaker = self._breakers.setdefault(app, Breaker())
        telling = timeout_s >= _TELLING_TIMEOUT_S and not mirrored
        call = breaker.enter(can_probe=telling)
        if call is None:
            raise StageFailure("unavailable", f"{app} has not answered its last calls", retry_after_s=1)
        failed: bool | None = None

        async def answer(part: int, request: Any) -> Any:
            result = await self._call(app, deployment, method, request)
            breaker.succeeded()
            heard(part, result)
            return result

        try:
            async with asyncio.timeout(timeout_s):
                return await all_or_none([answer(*numbered) for numbered in enumerate(requests)])
        except PromptTooLongError as error:
            breaker.succeeded()
            # Wrapped by Serve's plain mode, its text would be the replica's whole traceback.
            raise PromptTooLongError(str(_cause(error))) from None
        except Exception as error:
            failure = _stage_failure(app, error, timeout_s)
            if failure.reason == "error":
                logger.exception("%s failed", app)
            if failure.reason == "timeout":
                failed = True if telling else None
            elif failure.reason != "overloaded" and not mirrored:
                failed = True
            raise failure from error
        finally:
            breaker.settle(call, failed)

    async def _call(self, app: str, deployment: str, method: str, *arguments: Any) -> Any:
        for _ in range(_ATTEMPTS):
            response = self._method(app, deployment, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                # Serve's plain mode does not pass a cancelled wait on to the replica.
                with contextlib.suppress(Exception):
                    response.cancel()
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # The replica's own, as one that is being stopped sends: it has not been asked for here.
                gone: Exception = StageFailure("unavailable", f"{app} gave the call up", retry_after_s=1)
            except (RayActorError, AioRpcError) as error:
                if not _is_gone(error):
                    raise
                gone = error
        raise gone

    def _method(self, app: str, deployment: str, method: str) -> DeploymentHandle:
        found = self._methods.get((app, deployment, method))
        if found is None:
            if (app, deployment) not in self._handles:
                # The check would ask the controller and block the event loop; `_guarded` knows what is deployed.
                self._handles[app, deployment] = serve.get_deployment_handle(
                    deployment, app_name=app, _check_exists=False
                )
            # Kept, because every look at a handle's method makes a new one.
            found = self._methods[app, deployment, method] = getattr(self._handles[app, deployment], method)
        return found

    async def _watch(self) -> None:
        while True:
            try:
                self.apps = carried_over(self.apps or {}, await asyncio.to_thread(applications))
            except Exception as error:
                # The controller may be restarting; what was known stays in force.
                logger.warning("Serve's status could not be read: %s", error)
            else:
                self._follow_fingerprints(self.apps)
            await asyncio.sleep(_STATUS_EVERY_S)

    def _follow_fingerprints(self, apps: dict[str, AppStatus]) -> None:
        self.fingerprints.keep(apps)
        for name, app in apps.items():
            deployment = next(filter(app.running.__contains__, _TOLD_BY), None)
            if deployment is None:
                continue
            every_s = _RECALL_ASKED_EVERY_S if deployment == "Recall" else None
            ask = self.fingerprints.follow(
                name, app.status, app.running[deployment], app.deployed_at_s, every_s=every_s
            )
            if ask and name not in self._asking:
                asking = asyncio.get_running_loop().create_task(self._ask_fingerprint(name, deployment))
                self._asking[name] = asking
                asking.add_done_callback(partial(self._asked, name))

    def _asked(self, app: str, task: asyncio.Task[None]) -> None:
        del self._asking[app]

    async def _ask_fingerprint(self, app: str, deployment: str) -> None:
        asked_at = time.monotonic()
        # Asked again soon; and what does not know the question says nothing in its answers either.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_INFO_TIMEOUT_S):
                told = await self._call(app, deployment, _TOLD_BY[deployment])
            self.fingerprints.heard(app, told.get("fingerprint", ""), asked_at)


def carried_over(before: dict[str, AppStatus], now: dict[str, AppStatus]) -> dict[str, AppStatus]:
    """What Serve says `now`. While it builds an application anew, as for other `args`, it names none of the
    application's deployments; those `before` go on serving."""
    for name, app in now.items():
        if not app.running and name in before and app.status != "DELETING":
            app.running = before[name].running
    return now


async def all_or_none(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
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
    if isinstance(error, StageFailure):
        return error
    cause = _cause(error)
    if isinstance(cause, TimeoutError):
        return StageFailure("timeout", f"{app} did not answer within {timeout_s * 1e3:.0f} ms")
    if isinstance(cause, BackPressureError | EngineFullError):
        return StageFailure("overloaded", f"{app} has too many calls waiting", retry_after_s=1)
    if _is_gone(cause):
        return StageFailure("unavailable", f"{app} lost its replicas", retry_after_s=5)
    if isinstance(cause, DeploymentUnavailableError):
        return StageFailure("unavailable", f"{app} failed to deploy", retry_after_s=30)
    if isinstance(cause, RayServeException):
        return StageFailure("unavailable", f"{app} is not deployed or not ready", retry_after_s=5)
    return StageFailure("error", f"{app} failed with {type(cause).__name__}", retry_after_s=1)


def _is_gone(error: Exception) -> bool:
    """Whether it is for a replica that died or was stopped."""
    return isinstance(error, RayActorError) or (isinstance(error, AioRpcError) and error.code() in _GONE)


def _cause(error: Exception) -> Exception:
    """A replica's exception as it was raised: Serve wraps it in its plain mode."""
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    return cause
