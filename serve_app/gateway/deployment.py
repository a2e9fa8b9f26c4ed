"""The gateway as a Serve deployment: a thin shell around `Service` and its HTTP application."""

import asyncio
import gc
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client

from serve_app import tracing
from serve_app.access import refuse_strangers
from serve_app.config import GatewayArgs
from serve_app.gateway.app import create_app
from serve_app.gateway.cors import allow_origins
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.metrics import Gauges, Metrics
from serve_app.gateway.service import Service
from serve_app.logs import write_soon

logger = logging.getLogger("ray.serve")

_REFRESH_EVERY_S = 2.0
# New objects until the next look for cycles; Serve's own for its proxies.
_GARBAGE_EVERY = 10_000


@serve.deployment(
    name="Gateway",
    # The gateway's own limit (`limits.max_concurrent_calls`) answers 429 with the setting's name, so Serve's
    # is well above it.
    max_ongoing_requests=2048,
    health_check_period_s=5,
    # Above the longest deadline a call may ask for by default (limits.max_timeout_ms).
    graceful_shutdown_timeout_s=65,
    ray_actor_options={"num_cpus": 0.25},
)
@serve.ingress()
class Gateway:
    """HTTP in, Serve handles out. Settings come as `user_config` and are replaced without a restart."""

    def __init__(self, args: GatewayArgs) -> None:
        """Raises ValueError for keys that can't be read, and where there are none although anybody could call."""
        self.fleet = Fleet()
        self.service = Service(self.fleet)
        self._replica = serve.get_replica_context()
        self.service.application = self._replica.app_name
        self._args = args
        write_soon()
        if not self.service.keys.known and not args.without_keys:
            refuse_strangers(_get_global_client().http_config.host)
        self._refreshing: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self.service, Metrics())
        if tracing.start(self._replica.app_name, self._replica.replica_tag):
            app.add_middleware(tracing.Traced)
        if self._args.cors_origins:
            allow_origins(app, self._args.cors_origins)
        return app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.service.configure(user_config)
        self.fleet.watch()
        self.service.rollouts.configure(self.service.settings)
        if self._refreshing is None:
            gauges = Gauges(self._replica.replica_tag)
            # A tenth of a call's time went into looking for garbage, mostly among what is here now and stays.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_GARBAGE_EVERY)
            self._refreshing = asyncio.get_running_loop().create_task(_refresh(self.service, gauges))


async def _refresh(service: Service, gauges: Gauges) -> None:
    """Follows the file of keys, and tells Prometheus of the gateway."""
    keys = service.keys
    while True:
        try:
            if await asyncio.to_thread(keys.refresh):
                if keys.problem:
                    logger.error("the API keys stay as they were: %s", keys.problem)
                else:
                    logger.info(f"API keys now: {', '.join(key.name for key in keys.known)}")
            gauges.set(service)
        except Exception:
            # Whatever it is: a key that is taken away later must not stay in force for it.
            logger.exception("following the API keys and telling Prometheus failed")
        await asyncio.sleep(_REFRESH_EVERY_S)
