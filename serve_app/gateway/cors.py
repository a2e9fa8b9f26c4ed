"""Pages of other origins that may call the gateway from a browser; none unless the config names them."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from serve_app.gateway.errors import ApiError

# What scripts may read of an answer, beyond its body.
_EXPOSED = ("X-Request-Id", "Retry-After", "X-Degraded")
_PREFLIGHT_S = 600


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Keys travel in a header that scripts set, so that no cookies have to be let through."""
    app.state.cors_origins = frozenset(origins)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=list(_EXPOSED),
        max_age=_PREFLIGHT_S,
    )


def check_page(request: Request) -> None:
    """Raises ApiError where a browser says that a page of another origin sends this, and no setting names it: to
    send plain text such a page needs no leave, and though it can't read the answer, the work would be done."""
    if request.headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return
    # For this header a script needs leave, which a proxy in front may have given.
    if request.headers.get("authorization", "").lower().startswith("bearer "):
        return
    origin, named = request.headers.get("origin", ""), getattr(request.app.state, "cors_origins", ())
    if origin not in named and "*" not in named:
        raise ApiError(
            "forbidden", f"pages of {origin[:80]!r} may not call the gateway: its args name no such cors_origins"
        )
