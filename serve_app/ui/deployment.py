"""The page as a Serve deployment: a thin shell around Gradio's ASGI application."""

import importlib.util
import os

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from starlette.types import ASGIApp

from serve_app.access import local_url
from serve_app.config import UiArgs
from serve_app.ui.actions import Actions
from serve_app.ui.client import Gateway
from serve_app.ui.doors import Doors


def application(args: UiArgs) -> serve.Application:
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs the extra ui: pip install -c constraints/cpu.txt 'serve-app[ui]'")
    return Page.bind(args)  # type: ignore[attr-defined]


@serve.deployment(
    name="Page",
    # A browser's events belong to the replica that it met first.
    num_replicas=1,
    # Each open browser holds two for as long as it is open.
    max_ongoing_requests=512,
    health_check_period_s=5,
    # Browsers stay connected; they come back by themselves.
    graceful_shutdown_timeout_s=3,
    graceful_shutdown_wait_loop_s=0.5,
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress()
class Page:
    """One replica. It has no keys: every call to the gateway brings that of whoever is at the page."""

    def __init__(self, args: UiArgs) -> None:
        self._gateway_url = args.gateway_url or _proxy_url()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return asgi(self._gateway_url)


def asgi(gateway_url: str) -> ASGIApp:
    """The page for the gateway at `gateway_url`."""
    # Read as Gradio is imported, which takes seconds: it reports nothing to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from serve_app.ui.page import build_page, style, theme

    frame = FastAPI(openapi_url=None)
    page = gr.mount_gradio_app(
        frame,
        build_page(Actions(Gateway(gateway_url))),
        path="/",
        theme=theme(),
        css=style(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        # Errors that the page has no words for stay in the log.
        show_error=False,
    )
    return Doors(page)


def _proxy_url() -> str:
    """Serve's own, on this machine."""
    http = _get_global_client().http_config
    return local_url(http.host, http.port)
