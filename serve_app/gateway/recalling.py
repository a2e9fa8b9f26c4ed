"""Candidates of a search: from the gateway's memory, or from recall.

Every list is known under the fingerprint of the index that it came from (`RecallResult.fingerprint`), and found
only under the one that recall answered last.
"""

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.config import Cache
from serve_app.gateway.fleet import Fleet
from serve_app.recall.messages import Candidate, RecallRequest

# A candidate without its texts: the object, its score and its place in the list.
_CANDIDATE_BYTES = 112


@dataclass(frozen=True, slots=True)
class Recalled:
    """Candidates best first, as recall gave them; `cached`: not for this call. `took_ms` as the gateway saw it."""

    candidates: list[Candidate]
    took_ms: float
    cached: bool


class CandidateCache:
    """Lists of candidates by key in at most `max_bytes`, the least recently used making room. Pure."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._lists: OrderedDict[tuple[str, ...], tuple[list[Candidate], float, int]] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> list[Candidate] | None:
        if (known := self._lists.get(key)) is None:
            return None
        candidates, expires, _ = known
        if expires <= self.clock():
            self._drop(key)
            return None
        self._lists.move_to_end(key)
        return candidates

    def put(self, key: tuple[str, ...], candidates: list[Candidate], ttl_s: float) -> None:
        size = _size_bytes(key, candidates)
        if key in self._lists:
            self._drop(key)
        if size > self.max_bytes:
            return
        self._lists[key] = candidates, self.clock() + ttl_s, size
        self.size_bytes += size
        while self.size_bytes > self.max_bytes:
            self._drop(next(iter(self._lists)))

    def _drop(self, key: tuple[str, ...]) -> None:
        self.size_bytes -= self._lists.pop(key)[-1]


class Recalling:
    """One per gateway replica, on its event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._settings: Cache | None = None
        self._cache = CandidateCache(0)

    @property
    def size_bytes(self) -> int:
        return self._cache.size_bytes

    def configure(self, settings: Cache | None) -> None:
        """Puts `settings` in force; None turns the cache off. What is cached stays where its size does and
        its time isn't cut."""
        old = self._settings
        max_bytes = settings.recall_max_bytes if settings else 0
        if max_bytes != self._cache.max_bytes or (settings and old and settings.ttl_s < old.ttl_s):
            self._cache = CandidateCache(max_bytes)
        self._settings = settings

    async def recall(self, app: str, request: RecallRequest, *, fresh: bool) -> Recalled:
        """Raises StageFailure. A `fresh` call is answered by recall, and leaves what it found for others."""
        started = time.monotonic()
        question = (app, request.query, str(request.k))
        fingerprint = self.fleet.fingerprints.of(app)
        cached = self._cache.get((fingerprint, *question)) if fingerprint and not fresh else None
        candidates = cached
        if candidates is None:
            result = await self.fleet.recall(app, request)
            candidates = result.candidates
            if result.fingerprint and self._settings is not None:
                self._cache.put((result.fingerprint, *question), candidates, self._settings.ttl_s)
        return Recalled(candidates, (time.monotonic() - started) * 1e3, cached is not None)


def _size_bytes(key: tuple[str, ...], candidates: list[Candidate]) -> int:
    texts = sum(
        sys.getsizeof(found.id)
        + sys.getsizeof(found.title)
        + sys.getsizeof(found.text)
        + sys.getsizeof(found.source)
        for found in candidates
    )
    return texts + _CANDIDATE_BYTES * len(candidates) + sum(map(sys.getsizeof, key))
