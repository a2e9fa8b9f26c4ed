"""What of Gradio's HTTP is open: the page and its events. An ASGI wrapper, pure.

Gradio also serves files, takes uploads and proxies urls, for anybody. This page needs none of that, so that a
stranger without a key can read the page and no more.
"""

import re

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of one event; a file of documents is the largest.
MAX_BODY_BYTES = 16 * 2**20
_OPEN = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:assets|static|svelte)/[^%]+"
        r"|/gradio_api/(?:info|app_id|theme\.css|startup-events|queue/data|heartbeat/[A-Za-z0-9]+)"
    ),
    "POST": re.compile(r"/gradio_api/(?:queue/join|cancel|reset)"),
}
_HEADERS = {
    # Nothing from elsewhere. Gradio compiles templates, hence 'unsafe-eval'.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Doors:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = _refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
            else:
                await self._app(scope, _bounded(receive), _with_headers(send))


def _refusal(scope: Scope) -> Response | None:
    root: str = scope.get("root_path", "")
    path: str = scope["path"].removeprefix(root)
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    if path == "" and method == "GET":
        # The page's own links are relative to the slash.
        return RedirectResponse(f"{root}/", 308)
    known = _OPEN.get(method)
    if known is None or not known.fullmatch(path) or ".." in path:
        return PlainTextResponse("Not open here.", 404)
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        return PlainTextResponse(f"The body is over {MAX_BODY_BYTES} bytes.", 413)
    return None


def _bounded(receive: Receive) -> Receive:
    """What is longer than allowed, although it did not say so, ends as if its sender had left."""
    read = 0

    async def bounded() -> Message:
        nonlocal read
        message = await receive()
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                return {"type": "http.disconnect"}
        return message

    return bounded


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return sending
