"""What the commands say when what answers isn't the gateway, or can't be called."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from serve_app.access import ADMIN_KEY
from serve_app.cli import main
from serve_app.evaluation.report import Report, Stopped


class Other(BaseHTTPRequestHandler):
    """Answers what the path's first part says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = json.loads(self.server.answers[self.path.split("/")[1]])  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def other() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, "<html>", "answered with something that is not JSON"),
        (200, "[]", "something else than results; is it serve-app's gateway?"),
        (200, "{}", "something else than results; is it serve-app's gateway?"),
        (502, "[1]", "502: [1]"),
        (401, '{"message": "give an API key"}', "401: give an API key"),
    ],
)
def test_an_answer_of_something_else_is_one_clear_line(
    other: HTTPServer, capsys: pytest.CaptureFixture[str], status: int, body: str, says: str
) -> None:
    other.answers = {"a": json.dumps([status, body])}  # type: ignore[attr-defined]
    for command in (["search", "lamp"], ["rerank", "lamp", "a", "b"]):
        assert main([*command, "--url", f"http://127.0.0.1:{other.server_port}/a"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("serve-app: ")
        assert error.endswith(f"{says}\n")


@pytest.mark.parametrize("url", ["http://[::1", "http://localhost:abc", "localhost"])
def test_a_url_that_cannot_be_called_is_one_clear_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "lamp", "--url", url]) == 1
    error = capsys.readouterr().err
    assert url in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["http://shop:KEY@127.0.0.1:9", "http://shop:KEY/x@127.0.0.1", "http://shop:KEY@[::1"]
)
def test_the_key_in_a_url_is_not_shown(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ADMIN_KEY, "secret")
    for command in (["search", "lamp"], ["rerank", "lamp", "a", "b"], ["rollout", "list"]):
        assert main([*command, "--url", url]) > 0
        said = "".join(capsys.readouterr())
        assert said.count("\n") == 1
        assert "KEY" not in said
        assert "shop" not in said


def test_a_proxy_is_not_asked_for_this_machine_and_one_that_lacks_support_is_one_clear_line(
    other: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    other.answers = {"a": json.dumps([401, '{"message": "reached"}'])}  # type: ignore[attr-defined]
    assert main(["search", "lamp", "--url", f"http://127.0.0.1:{other.server_port}/a"]) == 1
    assert capsys.readouterr().err == "serve-app: 401: reached\n"
    assert main(["search", "lamp", "--url", "http://192.0.2.1"]) == 1
    error = capsys.readouterr().err
    assert "socks" in error.lower()
    assert error.count("\n") == 1


def test_lines_that_are_not_utf8_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("lamp\n耳机\n".encode("gbk"))))
    assert main(["rerank", "lamp", "--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith("serve-app: standard input, line 2: not UTF-8")


def test_a_key_that_no_header_carries_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVE_APP_API_KEY", "schlüssel")
    assert main(["search", "lamp", "--url", "http://127.0.0.1:9"]) == 1
    assert "SERVE_APP_API_KEY has characters other than printable ASCII" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stopped", "code"),
    [(None, 0), (Stopped("fused", "nobody answers", False), 1), (Stopped("fused", "interrupted", True), 130)],
)
def test_eval_asks_for_what_is_said_and_its_code_says_whether_it_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stopped: Stopped | None, code: int
) -> None:
    asked: dict[str, Any] = {}

    def evaluate(dataset: object, url: str, **options: Any) -> Report:
        asked.update(options)
        return Report("d", url, None, options["top_n"], 1, 0, [], [], options["ignore_identical_ids"], stopped)

    monkeypatch.setattr("serve_app.evaluation.evaluate", evaluate)
    assert main(["eval", "--dataset", "d", "--top-n", "50", "--ignore-identical-ids", "--json"]) == code
    assert (asked["top_n"], asked["ignore_identical_ids"]) == (50, True)
    assert (json.loads(capsys.readouterr().out)["stopped"] is None) == (code == 0)


@pytest.mark.parametrize(("timeout_ms", "limit_s"), [(None, 90), (200_000, 210)])
def test_a_call_waits_as_long_as_its_deadline(
    timeout_ms: int | None, limit_s: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(*_: Any, timeout: httpx.Timeout, **__: Any) -> httpx.Response:
        assert (timeout.read, timeout.connect) == (limit_s, 10)
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(httpx, "post", late)
    asked = [] if timeout_ms is None else ["--timeout-ms", str(timeout_ms)]
    assert main(["search", "headphones", *asked]) == 1
    assert f"for {limit_s} s; --timeout-ms" in capsys.readouterr().err
