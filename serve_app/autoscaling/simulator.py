"""A variant's fleet over time: a trace of calls, the policy that production runs, and what Serve and nodes add.

Discrete events: samples, pushes, decisions, replicas that become ready, nodes that come and go. Between two
events the queue is worked off tick by tick (workload.py). What it leaves out: prefix caches, calls that differ in
urgency, the gateway's circuit breakers and score cache, replicas that die, the seconds that a stopping replica
holds its card.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingConfig

from serve_app.autoscaling.controller import Controller, Policy, Source
from serve_app.autoscaling.load import Load
from serve_app.autoscaling.nodes import Node, Nodes, NodeType
from serve_app.autoscaling.traces import Floats, Trace
from serve_app.autoscaling.workload import Answers, Arrivals, Queue, Service

# Of LoadMeter: busy seconds after which a measurement counts a third.
_MEMORY_S = 30.0
# How full replicas are when a trace begins.
_FIRST_UTILIZATION = 0.7


@dataclass(frozen=True, slots=True)
class Variant:
    """One model served one way, and where it runs. `start_s`: from a free card to the first call, mostly loading.
    `num_gpus`: of one replica."""

    service: Service = field(default_factory=Service)
    node: NodeType = field(default_factory=NodeType)
    num_gpus: float = 0.25
    start_s: float = 40.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A point at each decision. `held` are replicas with a card: running or starting."""

    seconds: Floats
    running: Floats
    held: Floats
    target: Floats
    backlog_tokens: Floats


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy did on a trace. Missed calls took longer than `slo_s` or got no score before their deadline.
    `gpu_hours`: replicas' shares of cards x time, from placement to stop. `node_gpu_hours`: all cards of all
    nodes."""

    trace: str
    policy: str
    slo_s: float
    calls: float
    missed: float
    expired: float
    still_open: float
    p50_s: float
    p95_s: float
    p99_s: float
    gpu_hours: float
    node_gpu_hours: float
    peak_replicas: int
    # Of the running replicas' time, the part in which they worked.
    utilization: float
    timeline: Timeline = field(repr=False)
    answers: Answers = field(repr=False)

    @property
    def missed_share(self) -> float:
        return self.missed / max(self.calls - self.still_open, 1e-9)


def simulate(
    trace: Trace,
    variant: Variant,
    config: AutoscalingConfig,
    policy: Policy | None,
    *,
    name: str = "",
    slo_s: float = 2.0,
    seed: int = 0,
    tick_s: float = 0.1,
    decide_every_s: float = 1.0,
    reports: int = 4,
) -> Result:
    """Runs `trace` on a fleet that `policy` scales within `config`; without a policy its size stays. The same seed
    draws the same calls for every policy.

    `decide_every_s`: Serve decides every 0.1 s; a second changes little and costs a tenth. `reports`: how many
    replicas report; where there are more, these speak for all, with the numbers added up. Raises what `policy`
    raises, and ValueError where a replica fits on no node.
    """
    arrivals = Arrivals(trace, variant.service, tick_s, seed)
    first = config.initial_replicas
    if first is None:
        first = math.ceil(trace.tokens_per_s[0] / variant.service.tokens_per_s / _FIRST_UTILIZATION)
    first = min(max(first, config.min_replicas), config.max_replicas)
    run = _Run(arrivals, variant, config, policy, first, tick_s, decide_every_s, reports)
    run.until(arrivals.ticks)
    fleet, answers = run.fleet, run.queue.answers(slo_s)
    latencies, points = answers.latencies, np.array(run.points, dtype=float).T
    return Result(
        trace=trace.name,
        policy=name,
        slo_s=slo_s,
        calls=float(arrivals.calls.sum()),
        missed=float(answers.missed.sum()),
        expired=float(answers.expired.sum()),
        still_open=float(answers.still_open.sum()),
        p50_s=latencies.quantile(0.5),
        p95_s=latencies.quantile(0.95),
        p99_s=latencies.quantile(0.99),
        gpu_hours=fleet.held_s * variant.num_gpus / 3600,
        node_gpu_hours=fleet.node_gpu_s / 3600,
        peak_replicas=int(points[2].max()),
        utilization=run.queue.busy_s / max(fleet.running_s, 1e-9),
        timeline=Timeline(*points),
        answers=answers,
    )


class _Fleet:
    """Replicas: waiting for a card, starting, running."""

    def __init__(self, variant: Variant, first: int, later: Callable[[float, Callable[[], None]], None]) -> None:
        self._variant, self._later = variant, later
        self.nodes = Nodes(variant.node, variant.num_gpus)
        self.nodes.arrive(0.0, math.ceil(first / variant.node.replicas(variant.num_gpus)))
        self.waiting = 0
        self._starting: list[dict[Node, int]] = []
        self._running = self.nodes.place(first)
        self.running = self.held = first
        self._last = 0.0
        self.held_s = self.running_s = self.node_gpu_s = 0.0

    def pass_time(self, now: float) -> None:
        """Before anything changes: adds up what has been held."""
        self.held_s += self.held * (now - self._last)
        self.running_s += self.running * (now - self._last)
        self.node_gpu_s += self.nodes.gpus * (now - self._last)
        self._last = now

    def scale_to(self, target: int, now: float) -> None:
        more = target - self.held - self.waiting
        if more > 0:
            self.waiting += more
            self._place(now)
        elif more < 0:
            self._stop(-more, now)

    def _place(self, now: float) -> None:
        placed = self.nodes.place(self.waiting) if self.waiting else {}
        count = sum(placed.values())
        if count:
            self.waiting -= count
            self.held += count
            self._starting.append(placed)
            self._later(self._variant.start_s, lambda: self._ready(placed))
        for _ in range(self.nodes.ask_for(self.waiting)):
            self._later(self._variant.node.provision_s, self._node_up)

    def _node_up(self) -> None:
        self.nodes.arrive(self._last)
        self._place(self._last)
        self._later(self._variant.node.idle_timeout_s, lambda: self.nodes.drop_idle(self._last))

    def _ready(self, placed: dict[Node, int]) -> None:
        self._starting = [batch for batch in self._starting if batch is not placed]
        for node, count in placed.items():
            self._running[node] = self._running.get(node, 0) + count
            self.running += count

    def _stop(self, count: int, now: float) -> None:
        """As Serve does: first those that don't run yet, then those on the emptiest nodes."""
        unplaced = min(count, self.waiting)
        self.waiting -= unplaced
        count -= unplaced
        for batch in reversed(self._starting):
            count -= self._take(batch, count, now)
        stopped = self._take(self._running, count, now)
        self.running -= stopped

    def _take(self, batch: dict[Node, int], count: int, now: float) -> int:
        taken = 0
        for node in sorted(batch, key=lambda node: node.used):
            if taken == count:
                break
            part = min(batch[node], count - taken)
            batch[node] -= part
            if not batch[node]:
                del batch[node]
            self.nodes.free(node, part, now)
            if not node.used:
                self._later(self._variant.node.idle_timeout_s, lambda: self.nodes.drop_idle(self._last))
            taken += part
        self.held -= taken
        return taken


