"""Scores of pairs: from the cache, from a call that is computing them just now, or from the variant.

Every score is known under the fingerprint of what computed it (`ScoreResult.fingerprint`), and an answer's scores
are all of one fingerprint, also while a variant is being changed.
"""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from serve_app.config import Cache
from serve_app.gateway.cache import Patience, Scores, ScoreTable, Times, keys_of, pair_names
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.pipeline import StageFailure
from serve_app.gateway.redis_tier import RedisTier
from serve_app.reranker.messages import ScoreRequest, ScoreResult

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

# More than this is hashed on a thread, because it takes over a millisecond.
_HASHED_AT_ONCE_CHARS = 1_000_000
# One chunk of another call: its fingerprint and scores by pair, or None where that call came to nothing.
_Shared = asyncio.Future[tuple[str, dict[bytes, float]] | None]


@dataclass(frozen=True, slots=True)
class _Ask:
    """A call's question. `reads`: scores that are known already will do."""

    variant: str
    request: ScoreRequest
    names: list[bytes]
    pairs_per_call: int
    give_up_at: float
    timeout_s: float
    mirrored: bool
    reads: bool
    patience: Patience

    def left_s(self) -> float:
        """Raises StageFailure when there is nothing left."""
        left = self.give_up_at - time.monotonic()
        if left <= 0:
            raise self.timeout()
        return left

    def timeout(self) -> StageFailure:
        return StageFailure("timeout", f"{self.variant} did not answer within {self.timeout_s * 1e3:.0f} ms")


class _Found:
    """Scores of one fingerprint, by position in the question."""

    def __init__(self, n: int) -> None:
        self.scores: Scores = np.zeros(n)
        self.there = np.zeros(n, np.bool_)
        # Computed for this very question.
        self.computed = np.zeros(n, np.bool_)

    def missing(self) -> list[int]:
        missing: list[int] = np.flatnonzero(~self.there).tolist()
        return missing

    def add(
        self, positions: Sequence[int] | npt.NDArray[np.intp], scores: Sequence[float] | Scores, computed: bool
    ) -> None:
        where = np.asarray(positions, np.intp)
        self.scores[where], self.there[where], self.computed[where] = scores, True, computed


