"""The page: search, compare, rerank, watch the fleet and rollouts, in a browser. Speaks HTTP to the gateway only.

Importing this package loads neither Ray nor Gradio.
"""

from typing import TYPE_CHECKING

from serve_app.config import UiArgs

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: UiArgs) -> "Application":
    """`import_path: serve_app.ui:build` in a Serve config file. Raises ImportError without the extra `ui`."""
    from serve_app.ui.deployment import application

    return application(args)
