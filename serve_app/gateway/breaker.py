"""A circuit breaker for each variant: while it is down, calls degrade at once instead of waiting."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pass:
    """A call that was let through; hand it back to `Breaker.settle` whatever becomes of it."""

    began: float
    is_probe: bool


class Breaker:
    """Opens after `failures_to_open` failures in a row; then one call at a time, `probe_every_s` after the last,
    is let through until one succeeds; beside it, as often, one whose failure would tell nothing. Not thread-safe:
    it lives on one event loop."""

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
        self._probing = False
        self._next_probe_at = self._next_try_at = 0.0
        self._last_success_at = float("-inf")

    def enter(self, can_probe: bool = True) -> Pass | None:
        """Lets a call through, or not (None). `can_probe` says that its failure would tell something."""
        now = self.clock()
        if self.failures < self.failures_to_open:
            return Pass(now, is_probe=False)
        if not can_probe:
            # It keeps no other from the probe, but it may succeed; and there may be no others.
            if now < self._next_try_at:
                return None
            self._next_try_at = now + self.probe_every_s
            return Pass(now, is_probe=False)
        if self._probing or now < self._next_probe_at:
            return None
        self._probing = True
        return Pass(now, is_probe=True)

    def succeeded(self) -> None:
        """The other side did some work, be it a part of a call."""
        self.failures = 0
        self._last_success_at = self.clock()

    def settle(self, call: Pass, failed: bool | None) -> None:
        """The call is over; `failed` is None when that says nothing about the other side. A failure counts unless
        the other side did anything since the call began: then it is alive, and was asked for too much."""
        now = self.clock()
        if call.is_probe:
            self._probing = False
            self._next_probe_at = now if failed is None else now + self.probe_every_s
        if failed and self._last_success_at < call.began:
            self.failures += 1
            if self.failures == self.failures_to_open:
                self._next_probe_at = self._next_try_at = now + self.probe_every_s
