"""A circuit breaker for each variant: while it is down, calls degrade at once instead of waiting."""

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures_to_open` failures in a row; then one call at a time, `probe_every_s` after the last,
    is let through until one succeeds. Not thread-safe: it lives on one event loop."""

    def __init__(
        self,
        failures_to_open: int = 3,
        probe_every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures_to_open = failures_to_open
        self.probe_every_s = probe_every_s
        self.clock = clock
        self.failures = 0
        self.next_probe_at = 0.0

    def allows(self) -> bool:
        """Whether a call may go out now. One that may has to be `settled` afterwards."""
        if self.failures < self.failures_to_open:
            return True
        if self.clock() < self.next_probe_at:
            return False
        self.next_probe_at = float("inf")
        return True

    def settled(self, succeeded: bool | None) -> None:
        """A call that went out ended; None: in a way that says nothing about the other side."""
        if succeeded:
            self.failures = 0
        elif succeeded is False:
            self.failures += 1
        self.next_probe_at = self.clock() + self.probe_every_s
