"""Gathers what looks need beside the controller's loop: what takes long, or never answers, holds up no rollout."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.figures import Figures
from serve_app.rollout.guards import Verdict, judge
from serve_app.rollout.machine import State
from serve_app.rollout.store import Report, Store
from serve_app.rollout.window import SETTLED_S, Window, clicks

T = TypeVar("T")

# Figures of so many rollouts are read at once, so that threads are left for the store's other calls.
_READERS = 2
# Windows that are kept to be shown: of rollouts that have ended, and where another controller looks.
_SHOWN = 16
# A report of a bucket that began so long ago may have come too late for a window that was read a moment before.
_LATE_S = SETTLED_S - 10

# Variants of those given that have no running replica.
NotReady = Callable[[Sequence[str]], Awaitable[list[str]]]


class Readiness:
    """Which variants have a replica. One question at a time, because the fleet may not answer."""

    def __init__(self, not_ready: NotReady) -> None:
        self._not_ready = not_ready
        self._asking: asyncio.Future[list[str]] | None = None
        self._asked: frozenset[str] = frozenset()
        self._ready: frozenset[str] = frozenset()

    async def ask(self, variants: Sequence[str], patience_s: float) -> None:
        """Raises what the question raised."""
        self._ready = frozenset()
        if self._asking is None:
            self._asked = frozenset(variants)
            self._asking = _beside(self._not_ready(variants))
        if await _done(self._asking, patience_s):
            asking, self._asking = self._asking, None
            self._ready = self._asked - set(asking.result())

    def missing(self, variants: Sequence[str]) -> list[str]:
        """Those of which the last answer doesn't say that they have one."""
        return [variant for variant in variants if variant not in self._ready]


@dataclass(slots=True)
class Look:
    """What is known of a rollout's figures: no `verdicts` before the first."""

    window: Window
    verdicts: list[Verdict] | None = None
    at: float = float("-inf")
    reading: asyncio.Future[list[Verdict]] | None = None


class Looks:
    """A look for each rollout that is under way, and the windows that were shown last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._looks: dict[str, Look] = {}
        self._shown: dict[str, Window] = {}
        self._showing = threading.Lock()
        self._readers = asyncio.Semaphore(_READERS)

    async def look(
        self, rollout_id: str, document: RolloutDocument, state: State, every_s: float, patience_s: float
    ) -> Look:
        """With new verdicts where it is time for them and they come soon. Raises StoreError."""
        look = self._looks.get(rollout_id)
        if look is None or look.window.since != state.window_from:
            look = self._looks[rollout_id] = Look(Window(state.window_from, time.time()))
        if look.reading is None and time.monotonic() - look.at >= every_s:
            look.reading = _beside(self._judged(look.window, rollout_id, document, state.clicks_from))
        if look.reading is not None and await _done(look.reading, patience_s):
            reading, look.reading, look.at = look.reading, None, time.monotonic()
            look.verdicts = reading.result()
        return look

    def verdicts(self, rollout_id: str) -> list[Verdict]:
        """The last ones."""
        look = self._looks.get(rollout_id)
        return look.verdicts or [] if look else []

    def figures(self, rollout_id: str, since: float) -> tuple[Figures, Figures]:
        """Canary's and stable's since that moment, read beside the looks, in any thread. Raises StoreError."""
        look = self._looks.get(rollout_id)
        window = look.window if look else self._shown.get(rollout_id)
        window = window.copy() if window and window.since == since else Window(since, time.time())
        sides = window.read(self._store, rollout_id, time.time())
        self._keep(rollout_id, window)
        return sides

    def forget(self, rollout_id: str) -> None:
        """It has ended: its figures are shown, and judged no more."""
        if look := self._looks.pop(rollout_id, None):
            self._keep(rollout_id, look.window.copy())

    def heard(self, reports: Iterable[Report]) -> None:
        """One that is older than windows expect is counted all the same."""
        late = {report.rollout_id for report in reports if report.bucket < time.time() - _LATE_S}
        with self._showing:
            windows = [window for rollout_id, window in self._shown.items() if rollout_id in late]
        windows += [look.window for rollout_id, look in self._looks.items() if rollout_id in late]
        for window in windows:
            window.recount()

    def clear(self) -> None:
        self._looks.clear()
        with self._showing:
            self._shown.clear()

    def _keep(self, rollout_id: str, window: Window) -> None:
        with self._showing:
            self._shown.pop(rollout_id, None)
            self._shown[rollout_id] = window
            if len(self._shown) > _SHOWN:
                del self._shown[next(iter(self._shown))]

    async def _judged(
        self, window: Window, rollout_id: str, document: RolloutDocument, clicks_from: float
    ) -> list[Verdict]:
        def judged() -> list[Verdict]:
            now = time.time()
            canary, stable = window.read(self._store, rollout_id, now)
            clicked = clicks(self._store, rollout_id, document, clicks_from, now)
            return judge(document.guards, canary, stable, clicked)

        async with self._readers:
            return await asyncio.to_thread(judged)


def _beside(work: Awaitable[T]) -> asyncio.Future[T]:
    task = asyncio.ensure_future(work)
    # Also where nobody asks for its result any more.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def _done(task: asyncio.Future[Any], patience_s: float) -> bool:
    await asyncio.wait({task}, timeout=patience_s)
    return task.done()