class Scoring:
    """One per gateway replica, on its event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._settings: Cache | None = None
        self._table: ScoreTable | None = None
        self._redis: RedisTier | None = None
        self._closing: asyncio.Task[None] | None = None
        # What is being computed, by variant and the fingerprint it was asked under.
        self._flights: dict[tuple[str, str], dict[bytes, _Shared]] = {}
        self._pairs: Counter[str] = Counter()

    def configure(self, settings: Cache | None) -> None:
        """Puts `settings` in force; None turns the cache off. What is cached stays where its size does and
        its time isn't cut. Raises MemoryError for a `max_bytes` that the machine hasn't."""
        old = self._settings
        if settings == old:
            return
        if not settings or not old or settings.max_bytes != old.max_bytes or settings.ttl_s < old.ttl_s:
            # Without memory for it, all stays as it was.
            self._table = ScoreTable(settings.max_bytes) if settings else None
        self._settings = settings
        url = settings.redis.get_secret_value() if settings and settings.redis else None
        if self._redis is not None:
            self._closing = asyncio.get_running_loop().create_task(self._redis.close())
        self._redis = RedisTier(url, settings.ttl_s) if settings and url else None

    def stats(self) -> dict[str, Any]:
        """Pairs since the start, by where their scores came from, and what the cache holds."""
        stats: dict[str, Any] = {
            name: self._pairs[name] for name in ("memory_hits", "redis_hits", "shared", "computed")
        }
        if self._table is not None:
            stats |= {"entries": self._table.entries, "size_bytes": self._table.size_bytes}
        if self._redis is not None:
            stats |= {
                "redis_out": self._redis.out,
                "redis_errors": self._redis.errors,
                "redis_dropped": self._redis.dropped,
            }
        return stats

    async def score(
        self,
        variant: str,
        request: ScoreRequest,
        pairs_per_call: int,
        timeout_s: float,
        *,
        mirrored: bool = False,
        fresh: bool = False,
        patience: Patience | None = None,
    ) -> ScoreResult:
        """Scores for all documents of `request` within `timeout_s`. Nothing that is known already is used where
        the call is `mirrored` (it is there to try the variant) or wants it `fresh`; both leave scores for others.

        Raises StageFailure where any could not be had, and PromptTooLongError.
        """
        give_up_at = time.monotonic() + timeout_s
        documents = request.documents
        names: list[bytes] = []
        slots: Sequence[int] = range(len(documents))
        if self._table is not None:
            names = await _names(request)
            # The same document twice is one pair.
            first: dict[bytes, int] = {}
            slots = [first.setdefault(name, len(first)) for name in names]
            names = list(first)
            if len(names) < len(documents):
                texts = dict(zip(slots, documents, strict=True))
                request = replace(request, documents=[texts[i] for i in range(len(texts))])
        reads = self._table is not None and not (mirrored or fresh)
        ask = _Ask(
            variant,
            request,
            names,
            pairs_per_call,
            give_up_at,
            timeout_s,
            mirrored,
            reads,
            patience or Patience(),
        )
        computed: list[ScoreResult] = []
        fingerprint, found = await self._one_revision(ask, computed)
        where = np.asarray(slots, np.intp)
        computed_pairs = int(found.computed[where].sum())
        self._pairs["computed"] += computed_pairs
        return ScoreResult(
            scores=found.scores[where].tolist(),
            logits=[],
            tokens=sum(part.tokens for part in computed),
            cached_tokens=sum(part.cached_tokens for part in computed),
            truncated=sum(part.truncated for part in computed),
            revision=computed[-1].revision if computed else "",
            took_ms=max((part.took_ms for part in computed), default=0.0),
            fingerprint=fingerprint,
            cache_hits=len(documents) - computed_pairs,
        )

    async def _one_revision(self, ask: _Ask, computed: list[ScoreResult]) -> tuple[str, _Found]:
        """Scores for the whole question that are of one fingerprint, and which. Adds the variant's answers to
        `computed`, also those that didn't fit together.

        When answers of two fingerprints come together, the one with more of them is completed, by a single call
        to a replica; and if that didn't do, a single call is asked for everything."""
        n = len(ask.request.documents)
        found: defaultdict[str, _Found] = defaultdict(lambda: _Found(n))
        wanted = self.fleet.fingerprints.of(ask.variant)
        split = False
        # Of other calls, what was waited for long enough.
        late: set[_Shared] = set()
        while True:
            if ask.reads and wanted and not found[wanted].there.all():
                await self._look_up(ask, wanted, found[wanted])
            missing = found[wanted].missing()
            if not missing:
                return wanted, found[wanted]
            ask.left_s()
            got: Counter[str] = Counter()
            shared: dict[_Shared, list[int]] = {}
            own = missing
            if ask.reads and wanted and not split:
                own, shared = self._under_way(ask, wanted, missing, late)
            if own:
                chunk = len(own) if split else ask.pairs_per_call
                for positions, part in await self._compute(ask, wanted, own, chunk, late):
                    found[part.fingerprint].add(positions, part.scores, computed=True)
                    got[part.fingerprint] += len(positions)
                    computed.append(part)
            for fingerprint, positions, scores in await _wait(ask, shared, late):
                found[fingerprint].add(positions, scores, computed=False)
                got[fingerprint] += len(positions)
                self._pairs["shared"] += len(positions)
            if not got or set(got) == {wanted}:
                continue
            if not wanted and len(got) == 1:
                (wanted,) = got
                continue
            if split:
                (part,) = [part for _, part in await self._compute(ask, wanted, list(range(n)), n)]
                computed.append(part)
                whole = _Found(n)
                whole.add(range(n), part.scores, computed=True)
                return part.fingerprint, whole
            split = True
            ((wanted, _),) = got.most_common(1)

    async def _look_up(self, ask: _Ask, fingerprint: str, found: _Found) -> None:
        """Fills in what the cache has of what is missing."""
        if (table := self._table) is None:
            return
        missing = np.flatnonzero(~found.there)
        keys = keys_of(ask.variant, fingerprint, [ask.names[i] for i in missing])
        scores, there = table.get(keys)
        found.add(missing[there], scores[there], computed=False)
        self._pairs["memory_hits"] += int(there.sum())
        missing, keys = missing[~there], keys[~there]
        if self._redis is None or not len(missing):
            return
        scores, expires = await self._redis.get(keys, ask.patience)
        there = expires > time.time()
        if there.any():
            table.put(keys[there], scores[there], expires[there])
            found.add(missing[there], scores[there], computed=False)
            self._pairs["redis_hits"] += int(there.sum())
        # Meanwhile another call may have computed them.
        missing, keys = missing[~there], keys[~there]
        if len(missing):
            scores, there = table.get(keys)
            found.add(missing[there], scores[there], computed=False)
            self._pairs["memory_hits"] += int(there.sum())

    def _under_way(
        self, ask: _Ask, fingerprint: str, missing: list[int], late: Collection[_Shared]
    ) -> tuple[list[int], dict[_Shared, list[int]]]:
        """Of the `missing`, what nobody computes yet or others are `late` with, and what others do."""
        flights = self._flights.get((ask.variant, fingerprint), {})
        own: list[int] = []
        shared: dict[_Shared, list[int]] = {}
        for position in missing:
            flight = flights.get(ask.names[position])
            if flight is None or flight in late:
                own.append(position)
            else:
                shared.setdefault(flight, []).append(position)
        return own, shared

    async def _compute(
        self, ask: _Ask, wanted: str, positions: list[int], pairs_per_call: int, late: Collection[_Shared] = ()
    ) -> list[tuple[list[int], ScoreResult]]:
        """The variant's answers for `positions`, chunk by chunk; what comes is cached and shared at once. None,
        where all that other calls were `late` with came first."""
        request, documents = ask.request, ask.request.documents
        if len(positions) < len(documents):
            request = replace(request, documents=[documents[i] for i in positions])
        size = even_chunk(len(positions), pairs_per_call)
        chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
        names = [[ask.names[i] for i in chunk] for chunk in chunks] if ask.names else []
        # Live calls wait for no mirrored one, and nobody for one of an unknown fingerprint.
        flights = self._take_off(ask.variant, wanted, names) if ask.reads and wanted else []

        def scored(i: int, part: ScoreResult) -> None:
            if names:
                self._store(ask.variant, part.fingerprint, names[i], part.scores)
            if flights:
                flights[i].set_result((part.fingerprint, dict(zip(names[i], part.scores, strict=True))))

        try:
            computing = self.fleet.score(
                ask.variant, request, size, ask.left_s(), mirrored=ask.mirrored, scored=scored
            )
            parts = await _unless_there(computing, late, wanted)
        finally:
            self._land(ask.variant, wanted, names, flights)
        return list(zip(chunks, parts, strict=bool(parts)))

    def _take_off(self, variant: str, fingerprint: str, names: list[list[bytes]]) -> list[_Shared]:
        loop = asyncio.get_running_loop()
        flights: list[_Shared] = [loop.create_future() for _ in names]
        under_way = self._flights.setdefault((variant, fingerprint), {})
        for flight, chunk in zip(flights, names, strict=True):
            under_way.update(dict.fromkeys(chunk, flight))
        return flights

    def _land(self, variant: str, fingerprint: str, names: list[list[bytes]], flights: list[_Shared]) -> None:
        """However the call ended: who waits for it goes on."""
        under_way = self._flights.get((variant, fingerprint), {})
        for flight, chunk in zip(flights, names, strict=False):
            if not flight.done():
                flight.set_result(None)
            for name in chunk:
                # Another call may have taken the pair up, under a fingerprint that came back.
                if under_way.get(name) is flight:
                    del under_way[name]
        if not under_way:
            self._flights.pop((variant, fingerprint), None)

    def _store(self, variant: str, fingerprint: str, names: list[bytes], scores: Sequence[float]) -> None:
        """Scores whose fingerprint isn't known can't be found again."""
        if self._table is None or self._settings is None or not fingerprint:
            return
        values = np.asarray(scores, np.float64)
        good = np.isfinite(values)
        keys, values = keys_of(variant, fingerprint, names)[good], values[good]
        expires: Times = np.full(len(keys), min(2**32 - 1, int(time.time()) + self._settings.ttl_s), np.uint32)
        self._table.put(keys, values, expires)
        if self._redis is not None:
            self._redis.put(keys, values, expires)


