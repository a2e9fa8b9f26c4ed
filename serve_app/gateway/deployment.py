"""The gateway as a Serve deployment: a thin shell around `Service` and its HTTP application."""

from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app.gateway.app import create_app
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.service import Service


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

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.service = Service(self.fleet)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.service.configure(user_config)
        self.fleet.watch()
        self.service.rollouts.configure(self.service.settings)
