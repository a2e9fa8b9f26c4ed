"""Which fingerprint a variant's scores have now, as far as a gateway knows. Pure.

Answers tell; and because a gateway that finds every score in its cache gets none, a variant is also asked whenever
Serve's status shows that something changed: while it is being deployed, and for a while after any change.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

# An answer of a replica that is on its way out may still come in this long after it left Serve's status.
_ASKED_FOR_S = 10.0


@dataclass(slots=True)
class _Variant:
    fingerprint: str = ""
    # Of the call whose answer it was.
    asked_at: float = float("-inf")
    deployed_at_s: float = 0.0
    # Status and running replicas.
    state: tuple[str, int] | None = None
    changed_at: float = float("-inf")
    redeployed_at: float = float("-inf")


class Fingerprints:
    """One per gateway replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._variants: dict[str, _Variant] = {}

    def of(self, variant: str) -> str:
        """Empty where it isn't known."""
        known = self._variants.get(variant)
        return known.fingerprint if known else ""

    def heard(self, variant: str, fingerprint: str, asked_at: float) -> None:
        """An answer came to a call made at `asked_at`. It counts unless one is known to a later call: a replica
        that is being replaced may answer last."""
        known = self._variants.setdefault(variant, _Variant())
        if asked_at >= known.asked_at:
            known.fingerprint, known.asked_at = fingerprint, asked_at

    def follow(self, variant: str, status: str, running: int, deployed_at_s: float) -> bool:
        """Takes in what Serve says of the variant; whether it is to be asked now. One that sleeps isn't, which
        would wake it: if it was deployed again since it was heard, its fingerprint is forgotten."""
        known = self._variants.setdefault(variant, _Variant())
        now = self.clock()
        if deployed_at_s != known.deployed_at_s:
            known.deployed_at_s, known.redeployed_at, known.changed_at = deployed_at_s, now, now
        if (status, running) != known.state:
            known.state, known.changed_at = (status, running), now
        if running == 0:
            if status == "RUNNING" and known.asked_at < known.redeployed_at:
                known.fingerprint = ""
            return False
        return status != "RUNNING" or now - known.changed_at < _ASKED_FOR_S

    def keep(self, variants: Collection[str]) -> None:
        """Forgets all others."""
        self._variants = {name: known for name, known in self._variants.items() if name in variants}
