"""Pages of other origins that may call the gateway from a browser; none unless the config names them."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

# What scripts may read of an answer, beyond its body.
_EXPOSED = ("X-Request-Id", "Retry-After", "X-Degraded")
_PREFLIGHT_S = 600


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Keys travel in a header that scripts set, so that no cookies have to be let through."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=list(_EXPOSED),
        max_age=_PREFLIGHT_S,
    )
