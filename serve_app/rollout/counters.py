"""A gateway's figures by rollout, side and time. Pure.

A gateway keeps one `Counters` and adds to it: `counters.at(rollout, role, now_s).add(...)`, and, on the canary's
figures, `.add_mirrored(...)` for calls mirrored to it. The controller reads the `to_json` of every gateway, merges
them and takes a `window`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from serve_app.rollout.figures import Figures

Role = Literal["stable", "canary"]


class Counters:
    """Figures by rollout, role and bucket of time, which its start names, in seconds since the epoch."""

    def __init__(self, bucket_s: int = 5) -> None:
        self.bucket_s = bucket_s
        self._figures: dict[tuple[str, Role, int], Figures] = {}

    def at(self, rollout: str, role: Role, now_s: float) -> Figures:
        """What to add a call to that came at `now_s`."""
        key = (rollout, role, int(now_s // self.bucket_s) * self.bucket_s)
        found = self._figures.get(key)
        if found is None:
            found = self._figures[key] = Figures()
        return found

    def rows(self) -> list[tuple[str, Role, int, Figures]]:
        """Rollout, role, start of the bucket, figures."""
        return [(*key, figures) for key, figures in self._figures.items()]

    def window(self, rollout: str, role: Role, since_s: float, until_s: float = math.inf) -> Figures:
        """All of the buckets that begin at `since_s` or later, and before `until_s`."""
        total = Figures()
        for (name, side, start), figures in self._figures.items():
            if name == rollout and side == role and since_s <= start < until_s:
                total = total.merge(figures)
        return total

    def forget(self, before_s: float) -> None:
        """Drops buckets that ended before."""
        for key in [key for key in self._figures if key[2] + self.bucket_s <= before_s]:
            del self._figures[key]

    def merge(self, other: "Counters") -> "Counters":
        """Both together. Raises ValueError where their buckets have different lengths."""
        if other.bucket_s != self.bucket_s:
            raise ValueError(f"bucket_s is {other.bucket_s}, which can't be merged with {self.bucket_s}")
        merged = Counters(self.bucket_s)
        for key in self._figures.keys() | other._figures.keys():
            merged._figures[key] = self._figures.get(key, Figures()).merge(other._figures.get(key, Figures()))
        return merged

    def to_json(self) -> dict[str, Any]:
        rows = [[*key, figures.to_json()] for key, figures in sorted(self._figures.items(), key=lambda kv: kv[0])]
        return {"bucket_s": self.bucket_s, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Counters":
        """From what `to_json` gave. Raises ValueError for anything else."""
        try:
            counters = cls(int(data["bucket_s"]))
            for rollout, role, start, figures in data["rows"]:
                counters._figures[rollout, role, int(start)] = Figures.from_json(figures)
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no counters: {error}") from None
        return counters
