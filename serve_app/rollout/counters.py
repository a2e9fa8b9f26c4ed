"""A gateway's figures by rollout, side and time, until they are sent. Pure."""

from typing import Literal

from serve_app.rollout.figures import Figures

Role = Literal["stable", "canary"]
# The controller reads whole buckets, and leaves out those that had begun before the weight in force.
BUCKET_S = 5


class Counters:
    """Figures by rollout, role and bucket of time, which its start names, in seconds since the epoch."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, Role, int], Figures] = {}

    def at(self, rollout: str, role: Role, now_s: float) -> Figures:
        """What to add a call to that came at `now_s`."""
        key = (rollout, role, int(now_s // BUCKET_S) * BUCKET_S)
        found = self._figures.get(key)
        if found is None:
            found = self._figures[key] = Figures()
        return found

    def rows(self) -> list[tuple[str, Role, int, Figures]]:
        """Rollout, role, start of the bucket, figures."""
        return [(*key, figures) for key, figures in self._figures.items()]
