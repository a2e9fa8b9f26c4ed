"""Recall: BM25 over the operator's own catalogue, as a Serve application.

Importing this package imports neither Ray nor tantivy; callers need only `messages`.
"""

from typing import TYPE_CHECKING

from serve_app.config import RecallArgs

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: RecallArgs) -> "Application":
    """The application of one catalogue: callers reach `serve.get_deployment_handle("Recall", app_name=…)`."""
    from serve_app.recall.deployment import Front, Recall

    recall = Recall.bind(args)  # type: ignore[attr-defined]
    app: Application = Front.bind(recall)  # type: ignore[attr-defined]
    return app
