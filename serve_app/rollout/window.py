"""What guards judge: a rollout's figures since a moment. What no longer changes is read and added up once."""

import copy
import math
from collections.abc import Iterator

from serve_app.rollout.document import RolloutDocument
from serve_app.rollout.figures import Clicks, Figures
from serve_app.rollout.guards import METRICS
from serve_app.rollout.store import Limits, Report, Store

# Reports that are older are no longer expected, and those of buckets that are even older no longer kept.
SETTLED_S, _KEPT_S = 30, int(Limits().figures_ttl_s)
# Buckets that the store is asked for at once, so that nobody else waits long for it.
_SLICE_S = 600
# Clicks come after their search; a minute's are taken for complete this long after it.
_CLICKS_AFTER_S = 120.0


class Window:
    """Since the moment `since`, in seconds since the epoch, as `now` is. One thread reads it at a time."""

    def __init__(self, since: float, now: float) -> None:
        self.since = since
        # After the store was away, gateways still send older reports for a while: then all is read once more.
        self._again_at = now + SETTLED_S
        self._came_late = False
        self._start()

    def _start(self) -> None:
        # The sums before a bucket. One that had begun earlier than the window is left out: some of its calls met
        # another weight.
        self._settled = int(self.since) + 1, {"canary": Figures(), "stable": Figures()}

    def read(self, store: Store, rollout_id: str, now: float) -> tuple[Figures, Figures]:
        """Canary's and stable's."""
        if now >= self._again_at:
            self._again_at = float("inf")
            self._start()
        if self._came_late:
            self._came_late = False
            self._start()
        if int(now) - SETTLED_S < self._settled[0]:
            # Just begun; or the clock was set back, and settled buckets get calls once more.
            self._start()
        start, sides = self._settled
        settled_before, settled = max(start, int(now) - SETTLED_S), None
        for report in self._reports(store, rollout_id, start, int(now)):
            if settled is None and report.bucket >= settled_before:
                settled = sides
            if report.role in sides:
                merged = sides[report.role].merge(Figures.from_json(report.value))
                sides = {**sides, report.role: merged}
        self._settled = settled_before, sides if settled is None else settled
        return sides["canary"], sides["stable"]

    def recount(self) -> None:
        """The next time, all is read once more: a report came late."""
        self._came_late = True

    def copy(self) -> "Window":
        """To be read beside this one."""
        return copy.copy(self)

    def _reports(self, store: Store, rollout_id: str, start: int, now: int) -> Iterator[Report]:
        """By bucket."""
        start = max(start, now - _KEPT_S)
        while start + _SLICE_S < now:
            yield from store.figures(rollout_id, start, start + _SLICE_S)
            start += _SLICE_S
        yield from store.figures(rollout_id, start)


def clicks(
    store: Store, rollout_id: str, document: RolloutDocument, since: float, now: float
) -> list[tuple[Clicks, Clicks]]:
    """On the searches of whole minutes since that moment, by minute, canary's and stable's; none where no guard
    judges them."""
    if not any(METRICS[metric].source == "clicks" for metric in document.guards):
        return []
    blocks: dict[int, dict[str, Clicks]] = {}
    for counts in store.event_counts(rollout_id, math.ceil(since / 60)):
        # One that lies ahead was counted before the clock was set back.
        if abs(now - (counts.minute + 1) * 60) > _CLICKS_AFTER_S:
            blocks.setdefault(counts.minute, {})[counts.role] = Clicks(list(counts.by_rank))
    return [(block.get("canary", Clicks()), block.get("stable", Clicks())) for _, block in sorted(blocks.items())]
