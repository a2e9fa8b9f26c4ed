"""The Serve deployment of the rollout controller: a thin shell."""

import asyncio
import contextlib
import logging
import logging.handlers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import RolloutArgs
from serve_app.logs import write_soon
from serve_app.reranker.messages import ScoreRequest
from serve_app.rollout.controller import Controller
from serve_app.rollout.machine import Action
from serve_app.rollout.messages import News, Reply, Splits
from serve_app.rollout.metrics import report_rollouts
from serve_app.rollout.store import Event, StoreError, open_store
from serve_app.status import applications

logger = logging.getLogger("ray.serve")

_LOG_BYTES, _LOG_FILES = 100_000_000, 5
# A sleeping variant is called this often until it has a replica.
_WAKE_EVERY_S = 10.0


def application(args: RolloutArgs) -> serve.Application:
    """Raises ValueError for a store that can't be."""
    open_store(args.store).close()
    return Rollout.bind(args)  # type: ignore[attr-defined]


@serve.deployment(
    name="Rollout",
    max_ongoing_requests=256,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=10,
    ray_actor_options={"num_cpus": 0.1},
)
class Rollout:
    """One replica acts. Should there be two for a while, the store's lease decides which."""

    async def __init__(self, args: RolloutArgs) -> None:  # type: ignore[misc]
        write_soon()
        self._controller = Controller(open_store(args.store), self._not_ready)
        self._events_log = _events_log(args.events_log) if args.events_log else None
        self._waking: dict[str, float] = {}
        loop = asyncio.get_running_loop()
        self._running = loop.create_task(self._controller.run())
        replica = serve.get_replica_context().replica_tag
        self._reporting = loop.create_task(report_rollouts(self._controller.store, replica))

    async def exchange(self, news: News) -> Splits:
        return await self._controller.exchange(news)

    async def start(self, body: Any, start_id: str, by: str) -> Reply:
        return await self._controller.start(body, start_id, by)

    async def act(self, rollout_id: str, action: Action, command_id: str, by: str) -> Reply:
        return await self._controller.act(rollout_id, action, command_id, by)

    async def show(self, rollout_id: str) -> Reply:
        return await self._controller.show(rollout_id)

    async def recent(self, route: str | None) -> Reply:
        return await self._controller.recent(route)

    async def history(self, rollout_id: str) -> Reply:
        return await self._controller.history(rollout_id)

    async def events(self, events: Sequence[Event], raw: Sequence[str]) -> Reply:
        reply = await self._controller.events(events)
        if self._events_log is not None and reply.error is None:
            await asyncio.to_thread(_write, self._events_log, raw)
        return reply

    async def check_health(self) -> None:
        if self._running.done():
            raise RuntimeError("the controller's loop has ended")

    async def __del__(self) -> None:
        # Serve waits for this when the replica stops, also after a failed start: the next one acts at once.
        running = getattr(self, "_running", None)
        if running is not None:
            running.cancel()
            await asyncio.wait({running})
            with contextlib.suppress(StoreError):
                await self._controller.close()

    async def _not_ready(self, variants: Sequence[str]) -> list[str]:
        waiting = await asyncio.to_thread(_without_replica, variants)
        now = asyncio.get_running_loop().time()
        for variant in waiting:
            if now - self._waking.get(variant, float("-inf")) > _WAKE_EVERY_S:
                self._waking[variant] = now
                handle: DeploymentHandle = serve.get_deployment_handle(
                    "Reranker", app_name=variant, _check_exists=False
                )
                # Serve starts a sleeping deployment's first replica for a call; nobody waits for its answer.
                handle.score.remote(ScoreRequest(query="wake", documents=["up"], timeout_s=_WAKE_EVERY_S))
        return waiting


def _without_replica(variants: Sequence[str]) -> list[str]:
    found = applications()
    return [name for name in variants if name not in found or not found[name].running.get("Reranker", 0)]


def _events_log(path: str) -> logging.handlers.RotatingFileHandler:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1, encoding="utf-8"
    )


def _write(log: logging.Handler, lines: Sequence[str]) -> None:
    """On any thread: `handle` takes the log's lock, unlike `emit`, so that no line goes to a file that another
    thread closes."""
    for line in lines:
        log.handle(logging.LogRecord("events", logging.INFO, "", 0, line, None, None))
