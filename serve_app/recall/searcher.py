"""Searches on threads: how a backend is called from a replica's event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve_app.recall.backend import Backend
from serve_app.recall.messages import RecallRequest, RecallResult

T = TypeVar("T")

# A search takes milliseconds; one that hangs this long (a disk that doesn't answer) costs the replica its health.
STUCK_S = 60.0


class Searcher:
    """Runs at most `threads` searches at once; the others wait for a thread until their time is over."""

    def __init__(self, backend: Backend, threads: int) -> None:
        self.backend = backend
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="recall")
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}

    async def search(self, request: RecallRequest) -> RecallResult:
        """Raises `ValueError` for `k` below 1 and `TimeoutError` when `timeout_s` passes, also in the queue."""
        if request.k < 1:
            raise ValueError(f"k is {request.k}; allowed: 1 or more")
        started = time.monotonic()
        deadline = started + request.timeout_s
        fingerprint = self.backend.fingerprint

        def work() -> RecallResult:
            if time.monotonic() >= deadline:
                raise TimeoutError
            candidates = self.backend.search(request.query, request.k)
            return RecallResult(candidates, took_ms=(time.monotonic() - started) * 1e3, fingerprint=fingerprint)

        try:
            return await self._run(work, request.timeout_s)
        except TimeoutError:
            waited_ms = (time.monotonic() - started) * 1e3
            raise TimeoutError(f"recall didn't answer in timeout_s: {waited_ms:.0f} ms passed") from None

    async def stats(self) -> dict[str, Any]:
        return await self._run(self.backend.stats, 10.0)

    def check(self) -> None:
        """Raises `RuntimeError` when a search hangs. A queue of searches is load, and no reason to be replaced."""
        with self._lock:
            oldest_s = time.monotonic() - min(self._running.values(), default=time.monotonic())
        if oldest_s > STUCK_S:
            raise RuntimeError(f"a search has been running for {oldest_s:.0f} s")

    async def _run(self, work: Callable[[], T], timeout_s: float) -> T:
        """`work` on a thread. When the caller stops waiting, work that hasn't begun is dropped."""

        def noted() -> T:
            thread = threading.get_ident()
            with self._lock:
                self._running[thread] = time.monotonic()
            try:
                return work()
            finally:
                with self._lock:
                    del self._running[thread]

        return await asyncio.wait_for(asyncio.wrap_future(self._pool.submit(noted)), max(timeout_s, 0))
