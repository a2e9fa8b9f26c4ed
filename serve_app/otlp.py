"""What `tracing.py` does once it is on: OpenTelemetry's SDK with its OTLP exporter over HTTP."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve_app import __version__
from serve_app.tracing import Kind, Span

logger = logging.getLogger("ray.serve")

# Sent this often unless OTEL_BSP_SCHEDULE_DELAY says otherwise: what waits when a replica ends is lost.
_SEND_EVERY_MS = 1000
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """One a process. `endpoint` is what log lines call the receiver: its url may hold a password."""

    def __init__(self, service: str, replica: str, endpoint: str) -> None:
        named = {"service.name": service, "service.namespace": "serve-app", "service.instance.id": replica}
        resource = Resource.create({**named, "service.version": __version__})
        # The end of a process, which nobody else waits for, doesn't wait for a receiver either.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        delay_ms = None if "OTEL_BSP_SCHEDULE_DELAY" in os.environ else _SEND_EVERY_MS
        self._spans = BatchSpanProcessor(_Sender(endpoint), schedule_delay_millis=delay_ms)
        provider.add_span_processor(self._spans)
        self._tracer = provider.get_tracer("serve_app", __version__)

    @contextlib.contextmanager
    def span(self, name: str, kind: Kind, carrier: dict[str, str] | None = None) -> Iterator[Span]:
        """Below what `carrier` names; None: below the current span."""
        parent = None if carrier is None else _PROPAGATOR.extract(carrier, Context())
        with self._tracer.start_as_current_span(
            name,
            parent,
            trace.SpanKind[kind],
            # Their messages aren't ours to vouch for.
            record_exception=False,
            set_status_on_exception=False,
        ) as made:
            recorded = _Recorded(made)
            try:
                yield recorded
            except BaseException as error:
                recorded.fail(getattr(error, "reason", type(error).__name__))
                raise

    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", "")

    def close(self) -> None:
        self._spans.shutdown()  # type: ignore[no-untyped-call]


class _Recorded(Span):
    def __init__(self, made: trace.Span) -> None:
        self._made = made

    def set(self, **attributes: Any) -> None:
        self._made.set_attributes({f"serve_app.{name}": value for name, value in attributes.items()})

    def fail(self, reason: str) -> None:
        self._made.set_status(trace.StatusCode.ERROR, reason)

    def answered(self, method: str, route: str | None, status: int) -> None:
        self._made.set_attributes({"http.request.method": method, "http.response.status_code": status})
        if route is not None:
            self._made.update_name(f"{method} {route}")
            self._made.set_attribute("http.route", route)
        if status >= 500:
            self.fail(str(status))


class _Sender(SpanExporter):
    """OTLP over HTTP, with one line in the log when the receiver goes and one when it is back."""

    def __init__(self, endpoint: str) -> None:
        # It tells of every attempt, and of headers that it can't read with the secret in them.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
            if any(entry.strip() and "=" not in entry for entry in os.environ.get(name, "").split(",")):
                logger.error(f"{name} has an entry that is left out; allowed: name=value,name=value")
        self._endpoint = endpoint
        self._otlp = OTLPSpanExporter()
        self._down = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._otlp.export(spans)
        down = result is not SpanExportResult.SUCCESS
        if down and not self._down:
            logger.error(f"no traces until {self._endpoint} takes them, which OTEL_EXPORTER_OTLP_ENDPOINT names")
        elif self._down and not down:
            logger.warning(f"{self._endpoint} takes traces again")
        self._down = down
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]
