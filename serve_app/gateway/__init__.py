"""HTTP in front of the fleet: dialects, deadlines, pipelines, fallbacks."""

from typing import TYPE_CHECKING

from serve_app.config import GatewayArgs

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: GatewayArgs) -> "Application":
    """The Serve application; its settings are the `user_config` of the deployment `Gateway`."""
    from serve_app.gateway.deployment import Gateway

    app: Application = Gateway.bind(args)  # type: ignore[attr-defined]
    return app
