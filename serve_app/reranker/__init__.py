"""The reranker application: one model, scored by vLLM inside its replicas.

Importing this package, or `serve_app.reranker.messages`, loads neither Ray nor vLLM.
"""

from typing import TYPE_CHECKING

from serve_app.config import RerankerArgs

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: RerankerArgs) -> "Application":
    """The application of one variant: `import_path: serve_app.reranker:build` in a Serve config file.

    Other applications reach it with `serve.get_deployment_handle("Reranker", app_name=...)` and call
    `handle.score.remote(ScoreRequest(...))`. Raises ValueError for engine arguments that vLLM hasn't.
    """
    from serve_app.reranker.deployment import application

    return application(args)
