"""The work of a simulated variant: calls that come in, wait for replicas, are scored or run out of time.

All replicas together are one server of so many tokens a second, and all calls one queue, first come, first served.
The calls that arrive within a tick (0.1 s) are one bundle: their waits go evenly from the first one's to the last
one's. On top of its wait a call takes what it takes alone: its largest chunk on one replica, or all of it on all
replicas, whichever is longer, and `overhead_s`. A call that is not done when its deadline comes is expired: it
leaves the queue, or the engine, and what had been scored of it was in vain.

For one replica this is the M/G/1 queue, whose waits the tests compare with the Pollaczek-Khinchine formula. For
many it leaves out that a chunk waits for *its* replica: waits below one chunk's time are approximate, overload is
not (the tests compare it with a simulation of every replica and chunk).
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_app.autoscaling.traces import Trace

Floats = npt.NDArray[np.float64]

# Chunks in service that are none any more.
_NOBODY = 1e-3


@dataclass(frozen=True, slots=True)
class Service:
    """How one replica serves, and what the gateway sends it."""

    # Of a replica under full load.
    tokens_per_s: float = 40_000.0
    pairs_per_call: int = 64
    # Chunks that one replica takes; more wait in the callers' handles.
    max_ongoing_requests: int = 256
    # When the gateway gives a call up and answers without it.
    timeout_s: float = 5.0
    # What a call takes beside its tokens: network, tokenising, an engine step's fixed part.
    overhead_s: float = 0.02


class Arrivals:
    """A trace's calls by tick, drawn: Poisson for each kind."""

    def __init__(self, trace: Trace, service: Service, tick_s: float, seed: int) -> None:
        self.ticks = max(1, round(trace.seconds / tick_s))
        self.step = trace.steps(np.asarray((np.arange(self.ticks) + 0.5) * tick_s, dtype=np.float64))
        # By step and kind. The gateway cuts a call into even chunks.
        pairs = np.maximum(trace.pairs_per_call, 1)
        chunks = np.ceil(pairs / service.pairs_per_call)
        share = np.minimum(1.0, np.ceil(pairs / chunks) / pairs)
        self.alone_s = trace.tokens_per_call / service.tokens_per_s
        self.chunk_s = self.alone_s * share
        self.calls_by_kind = (
            np.random.default_rng(seed).poisson(trace.calls_per_s[self.step] * tick_s).astype(float)
        )
        self.calls = self.calls_by_kind.sum(axis=1)
        self.tokens = (self.calls_by_kind * trace.tokens_per_call[self.step]).sum(axis=1)
        self.chunks = (self.calls_by_kind * chunks[self.step]).sum(axis=1)
        # Seconds that its chunks spend on replicas, added up.
        self.service_s = self.tokens / service.tokens_per_s + self.chunks * service.overhead_s


