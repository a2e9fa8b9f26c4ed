import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.recall import searcher
from serve_app.recall.messages import Candidate, RecallRequest
from serve_app.recall.searcher import Searcher


class Slow:
    """A backend whose searches wait until they are released."""

    fingerprint = "slow"

    def __init__(self) -> None:
        self.release = threading.Event()
        self.started: list[str] = []
        self.at_once = self.most_at_once = 0

    def search(self, query: str, k: int) -> list[Candidate]:
        self.started.append(query)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.release.wait(10)
        self.at_once -= 1
        return [Candidate(query, 1.0, "", "", "{}")]

    def stats(self) -> dict[str, Any]:
        return {"documents": 1}


async def started(backend: Slow, n: int) -> None:
    while len(backend.started) < n:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def run(scenario: Callable[[Slow], Any]) -> None:
    backend = Slow()
    try:
        asyncio.run(asyncio.wait_for(scenario(backend), 20))
    finally:
        backend.release.set()


def test_no_more_searches_than_threads_run_at_once() -> None:
    async def scenario(backend: Slow) -> None:
        searcher = Searcher(backend, threads=2)
        calls = [asyncio.create_task(searcher.search(RecallRequest(str(i), 1))) for i in range(6)]
        await started(backend, 2)
        backend.release.set()
        assert [(await call).candidates[0].id for call in calls] == list("012345")
        assert backend.most_at_once == 2

    run(scenario)


def test_deadline_holds_in_the_queue_and_dropped_work_never_runs() -> None:
    async def scenario(backend: Slow) -> None:
        searcher = Searcher(backend, threads=1)
        running = asyncio.create_task(searcher.search(RecallRequest("first", 1)))
        await started(backend, 1)
        before = time.monotonic()
        with pytest.raises(TimeoutError, match="recall didn't answer in timeout_s"):
            await searcher.search(RecallRequest("second", 1, timeout_s=0.05))
        assert time.monotonic() - before < 2
        backend.release.set()
        assert (await running).candidates[0].id == "first"
        assert (await searcher.search(RecallRequest("third", 1))).took_ms >= 0
        assert backend.started == ["first", "third"]

    run(scenario)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_dead_deadline_is_a_timeout(timeout_s: float) -> None:
    async def scenario(backend: Slow) -> None:
        with pytest.raises(TimeoutError):
            await Searcher(backend, threads=1).search(RecallRequest("q", 1, timeout_s=timeout_s))

    run(scenario)


def test_k_below_one_is_refused() -> None:
    async def scenario(backend: Slow) -> None:
        with pytest.raises(ValueError, match="k is 0; allowed: 1 or more"):
            await Searcher(backend, threads=1).search(RecallRequest("q", 0))

    run(scenario)


def test_hanging_search_is_unhealthy_but_a_queue_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(backend: Slow) -> None:
        one = Searcher(backend, threads=1)
        one.check()
        calls = [asyncio.create_task(one.search(RecallRequest("q", 1))) for _ in range(50)]
        await started(backend, 1)
        one.check()
        monkeypatch.setattr(searcher, "STUCK_S", 0.0)
        with pytest.raises(RuntimeError, match="a search has been running for"):
            one.check()
        backend.release.set()
        await asyncio.gather(*calls)
        one.check()

    run(scenario)


def test_importing_the_room_loads_neither_ray_nor_tantivy() -> None:
    code = "import sys, serve_app.recall, serve_app.recall.messages; print({'ray', 'tantivy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