def even_chunk(pairs: int, at_most: int) -> int:
    """The size of the fewest chunks that `pairs` can go in, made even: the largest decides when a call is done."""
    return math.ceil(pairs / math.ceil(pairs / at_most))


async def _names(request: ScoreRequest) -> list[bytes]:
    arguments = (request.query, request.documents, request.instruction, request.max_tokens_per_doc)
    if sum(map(len, request.documents)) < _HASHED_AT_ONCE_CHARS:
        return pair_names(*arguments)
    return await asyncio.to_thread(pair_names, *arguments)


async def _wait(
    ask: _Ask, shared: dict[_Shared, list[int]], late: set[_Shared]
) -> list[tuple[str, list[int], npt.NDArray[np.float64]]]:
    """What other calls computed of ours; what they didn't is left out. The first time, half of what is left is
    waited, and what hasn't come then is added to `late`: the other call may have more time than this one, and a
    replica that hangs. Raises StageFailure when time is up."""
    if not shared:
        return []
    left_s = ask.left_s()
    _, waiting = await asyncio.wait(shared, timeout=left_s if late else left_s / 2)
    if waiting and late:
        raise ask.timeout()
    late |= waiting
    found = []
    for flight, positions in shared.items():
        if flight.done() and (result := flight.result()) is not None:
            fingerprint, scores = result
            found.append((fingerprint, positions, np.array([scores[ask.names[i]] for i in positions])))
    return found


async def _unless_there(
    computing: Coroutine[Any, Any, list[T]], late: Collection[_Shared], wanted: str
) -> list[T]:
    """What `computing` gives. Nothing, where all that was `late` comes before it under the fingerprint `wanted`,
    and so is in the cache."""
    waiting: set[asyncio.Future[Any]] = {flight for flight in late if not flight.done()}
    if not waiting:
        return await computing
    task = asyncio.ensure_future(computing)
    try:
        while waiting:
            done, _ = await asyncio.wait({task, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            others = [flight.result() for flight in waiting & done]
            if task in done or any(result is None or result[0] != wanted for result in others):
                return await task
            waiting -= done
        return []
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