class Queue:
    """The calls under way. `advance` is the only thing that moves time."""

    def __init__(self, arrivals: Arrivals, service: Service, tick_s: float) -> None:
        self._arrivals, self._service, self._tick_s = arrivals, service, tick_s
        # Python's floats in lists: twice as fast as elements of arrays.
        self._tokens: list[float] = arrivals.tokens.tolist()
        self._chunks: list[float] = arrivals.chunks.tolist()
        self._calls: list[float] = arrivals.calls.tolist()
        self._service_s: list[float] = arrivals.service_s.tolist()
        self._waiting: deque[int] = deque()
        self._head_left = 0.0
        chunk_s = arrivals.service_s.sum() / max(arrivals.chunks.sum(), 1.0)
        self._fade = min(1.0, tick_s / max(chunk_s, tick_s))
        self._longest_s = float(arrivals.chunk_s.max(initial=0.0))
        # Tokens and chunks that no replica works on yet.
        self.backlog_tokens = 0.0
        self.backlog_chunks = 0.0
        # Chunks that replicas work on.
        self.in_service = 0.0
        self.busy_s = 0.0
        self.arrived_tokens = 0.0
        self.arrived_chunks = 0.0
        # Of each bundle: its first and last call's wait, what share of its calls was not expired while waiting,
        # and how many replicas there were when it was done. As they stand, for a bundle that never waited.
        self._first_wait = [0.0] * arrivals.ticks
        self._last_wait = [0.0] * arrivals.ticks
        self._scored = [1.0] * arrivals.ticks
        self._replicas = np.zeros(arrivals.ticks)

    def advance(self, start: int, stop: int, replicas: int) -> None:
        """Moves from tick `start` to tick `stop` with so many replicas at work."""
        tokens, service_s, waiting, fade, tick_s = (
            self._tokens, self._service_s, self._waiting, self._fade, self._tick_s
        )  # fmt: skip
        self._replicas[start:stop] = replicas
        capacity = replicas * self._service.tokens_per_s * tick_s
        in_service, done_tokens = self.in_service, 0.0
        for k in range(start, stop):
            if not waiting and tokens[k] <= capacity:
                in_service += (service_s[k] / tick_s - in_service) * fade
                done_tokens += tokens[k]
            else:
                done, seconds = self._work(k, capacity)
                in_service += (seconds / tick_s - in_service) * fade
                done_tokens += done
        self.in_service = in_service
        self.busy_s += done_tokens / self._service.tokens_per_s
        self.arrived_tokens += sum(tokens[start:stop])
        self.arrived_chunks += sum(self._chunks[start:stop])
        if not waiting:
            self.backlog_tokens = self.backlog_chunks = 0.0
            # It fades, but a fleet without calls goes to zero only where none is left.
            if self.in_service < _NOBODY:
                self.in_service = 0.0

    def _work(self, k: int, capacity: float) -> tuple[float, float]:
        """A tick with a queue: tokens that were worked off, and the service seconds they stand for."""
        tokens, chunks, waiting, tick_s = self._tokens, self._chunks, self._waiting, self._tick_s
        now = k * tick_s
        if tokens[k]:
            if not waiting:
                self._head_left = tokens[k]
            waiting.append(k)
            self.backlog_tokens += tokens[k]
            self.backlog_chunks += chunks[k]
        while waiting and now - waiting[0] * tick_s >= self._service.timeout_s:
            self._expire(now)
        budget, seconds = capacity, 0.0
        while waiting and budget > 0:
            j = waiting[0]
            size = tokens[j]
            # Calls come in at even distances within their tick.
            apart_s = tick_s / self._calls[j]
            if self._head_left == size:
                begun = now + (capacity - budget) / capacity * tick_s
                self._first_wait[j] = wait = max(0.0, begun - j * tick_s - apart_s / 2)
                size = self._cut(j, wait)
            done = min(self._head_left, budget)
            budget -= done
            part = done / size
            self.backlog_tokens -= done
            self.backlog_chunks -= part * chunks[j]
            seconds += part * self._service_s[j]
            if done < self._head_left:
                self._head_left -= done
                break
            ended = now + (capacity - budget) / capacity * tick_s
            last_begun = ended - size / self._calls[j] / capacity * tick_s
            self._last_wait[j] = max(self._first_wait[j], last_begun - (j + 1) * tick_s + apart_s / 2)
            self._replicas[j] = self._replicas[k]
            self._next()
        return capacity - budget, seconds

    def _cut(self, j: int, wait: float) -> float:
        """The tokens of a bundle that is begun after `wait`: those that no deadline cuts off."""
        size = self._tokens[j]
        left_s = self._service.timeout_s - wait
        if left_s >= self._longest_s:
            return size
        arrivals, step = self._arrivals, self._arrivals.step[j]
        parts = np.minimum(1.0, left_s / np.maximum(arrivals.chunk_s[step], 1e-9))
        share = float((arrivals.calls_by_kind[j] * arrivals.alone_s[step] * parts).sum())
        self._tokens[j] = cut = max(1e-6, share * self._service.tokens_per_s)
        self.backlog_tokens -= size - cut
        self._head_left = cut
        return cut

    def _expire(self, now: float) -> None:
        """The first bundle's time is over. Its calls that were scored whole count, one that was begun does not."""
        j = self._waiting[0]
        part = 1 - self._head_left / self._tokens[j]
        self._scored[j] = math.floor(part * self._calls[j] + 1e-9) / self._calls[j]
        self._last_wait[j] = max(self._first_wait[j], now - (j + 1) * self._tick_s)
        self.backlog_tokens -= self._head_left
        self.backlog_chunks -= (1 - part) * self._chunks[j]
        self._next()

    def _next(self) -> None:
        self._waiting.popleft()
        self._head_left = self._tokens[self._waiting[0]] if self._waiting else 0.0

    def answers(self, slo_s: float) -> "Answers":
        """What became of all calls, at the end."""
        arrivals, service = self._arrivals, self._service
        open_ = np.zeros(arrivals.ticks)
        open_[list(self._waiting)] = 1.0
        if self._waiting:
            open_[self._waiting[0]] = self._head_left / self._tokens[self._waiting[0]]
        first, last = np.array(self._first_wait), np.array(self._last_wait)
        scored = np.where(open_ > 0, 0.0, np.array(self._scored))
        replicas = np.maximum(self._replicas, 1)
        histogram, in_time, met = Histogram(), np.zeros(arrivals.ticks), np.zeros(arrivals.ticks)
        for kind in range(arrivals.calls_by_kind.shape[1]):
            calls = arrivals.calls_by_kind[:, kind]
            alone = arrivals.alone_s[arrivals.step, kind] / replicas
            own = np.maximum(arrivals.chunk_s[arrivals.step, kind], alone) + service.overhead_s
            in_time += calls * scored * _below(service.timeout_s - own, first, last)
            met += calls * scored * _below(min(slo_s, service.timeout_s) - own, first, last)
            for point in (1 / 6, 3 / 6, 5 / 6):
                latency = np.minimum(first + (last - first) * point + own, service.timeout_s)
                histogram.add(latency, calls * scored / 3)
        still_open = arrivals.calls * (open_ > 0)
        expired = arrivals.calls - in_time - still_open
        histogram.add(
            np.full(1, service.timeout_s), np.array([(arrivals.calls * (1 - scored) - still_open).sum()])
        )
        return Answers(in_time, met, expired, still_open, histogram)


