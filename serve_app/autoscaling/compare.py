"""Policies side by side on traces: drain-time, Serve's own policy as well as its settings allow, and fixed fleets.

Serve's policy is tuned against drain-time: of the settings that cost no more GPU-hours, those with the fewest
misses, once for each trace and once for all of them. Settings are drawn at random, then the best are changed a
little. The choice among the best is made on other draws of the calls than the search and the report: scaling by
queue length swings, and a swing that happens to be up when a sale begins is luck.
"""

import contextlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean
from typing import Any, Protocol, TypeVar

from serve_app.autoscaling.scenario import Candidate, Scenario
from serve_app.autoscaling.simulator import Result, Variant, simulate
from serve_app.autoscaling.traces import Trace

# Serve's settings, and what is tried of each: (look-back, push interval) go together.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "target_ongoing_requests": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "windows": ((2.0, 1.0), (5.0, 1.0), (10.0, 1.0), (30.0, 1.0), (30.0, 10.0), (60.0, 5.0)),
    "upscale_delay_s": (0.0, 2.0, 5.0, 10.0, 30.0),
    "downscale_delay_s": (10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    "upscaling_factor": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
    "downscaling_factor": (0.2, 0.5, 1.0),
    "aggregation_function": ("mean", "mean", "max", "min"),
}
_FINALISTS = 5
# More GPU-hours than drain-time's that are let pass as chance.
_TOLERANCE = 0.03
# Of a trace up to this length more settings are tried, as many as take the time.
_SHORT_TRACE_S = 3 * 3600.0
# A day's trace is drawn once, and searched on coarser ticks.
_LONG_TRACE_S = 6 * 3600.0
_INLINE_S = 7200.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """A policy on a trace: `results` of several draws, the first of which is drawn and shown in pictures."""

    name: str
    settings: dict[str, Any]
    results: tuple[Result, ...]

    def mean(self, name: str) -> float:
        return fmean(getattr(result, name) for result in self.results)

    @property
    def missed_share(self) -> float:
        return self.mean("missed_share")


