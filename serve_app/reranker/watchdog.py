"""How long an engine may be silent before it counts as hung. Knows no vLLM."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from serve_app.reranker.messages import EngineError

# Before anything was measured; also what vLLM itself gives a step of several workers.
_UNMEASURED_S = 300.0
_LEAST_S = 60.0
# A step may take this many times what a full batch takes on average: neighbours on the same cores, a cold start.
_SLACK = 20.0


class Watchdog:
    """Learns from what was read how long a step can take.

    An engine answers between two steps, and a step reads at most `batch_tokens`. What is right for a small model
    would replace a large one on a slow CPU again and again, so the limit follows the measured rate. The first
    read after a start isn't measured: it is slower than any later one.
    """

    def __init__(self, batch_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._batch_tokens = batch_tokens
        self._clock = clock
        self._since: float | None = None
        self._warm = False
        self._busy_s = 0.0
        self._tokens = 0
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0

    def working(self) -> None:
        """There is work from now on, if there wasn't before."""
        if self._since is None:
            self._since = self._clock()

    def read(self, tokens: int) -> None:
        """The engine has read `tokens`, those from its cache not counted."""
        self.idle()
        if self._warm:
            self._tokens += tokens
        else:
            self._warm, self._busy_s = True, 0.0
        self.working()

    def idle(self) -> None:
        if self._since is not None:
            self._busy_s += self._clock() - self._since
            self._since = None

    def limit_s(self) -> float:
        if not self._tokens:
            return _UNMEASURED_S
        return max(_LEAST_S, _SLACK * self._batch_tokens * self._busy_s / self._tokens)

    def check(self, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Asks the engine, whose answer ends `ask`, unless a question is open already. Raises EngineError where
        one has been open for longer than the limit. Needs a running loop."""
        if self._question is None or self._question.done():
            self._asked_at = self._clock()
            self._question = asyncio.create_task(ask())
        waited_s, limit_s = self._clock() - self._asked_at, self.limit_s()
        if waited_s > limit_s:
            raise EngineError(f"engine hangs: a step has taken {waited_s:.0f} s, limit {limit_s:.0f} s")
