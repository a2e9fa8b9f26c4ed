"""Which fingerprint a variant's scores, or recall's candidates, have now, as far as a gateway knows. Pure.

Answers tell; and because a gateway that finds everything in its cache gets none, an application is also asked
whenever Serve's status shows that something changed: while it is being deployed, and for a while after any change.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

# An answer of a replica that is on its way out may still come in this long after it left Serve's status.
_ASKED_FOR_S = 10.0


@dataclass(slots=True)
class _Application:
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
        self._applications: dict[str, _Application] = {}

    def of(self, app: str) -> str:
        """Empty where it isn't known."""
        known = self._applications.get(app)
        return known.fingerprint if known else ""

    def heard(self, app: str, fingerprint: str, asked_at: float) -> None:
        """An answer came to a call made at `asked_at`. It counts unless one is known to a later call: a replica
        that is being replaced may answer last."""
        known = self._applications.setdefault(app, _Application())
        if asked_at >= known.asked_at:
            known.fingerprint, known.asked_at = fingerprint, asked_at

    def follow(
        self, app: str, status: str, running: int, deployed_at_s: float, *, every_s: float | None = None
    ) -> bool:
        """Takes in what Serve says of the application; whether it is to be asked now: after a change, and where it
        hasn't been heard for `every_s`. One that sleeps isn't, which would wake it: if it was deployed again since
        it was heard, its fingerprint is forgotten."""
        known = self._applications.setdefault(app, _Application())
        now = self.clock()
        if deployed_at_s != known.deployed_at_s:
            known.deployed_at_s, known.redeployed_at, known.changed_at = deployed_at_s, now, now
        if (status, running) != known.state:
            known.state, known.changed_at = (status, running), now
        if running == 0:
            if status == "RUNNING" and known.asked_at < known.redeployed_at:
                known.fingerprint = ""
            return False
        overdue = every_s is not None and now - known.asked_at >= every_s
        return status != "RUNNING" or now - known.changed_at < _ASKED_FOR_S or overdue

    def keep(self, apps: Collection[str]) -> None:
        """Forgets all others."""
        self._applications = {name: known for name, known in self._applications.items() if name in apps}