@dataclass(frozen=True, slots=True)
class Answers:
    """Calls by the tick in which they came: answered before their deadline, those of them within the SLO, expired,
    and still open at the end."""

    in_time: Floats
    met: Floats
    expired: Floats
    still_open: Floats
    latencies: "Histogram"

    @property
    def missed(self) -> Floats:
        """Calls that were answered later than the SLO, or not by the model at all."""
        return self.in_time + self.expired - self.met


class Histogram:
    """Latencies in bins that are 2 % wide, from 1 ms on."""

    def __init__(self) -> None:
        self._bins = np.zeros(1024)
        self._most = 0.0

    def add(self, seconds: Floats, weights: Floats) -> None:
        bins = np.clip(np.ceil(np.log(np.maximum(seconds, 1e-3) / 1e-3) / 0.02), 0, 1023).astype(int)
        self._bins += np.bincount(bins, weights, minlength=1024)
        self._most = max(self._most, float(seconds[weights > 0].max(initial=0.0)))

    def quantile(self, share: float) -> float:
        """Seconds within which so large a share of the calls was over; 0 without calls."""
        total = self._bins.cumsum()
        if total[-1] <= 0:
            return 0.0
        edge = 1e-3 * np.exp(0.02 * np.searchsorted(total, share * total[-1] * (1 - 1e-12)))
        return min(float(edge), self._most)


def _below(limit: Floats, first: Floats, last: Floats) -> Floats:
    """The share of waits, even between `first` and `last`, that are not above `limit`."""
    spread = last - first
    even = np.clip((limit - first) / np.where(spread > 0, spread, 1), 0, 1)
    return np.where(spread > 0, even, (limit >= first - 1e-12).astype(float))
