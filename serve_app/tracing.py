"""OpenTelemetry spans of a call, from the gateway over recall to the rerankers.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set; OpenTelemetry is not even imported then. Its own variables say the
rest (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, …). Spans wait in a bounded queue for a thread that sends
them, so that no call waits for the receiver. They carry names and numbers, and nothing of what a call says.
"""

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from serve_app.otlp import Tracer

logger = logging.getLogger("ray.serve")

Kind = Literal["SERVER", "CLIENT"]
Message = MutableMapping[str, Any]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# Probes would be most of what is recorded.
_UNTRACED = ("/healthz", "/health", "/readyz")

_tracer: "Tracer | None" = None


def start(service: str, replica: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Turns tracing on in this process where an endpoint is configured; whether it is on. `service` and `replica`
    are what its spans call the process."""
    global _tracer
    endpoint = _first(environment, _ENDPOINTS)
    if _tracer is not None or not endpoint:
        return _tracer is not None
    protocol = _first(environment, _PROTOCOLS) or "http/protobuf"
    if protocol != "http/protobuf":
        logger.error(f"no traces: OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; allowed: http/protobuf")
        return False
    receiver = _receiver(endpoint)
    if receiver is None:
        # What it says may hold a password.
        logger.error("no traces: OTEL_EXPORTER_OTLP_ENDPOINT is not a URL; allowed: http://HOST:PORT")
        return False
    try:
        from serve_app.otlp import Tracer

        _tracer = Tracer(service, replica, receiver)
    # Of any variable that OpenTelemetry can't use; a replica serves without traces too.
    except Exception as error:
        logger.error(f"no traces: OpenTelemetry does not start, see its variables (OTEL_…): {error}")
        return False
    return True


def stop() -> None:
    """Sends what waits, and turns tracing off."""
    global _tracer
    if _tracer is not None:
        _tracer.close()
        _tracer = None


class Span:
    """A span around a block; this one records nothing."""

    def set(self, **attributes: Any) -> None:
        """Adds attributes, each under `serve_app.`."""

    def fail(self, reason: str) -> None:
        """Marks it as failed. `reason` is a word or two."""

    def answered(self, method: str, route: str | None, status: int) -> None:
        """What HTTP says of a call."""


_NOTHING = contextlib.nullcontext(Span())


def call_to(name: str) -> contextlib.AbstractContextManager[Span]:
    """A span around a call to another deployment, below the span that it is made in."""
    return _NOTHING if _tracer is None else _tracer.span(name, "CLIENT")


def continued(name: str, traceparent: str) -> contextlib.AbstractContextManager[Span]:
    """A span around what a replica does for a call that brought a `traceparent`."""
    if _tracer is None or not traceparent:
        return _NOTHING
    return _tracer.span(name, "SERVER", {"traceparent": traceparent})


def traceparent() -> str:
    """Of the current span, for another process; empty when there is none."""
    return "" if _tracer is None else _tracer.traceparent()


class Traced:
    """ASGI middleware of the gateway: a span around every call, below the caller's."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if _tracer is None or scope["type"] != "http" or scope["path"].endswith(_UNTRACED):
            return await self._app(scope, receive, send)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        with _tracer.span(scope["method"], "SERVER", headers) as span:
            try:
                await self._app(scope, receive, watched)
            finally:
                _describe(span, scope, status)


def _describe(span: Span, scope: Message, status: int) -> None:
    span.answered(scope["method"], getattr(scope.get("route"), "path", None), status)
    state = scope.get("state") or {}
    span.set(request_id=state.get("request_id", ""))
    call, reports = state.get("ran") or (None, ())
    if call is not None:
        span.set(pipeline=call.plan.pipeline or call.plan.name, why=call.plan.why)
    for report in reports:
        span.set(**{f"stage.{report.name}.ms": round(report.took_ms, 3)})
        if report.cached:
            span.set(**{f"stage.{report.name}.cached": True})
        if report.pairs:
            span.set(**{f"stage.{report.name}.pairs": report.pairs})
            span.set(**{f"stage.{report.name}.cache_hits": report.cache_hits})
        if report.failure is not None:
            span.set(**{f"stage.{report.name}.degraded": report.failure.reason})


def _receiver(endpoint: str) -> str | None:
    """Host and port that the URL names, without a password; None where it is no URL."""
    try:
        url = urlsplit(endpoint)
        # Of a port that is none, `port` raises.
        is_url = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        return None
    return url.netloc.rpartition("@")[2] if is_url else None


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((value for name in names if (value := environment.get(name, "").strip())), "")
