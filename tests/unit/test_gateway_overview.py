"""`/v1/fleet` while Serve's controller or a node's metrics are away; what it makes of answers is in
test_ui_fleet_overview.py."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve_app.gateway import overview
from serve_app.gateway.errors import ApiError
from serve_app.gateway.overview import Node, Overview


async def scrape(nodes):
    return None


def test_a_controller_that_does_not_answer_holds_one_thread_whoever_asks(monkeypatch):
    monkeypatch.setattr(overview, "_LOOK_TIMEOUT_S", 0.01)
    looks, back = [], threading.Event()

    def look():
        looks.append(threading.current_thread())
        assert back.wait(30)
        return {}, []

    async def scenario():
        found = Overview(look, scrape)
        gone = asyncio.create_task(found.answer())
        await asyncio.sleep(0)
        gone.cancel()
        for _ in range(3):
            with pytest.raises(ApiError, match="did not answer within") as refused:
                await found.answer()
            assert (refused.value.status, refused.value.code) == (503, "unavailable")
        assert len(looks) == 1
        back.set()
        await asyncio.wait({found._looking})
        assert (await found.answer())["applications"] == []
        assert len(looks) == 1

    try:
        asyncio.run(scenario())
    finally:
        back.set()


def test_a_look_that_failed_is_no_answer_to_the_next_question():
    looks = []

    def look():
        looks.append(True)
        if len(looks) == 1:
            raise RuntimeError("the controller is being restarted")
        return {}, []

    async def scenario():
        found = Overview(look, scrape)
        with pytest.raises(RuntimeError):
            await found.answer()
        assert (await found.answer())["applications"] == []
        assert (await found.answer())["applications"] == []
        assert len(looks) == 2

    asyncio.run(scenario())


@contextmanager
def metrics_page(pages: dict[str, bytes]) -> Iterator[str]:
    """Serves `pages` by path; the url without one."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(200 if page is not None else 503)
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_totals_are_of_all_nodes_or_not_known():
    page = b'ray_serve_app_calls_total{path="/v1/rerank",status="200"} 500000.0\n'
    pages = {"/a": page, "/b": page}

    async def answered(found):
        found._at = float("-inf")
        calls = (await found.answer())["calls"]
        return calls and calls["answered"]

    async def scenario(url):
        nodes = [Node("a", 0, f"{url}/a"), Node("b", 0, f"{url}/b"), Node("c", 0, None)]
        found = Overview(lambda: ({}, nodes))
        assert await answered(found) == 1_000_000
        del pages["/b"]
        assert await answered(found) is None
        pages["/b"] = page
        assert await answered(found) == 1_000_000
        # One that Ray knows to be dead isn't asked.
        del pages["/b"]
        nodes.pop(1)
        assert await answered(found) == 500_000

    with metrics_page(pages) as url:
        asyncio.run(scenario(url))
