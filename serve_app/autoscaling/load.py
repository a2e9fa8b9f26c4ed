"""What a replica says of its load. Pure; the replica calls it, the policy and the simulator read it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

# Busy seconds under full load after which a measurement of the rate counts a third.
_MEMORY_S = 30.0
# Busy seconds that are weighed as one piece; more where work goes on, as its tokens come at a batch's end.
_PIECE_S, _LONGEST_PIECE_S = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class Load:
    """A replica's load at one moment. `arrived_*` count from its start and never fall."""

    pending_tokens: float
    arrived_tokens: float
    arrived_calls: float
    # Tokens a second while busy; 0 while nothing has been scored.
    tokens_per_s: float
    # Seconds under full load that `tokens_per_s` rests on: what it weighs beside other replicas' rates.
    measured_s: float

    def stats(self) -> dict[str, float]:
        """In the form of Serve's `record_autoscaling_stats`."""
        return asdict(self)


class LoadMeter:
    """Counts the tokens of a replica's calls as they come and go, and measures its rate while it is busy.

    The rate is tokens scored over busy seconds, both decaying with busy time under load, so that idling does not
    fade it. A piece of busy time weighs as much as the tokens that were pending in it, up to a full batch: an
    engine that reads one short call at a time is busy too, but says little of what it can do.
    """

    def __init__(self, full_batch_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._full_batch_tokens = full_batch_tokens
        self._clock = clock
        self._last = clock()
        self._pending = self._arrived = self._calls = 0.0
        # The piece under way: busy seconds, tokens scored, token-seconds pending.
        self._busy_s = self._done = self._pending_s = 0.0
        # Its busy seconds and token-seconds when the last prompt was scored; what runs since has no tokens yet.
        self._busy_s_scored = self._pending_s_scored = 0.0
        # Decayed sums of the pieces before, weighed.
        self._weighed_s = self._weighed_done = 0.0

    @contextlib.contextmanager
    def call(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """One call of `tokens`. Yields what is to be called with the tokens of each prompt that was scored; what
        was not scored by the end is no longer pending either."""
        self._advance()
        self._pending += tokens
        self._arrived += tokens
        self._calls += 1
        left = tokens

        def scored(count: int) -> None:
            nonlocal left
            self._advance()
            self._pending -= count
            self._done += count
            self._busy_s_scored, self._pending_s_scored = self._busy_s, self._pending_s
            left -= count

        try:
            yield scored
        finally:
            self._advance()
            self._pending -= left

    def load(self) -> Load:
        self._advance()
        weight = self._weight(self._busy_s_scored, self._pending_s_scored)
        measured_s = self._weighed_s + weight * self._busy_s_scored
        done = self._weighed_done + weight * self._done
        return Load(
            pending_tokens=max(self._pending, 0.0),
            arrived_tokens=self._arrived,
            arrived_calls=self._calls,
            tokens_per_s=done / measured_s if done and measured_s else 0.0,
            measured_s=measured_s,
        )

    def _advance(self) -> None:
        now = self._clock()
        if self._pending > 0:
            self._busy_s += now - self._last
            self._pending_s += self._pending * (now - self._last)
        self._last = now
        if self._busy_s >= (_LONGEST_PIECE_S if self._pending > 0 else _PIECE_S):
            weight = self._weight(self._busy_s, self._pending_s)
            keep = math.exp(-weight * self._busy_s / _MEMORY_S)
            self._weighed_s = keep * self._weighed_s + weight * self._busy_s
            self._weighed_done = keep * self._weighed_done + weight * self._done
            self._busy_s = self._done = self._pending_s = 0.0
            self._busy_s_scored = self._pending_s_scored = 0.0

    def _weight(self, busy_s: float, pending_s: float) -> float:
        return min(1.0, pending_s / busy_s / self._full_batch_tokens) if busy_s else 0.0
