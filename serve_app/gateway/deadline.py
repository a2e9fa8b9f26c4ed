"""A call's deadline, and how it is split over the stages of a pipeline."""

import time
from collections.abc import Callable
from dataclasses import dataclass

# Kept back for putting the answer together: a tenth of the time asked for, at most this long.
_RESERVE_S = 0.25


@dataclass(frozen=True, slots=True)
class Deadline:
    """`expires_at` is the moment, by `clock`, at which the client stops waiting."""

    expires_at: float
    reserve_s: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> "Deadline":
        return cls(clock() + timeout_s, min(_RESERVE_S, timeout_s / 10), clock)

    def remaining_s(self) -> float:
        """Seconds left for work, the reserve for the answer already taken off; never negative."""
        return max(0.0, self.expires_at - self.reserve_s - self.clock())

    def share_s(self, stages_left: int) -> float:
        """What one stage may take when `stages_left` (itself included) have to run: an equal part of what is
        left, so that time saved by one stage goes to the later ones."""
        return self.remaining_s() / max(1, stages_left)
