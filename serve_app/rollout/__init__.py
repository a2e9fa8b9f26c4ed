"""The rollout application: moves a route's traffic from one pipeline to another, watched, and back.

Importing this package loads neither Ray nor a store.
"""

from typing import TYPE_CHECKING

from serve_app.config import RolloutArgs

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: RolloutArgs) -> "Application":
    """`import_path: serve_app.rollout:build` in a Serve config file. Raises ValueError for a bad `store`."""
    from serve_app.rollout.deployment import application

    return application(args)