class _Run:
    """The events, in order."""

    def __init__(
        self,
        arrivals: Arrivals,
        variant: Variant,
        config: AutoscalingConfig,
        policy: Policy | None,
        first: int,
        tick_s: float,
        decide_every_s: float,
        reports: int,
    ) -> None:
        self._tick_s, self._most_reports, self._service = tick_s, reports, variant.service
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = self._tick = 0
        self.queue = Queue(arrivals, variant.service, tick_s)
        self.fleet = _Fleet(variant, first, self._later)
        self.points: list[tuple[float, ...]] = []
        self._tokens_per_chunk = float(arrivals.tokens.sum() / max(arrivals.chunks.sum(), 1))
        # What every reporting replica has taken in since the start, and how long it was busy.
        self._each = (0.0, 0.0, 0.0)
        self._taken_tokens = self._taken_chunks = self._busy_s = 0.0
        self._target, self._ids, self._sampled_running = first, 0, first
        if policy is None:
            self._point()
            return
        self._controller = Controller(config, policy)
        for i in range(min(first, reports)):
            self._report(config.metrics_interval_s * i / min(first, reports))
        # A handle samples before it pushes, a replica pushes before it samples.
        self._every(0.0, self._controller.sample_every_s, self._sample_handle)
        self._every(0.0, config.metrics_interval_s, lambda: self._controller.handle.push(self.now))
        self._every(0.0, decide_every_s, self._decide)

    @property
    def now(self) -> float:
        return self._tick * self._tick_s

    def until(self, ticks: int) -> None:
        while self._events and self._events[0][0] < ticks:
            self._advance(self._events[0][0])
            heapq.heappop(self._events)[2]()
        self._advance(ticks)
        self._point()

    def _advance(self, tick: int) -> None:
        if tick > self._tick:
            self.queue.advance(self._tick, tick, self.fleet.running)
            self._tick = tick
            self.fleet.pass_time(self.now)

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        tick = self._tick + max(1, round(seconds / self._tick_s))
        heapq.heappush(self._events, (tick, self._count, event))

    def _every(self, first_s: float, every_s: float, event: Callable[[], Any]) -> None:
        def again() -> None:
            if event() is not False:
                self._later(every_s, again)

        self._later(first_s, again)

    def _in_handles(self) -> tuple[float, float]:
        """Chunks and tokens that no replica has taken yet."""
        queue, room = self.queue, self.fleet.running * self._service.max_ongoing_requests
        chunks = max(0.0, queue.backlog_chunks - max(0.0, room - queue.in_service))
        return chunks, queue.backlog_tokens * chunks / max(queue.backlog_chunks, 1e-9)

    def _sample_handle(self) -> None:
        if self.fleet.running > self._sampled_running:
            self._controller.newest_at = self.now
        self._sampled_running = self.fleet.running
        queued, _ = self._in_handles()
        ongoing = self.queue.backlog_chunks + self.queue.in_service
        self._controller.handle.sample(self.now, {"queued": queued, "ongoing": ongoing})

    def _report(self, first_s: float) -> None:
        """One more replica reports."""
        self._ids += 1
        me, since = self._ids, self._each
        source = self._controller.replicas[me] = Source(self._controller.config)

        def sample() -> bool:
            if me not in self._controller.replicas:
                return False
            self._take_in()
            tokens, chunks, busy_s = (now - then for now, then in zip(self._each, since, strict=True))
            reporting = len(self._controller.replicas)
            # The last one has stopped, and reports until the next decision.
            replicas = max(self.fleet.running, 1) / reporting
            _, queued = self._in_handles()
            pending = self.queue.backlog_tokens - queued + self.queue.in_service * self._tokens_per_chunk / 2
            load = Load(
                pending_tokens=max(0.0, pending) / reporting,
                arrived_tokens=tokens,
                arrived_calls=chunks,
                tokens_per_s=self._service.tokens_per_s if busy_s > 0 else 0.0,
                measured_s=_MEMORY_S * -math.expm1(-busy_s / replicas / _MEMORY_S) * replicas,
            )
            # As `load.stats()`, which copies deeply.
            source.sample(self.now, {name: getattr(load, name) for name in Load.__slots__})
            return True

        def push() -> bool:
            source.push(self.now)
            return me in self._controller.replicas

        self._every(first_s, self._controller.config.metrics_interval_s, push)
        self._every(first_s, self._controller.sample_every_s, sample)

    def _take_in(self) -> None:
        """Shares what has come since the last look among those that report."""
        queued_chunks, queued_tokens = self._in_handles()
        tokens = max(self._taken_tokens, self.queue.arrived_tokens - queued_tokens)
        chunks = max(self._taken_chunks, self.queue.arrived_chunks - queued_chunks)
        new = (tokens - self._taken_tokens, chunks - self._taken_chunks, self.queue.busy_s - self._busy_s)
        self._taken_tokens, self._taken_chunks, self._busy_s = tokens, chunks, self.queue.busy_s
        reporting = len(self._controller.replicas)
        if reporting:
            each = self._each
            self._each = (each[0] + new[0] / reporting, each[1] + new[1] / reporting, each[2] + new[2] / reporting)

    def _decide(self) -> None:
        reporting, wanted = self._controller.replicas, min(self.fleet.running, self._most_reports)
        if len(reporting) != wanted:
            self._take_in()
            while len(reporting) > wanted:
                reporting.popitem()
            while len(reporting) < wanted:
                self._report(0.0)
        self._target = self._controller.decide(self.now, self.fleet.running, self._target)
        self.fleet.scale_to(self._target, self.now)
        self._point()

    def _point(self) -> None:
        fleet = self.fleet
        self.points.append((self.now, fleet.running, fleet.held, self._target, self.queue.backlog_tokens))
