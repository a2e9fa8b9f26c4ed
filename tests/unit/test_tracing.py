"""Spans of the gateway, sent to a receiver; nothing at all where none is configured."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from serve_app import tracing
from tests.otlp import Receiver
from tests.unit.gateway_double import Gateway

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "call-7"}


def wait_for(condition):
    give_up_at = time.monotonic() + 10
    while not (found := condition()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver().start()
    yield made
    made.stop()


@pytest.fixture
def traced(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert tracing.start("gateway", "replica-1", os.environ)
    gateway = Gateway()
    gateway.app.add_middleware(tracing.Traced)
    yield gateway
    tracing.stop()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What Serve's log gets."""
    written: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def test_a_call_continues_the_callers_trace(traced: Gateway, receiver: Receiver) -> None:
    assert traced.post("/v1/search", {"query": "a private word"}, SAMPLED).status_code == 200
    assert traced.post("/v1/search", {"query": ""}, SAMPLED).status_code == 400
    good, refused = wait_for(lambda: len(spans := receiver.of(TRACE)) == 2 and spans)
    for span in (good, refused):
        assert (span.service, span.name, span.parent) == ("gateway", "POST /v1/search", CALLER)
        assert span.attributes["http.route"] == "/v1/search"
        assert span.attributes["serve_app.request_id"] == "call-7"
        # What a caller did wrong is no failure of ours.
        assert not span.failed
    assert good.attributes["http.response.status_code"] == 200
    assert refused.attributes["http.response.status_code"] == 400
    assert good.attributes["serve_app.pipeline"] == "one"
    assert good.attributes["serve_app.stage.small.pairs"] == 10
    assert "private" not in str(good.attributes)


def test_what_the_caller_does_not_sample_and_probes_are_not_recorded(traced: Gateway, receiver: Receiver) -> None:
    unsampled = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    assert traced.post("/v1/search", {"query": "one"}, unsampled).status_code == 200
    for path in ("/healthz", "/health"):
        assert traced.request("GET", path).status_code == 200
    # A trace of its own, for a header that is none.
    assert traced.post("/v1/search", {"query": "one"}, {"traceparent": "00-zz"}).status_code == 200
    (span,) = wait_for(lambda: receiver.spans)
    assert span.parent == ""
    assert span.name == "POST /v1/search"


def test_a_receiver_that_is_away_costs_no_call_and_one_line(
    traced: Gateway, receiver: Receiver, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.stop()
    began = time.monotonic()
    for _ in range(3):
        traced.post("/v1/search", {"query": "one"}, SAMPLED)
        assert time.monotonic() - began < 5
        wait_for(lambda: lines)
    down = f"no traces until 127.0.0.1:{receiver.port} takes them, which OTEL_EXPORTER_OTLP_ENDPOINT names"
    assert lines == [down]
    receiver.start()
    traced.post("/v1/search", {"query": "two"}, SAMPLED)
    wait_for(lambda: lines[1:])
    assert lines == [down, f"127.0.0.1:{receiver.port} takes traces again"]
    assert {record.name for record in caplog.records} <= {"ray.serve"}, "OpenTelemetry tells nothing"


def test_no_line_names_a_password_of_the_receivers(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr("serve_app.otlp.Tracer", lambda *arguments: started.extend(arguments))
    tracing.start("gateway", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://user:secret@traces.example:4318/x"})
    monkeypatch.setattr(tracing, "_tracer", None)
    assert started == ["gateway", "1", "traces.example:4318"]


def test_another_protocol_is_refused_in_a_line(lines: list[str]) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert not tracing.start("gateway", "1", given)
    assert lines == ["no traces: OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; allowed: http/protobuf"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096", "max_export_batch_size must be less than"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0", "schedule_delay_millis must be positive"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
    ],
)
def test_a_variable_that_opentelemetry_refuses_costs_the_traces_and_one_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    assert not tracing.start("gateway", "1", os.environ)
    (line,) = lines
    assert line.startswith("no traces: ")
    assert reason in line


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://user:secret@[::1:4318",
        "http://user:secret@collector:http",
        "http://",
        "http://:4318",
        "http://collector:0",
        "collector:4318",
        "collector",
        "//collector:4318",
        "grpc://collector:4317",
    ],
)
def test_an_endpoint_that_is_no_url_costs_the_traces_and_one_line(lines: list[str], endpoint: str) -> None:
    assert not tracing.start("gateway", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    assert lines == ["no traces: OTEL_EXPORTER_OTLP_ENDPOINT is not a URL; allowed: http://HOST:PORT"]


def test_nothing_is_imported_or_recorded_without_an_endpoint() -> None:
    program = (
        "import sys; from serve_app import tracing\n"
        "assert not tracing.start('gateway', '1', {})\n"
        "with tracing.call_to('x') as span, tracing.continued('y', 'z') as other: span.set(a=1)\n"
        "assert tracing.traceparent() == ''\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["Authorization: Bearer SECRET", "a=b, Bearer SECRET"])
def test_a_header_that_is_none_is_said_without_its_secret(
    value: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from serve_app.otlp import _Sender

    logging.getLogger("opentelemetry").setLevel(logging.NOTSET)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", value)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("ray.serve"), "error", said.append)
    _Sender(receiver.url).shutdown()
    (told,) = said
    assert "OTEL_EXPORTER_OTLP_HEADERS" in told
    assert "SECRET" not in told + caplog.text