@dataclass(frozen=True, slots=True)
class Comparison:
    trace: Trace
    slo_s: float
    rows: tuple[Row, ...]

    def row(self, start: str) -> Row | None:
        return next((row for row in self.rows if row.name.startswith(start)), None)


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs candidates. `seed`: of the draws that are reported; `objective`: share of calls that a fixed fleet has
    to answer within the SLO; `search`: settings that are tried for Serve's policy on each trace,
    several times as many on short ones."""

    scenario: Scenario
    slo_s: float = 2.0
    seed: int = 0
    objective: float = 0.99
    search: int = 24
    draws: int = 3

    def compare(self, traces: Sequence[Trace], candidates: Sequence[Candidate]) -> list[Comparison]:
        """The same candidates on all traces."""
        with _workers(sum(trace.seconds for trace in traces) * len(candidates)) as pool:
            return [self._comparison(pool, trace, candidates) for trace in traces]

    def compare_all(self, traces: Sequence[Trace]) -> list[Comparison]:
        """Drain-time, Serve's policy (tuned for the trace, for all traces, and with its defaults), instant
        reaction, and the cheapest fixed fleet that meets the SLO."""
        scenario = self.scenario
        drain_time = scenario.drain_time()
        with _workers() as pool:
            ours = [self._row(pool, trace, drain_time) for trace in traces]
            budgets = [row.mean("gpu_hours") for row in ours]
            tuned, once = self._tuned(pool, traces, budgets)
            comparisons = []
            for trace, row, settings in zip(traces, ours, tuned, strict=True):
                candidates = [scenario.stock("Serve, tuned for this trace", _serve_settings(settings))]
                if len(traces) > 1:
                    candidates.append(scenario.stock("Serve, tuned once for all", _serve_settings(once)))
                candidates += [scenario.stock("Serve's defaults", {}), scenario.instant(trace)]
                candidates += [scenario.fixed(self._cheapest_fixed(pool, trace))]
                rows = self._comparison(pool, trace, candidates).rows
                comparisons.append(Comparison(trace, self.slo_s, (row, *rows)))
        return comparisons

    def fixed(self, trace: Trace) -> Comparison:
        with _workers(trace.seconds) as pool:
            return self._comparison(pool, trace, [self.scenario.fixed(self._cheapest_fixed(pool, trace))])

    def _comparison(self, pool: "_Pool", trace: Trace, candidates: Sequence[Candidate]) -> Comparison:
        return Comparison(trace, self.slo_s, tuple(self._row(pool, trace, candidate) for candidate in candidates))

    def _row(self, pool: "_Pool", trace: Trace, candidate: Candidate) -> Row:
        draws = 1 if trace.seconds > _LONG_TRACE_S else self.draws
        jobs = [_Job(trace, self.scenario.variant, candidate, self.slo_s, self.seed + i) for i in range(draws)]
        return Row(candidate.name, _settings(candidate, self.scenario), tuple(pool.map(_run, jobs)))

    def _cheapest_fixed(self, pool: "_Pool", trace: Trace) -> int:
        """The fewest replicas that meet the SLO in every draw; where none do, four times the peak's."""
        peak = float(trace.tokens_per_s.max()) / self.scenario.variant.service.tokens_per_s
        low, high = 0, max(1, math.ceil(peak * 1.1))

        def meets(replicas: int) -> bool:
            results = self._row(pool, trace, self.scenario.fixed(replicas)).results
            return max(result.missed_share for result in results) <= 1 - self.objective

        while not meets(high) and high < 4 * peak:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _tuned(
        self, pool: "_Pool", traces: Sequence[Trace], budgets: Sequence[float]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Settings of Serve's policy: the best for each trace, and the best for all of them together, where a
        setting may cost more on one trace and less on another."""
        finalists: list[dict[str, Any]] = []
        for trace, budget in zip(traces, budgets, strict=True):
            finalists += [settings for settings in self._search(pool, trace, budget) if settings not in finalists]
        # By trace and finalist: missed share, GPU-hours as a part of drain-time's.
        outcomes = [
            self._outcomes(pool, trace, finalists, budget, (self.seed + 1001, self.seed + 1002))
            for trace, budget in zip(traces, budgets, strict=True)
        ]
        tuned = [min(zip(row, finalists, strict=True), key=lambda o: _score(*o[0]))[1] for row in outcomes]
        means = [
            (fmean(missed for missed, _ in column), fmean(cost for _, cost in column))
            for column in zip(*outcomes, strict=True)
        ]
        return tuned, min(zip(means, finalists, strict=True), key=lambda o: _score(*o[0]))[1]

    def _search(self, pool: "_Pool", trace: Trace, budget: float) -> list[dict[str, Any]]:
        """The settings that did best on a trace."""
        rng = random.Random(self.seed)
        found: list[tuple[tuple[float, float], dict[str, Any]]] = []
        tries = self.search * min(5, max(1, round(_SHORT_TRACE_S / trace.seconds)))
        while len(found) < tries:
            # A half at random; then the best so far with one or two settings changed.
            parents = found[:3] if len(found) * 2 >= tries else []
            batch = [
                _changed(rng, rng.choice(parents)[1]) if parents else _drawn(rng)
                for _ in range(min(10, tries - len(found)))
            ]
            found += zip(self._outcomes(pool, trace, batch, budget, (self.seed + 1000,)), batch, strict=True)
            found.sort(key=lambda outcome: _score(*outcome[0]))
        return [settings for _, settings in found[:_FINALISTS]]

    def _outcomes(
        self, pool: "_Pool", trace: Trace, batch: Sequence[dict[str, Any]], budget: float, seeds: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Missed share and GPU-hours as a part of `budget`, of each."""
        coarse = trace.seconds > _LONG_TRACE_S
        seeds = seeds[:1] if coarse else seeds
        jobs = [
            _Job(
                trace, self.scenario.variant, self.scenario.stock("", _serve_settings(s)), self.slo_s, seed, coarse
            )
            for s in batch
            for seed in seeds
        ]
        results = list(pool.map(_run_small, jobs))
        by = [results[i : i + len(seeds)] for i in range(0, len(results), len(seeds))]
        return [
            (fmean(share for share, _ in part), fmean(hours for _, hours in part) / max(budget, 1e-9))
            for part in by
        ]


@dataclass(frozen=True, slots=True)
class _Job:
    trace: Trace
    variant: Variant
    candidate: Candidate
    slo_s: float
    seed: int
    coarse: bool = False


def _run(job: _Job) -> Result:
    # The policy says in the log whenever it wants more: a line a simulated second.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    candidate = job.candidate
    return simulate(
        job.trace,
        job.variant,
        candidate.config,
        candidate.make() if candidate.make else None,
        name=candidate.name,
        slo_s=job.slo_s,
        seed=job.seed,
        reports=candidate.reports,
        tick_s=0.5 if job.coarse else 0.1,
        decide_every_s=2.0 if job.coarse else 1.0,
    )


def _run_small(job: _Job) -> tuple[float, float]:
    result = _run(job)
    return result.missed_share, result.gpu_hours


def _score(missed: float, cost: float) -> tuple[float, float]:
    """Smaller is better: what is within the budget (1) before what isn't."""
    return (cost if cost > 1 + _TOLERANCE else 0.0), missed


def _drawn(rng: random.Random) -> dict[str, Any]:
    return {name: rng.choice(choices) for name, choices in _CHOICES.items()}


def _changed(rng: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    changed = dict(settings)
    for name in rng.sample(list(_CHOICES), rng.choice((1, 2))):
        choices = _CHOICES[name]
        at = choices.index(changed[name])
        changed[name] = choices[min(max(at + rng.choice((-1, 1)), 0), len(choices) - 1)]
    return changed


def _serve_settings(settings: dict[str, Any]) -> dict[str, Any]:
    look_back, interval = settings["windows"]
    rest = {name: value for name, value in settings.items() if name != "windows"}
    return {**rest, "look_back_period_s": look_back, "metrics_interval_s": interval}


def _settings(candidate: Candidate, scenario: Scenario) -> dict[str, Any]:
    settings = {name: value for name, value in candidate.scaling.items() if name not in scenario.bounds}
    return {**settings, **scenario.policy_kwargs} if candidate.name == "drain-time" else settings


class _Pool(Protocol):
    def map(self, run: Callable[[_Job], _T], jobs: Iterable[_Job], /) -> Iterable[_T]: ...


class _Here:
    """For what is done before other processes would have started."""

    def map(self, run: Callable[[_Job], _T], jobs: Iterable[_Job], /) -> Iterable[_T]:
        return map(run, jobs)


@contextlib.contextmanager
def _workers(simulated_s: float = math.inf) -> Iterator[_Pool]:
    """A process for each core that is ours."""
    if simulated_s <= _INLINE_S:
        yield _Here()
        return
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        yield pool
