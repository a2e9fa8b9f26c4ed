"""The client of the benchmarks' load, against a real server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.client import Connection
from bench.common import closed_loop


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_POST(self) -> None:
        said = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/hangs-up":
            self.close_connection = True
            return
        self.send_response(404 if self.path == "/absent" else 200)
        answer = json.dumps({"key": self.headers["Authorization"], "said": json.loads(said)}).encode()
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (answer[:5], answer[5:], b""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            return
        self.send_header("Content-Length", str(len(answer)))
        if self.path == "/closes":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *line: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/", "/chunked", "/closes"])
def test_calls_follow_each_other_on_a_connection(url: str, path: str) -> None:
    async def calls() -> None:
        connection = Connection(url + path, {"Authorization": "Bearer key"})
        for said in ("one", "zwei", "三", "x" * 300_000):
            status, answer = await connection.post(json.dumps(said).encode())
            assert status == 200
            assert json.loads(answer) == {"key": "Bearer key", "said": said}
        connection.close()

    asyncio.run(calls())


def test_a_server_that_hangs_up_is_an_error(url: str) -> None:
    connection = Connection(url + "/hangs-up", {})
    with pytest.raises(OSError, match="closed before"):
        asyncio.run(connection.post(b"{}"))


def test_a_load_ends_with_the_first_refusal(url: str) -> None:
    bodies = iter([{"query": str(i)} for i in range(1000)])
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(closed_loop(url + "/absent", bodies, 2, 60))
    assert "answered 404" in str(caught.value.exceptions[0])


def test_a_load_has_the_time_of_every_call_and_of_all_together(url: str) -> None:
    said = [{"query": str(i)} for i in range(100_000)]
    left = iter(said)
    took, seconds = asyncio.run(closed_loop(url, left, 4, 0.3))
    assert len(took) + len(list(left)) == len(said)
    assert all(0 < one < 60 for one in took)
    # The calls that were under way at the end are in both.
    assert seconds > 0.3
    assert sum(took) <= 4 * seconds
