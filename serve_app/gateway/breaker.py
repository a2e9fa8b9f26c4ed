"""A circuit breaker for each variant: while it is down, calls degrade at once instead of waiting."""

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures_to_open` failures in a row; then one call in `probe_every_s` is let through
    until one succeeds. Not thread-safe: it lives on one event loop."""

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
        """Whether a call may go out now; an open breaker says yes once per `probe_every_s`."""
        if self.failures < self.failures_to_open:
            return True
        now = self.clock()
        if now < self.next_probe_at:
            return False
        self.next_probe_at = now + self.probe_every_s
        return True

    def succeeded(self) -> None:
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1
        if self.failures == self.failures_to_open:
            self.next_probe_at = self.clock() + self.probe_every_s
