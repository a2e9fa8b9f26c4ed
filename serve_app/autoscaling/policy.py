"""The drain-time policy: replicas by the time that the backlog takes, not by the number of calls.

    replicas = max(backlog / (rate × target_drain_s), arrivals / (rate × max_utilization))

Backlog in tokens, arrivals in tokens a second, rate in tokens a second of one busy replica. Knows nothing of Ray:
what it reads of Serve's context are plain attributes, so that the simulator and the tests run this very class.
"""

import logging
import math
import sys
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from serve_app.autoscaling.load import Load
from serve_app.config import closest

logger = logging.getLogger("ray.serve")

# Arrivals are looked at over both: what has been for half a minute and still is, and what is new beyond doubt.
_LONG_S, _SHORT_S = 30.0, 5.0
_SAMPLE_EVERY_S = 1.0
# A report that has not changed for so long, or for three times the interval that Serve is set to, is stale.
_STALE_S = 15.0
# Shrinking needs this much more room than growing, so that what shrinks does not grow again.
_SHRINK_DRAIN, _SHRINK_UTILIZATION = 0.5, 0.85
# Seconds of full load that a stated rate weighs beside measured ones.
_EXPECTED_WEIGHT_S = 2.0
_STATE = "drain_time"
_NAMES = tuple(f.name for f in fields(Load))
_LOG_EVERY_S = 60.0
_DEFAULTS: dict[str, Any] = {"target_drain_s": 2.0, "max_utilization": 0.8, "expected_tokens_per_s": None}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a variant has to do: `backlog_tokens` accepted or waiting, and tokens that arrive a second."""

    backlog_tokens: float
    arrivals: float

    def replicas(self, tokens_per_s: float, drain_s: float, utilization: float) -> int:
        """The least that drain the backlog in `drain_s` and keep up at `utilization`; 0 for no work at all."""
        if self.backlog_tokens <= 0 and self.arrivals <= 0:
            return 0
        busy = max(self.backlog_tokens / drain_s, self.arrivals / utilization) / tokens_per_s
        # A hair above a whole number is floating point, not a replica.
        return max(1, math.ceil(busy - 1e-9))


@dataclass(slots=True)
class _Seen:
    """A replica's counters when last looked at, and when its report last changed (the controller's clock)."""

    stamp: float
    at: float
    load: Load


@dataclass(slots=True)
class _Sample:
    at: float
    # What had arrived at all replicas together, and what waited in handles.
    tokens: float
    calls: float
    queued: float


@dataclass(slots=True)
class _State:
    """What is kept between two looks. Empty after the controller restarts."""

    replicas: dict[Hashable, _Seen] = field(default_factory=dict)
    tokens: float = 0.0
    calls: float = 0.0
    samples: deque[_Sample] = field(default_factory=deque)
    tokens_per_s: float = 0.0
    tokens_per_call: float = 0.0
    # Replicas needed over the last downscale delay, falling: the first is the most.
    needs: deque[tuple[float, int]] = field(default_factory=deque)
    said: int | None = None


class DrainTime:
    """For `autoscaling_config.policy.policy_function`, with these arguments as `policy_kwargs`.

    `target_drain_s`: seconds in which the backlog is to be worked off; docs/autoscaling.md says how to choose
    it (2). `max_utilization`: of a replica's rate, what steady traffic may use (0.8). `expected_tokens_per_s`: of
    one busy replica, until it has been measured; None, the default: measured before anything grows.

    Never raises: an exception here, or in a call, stops Serve's controller from managing any application. Of an
    argument with a problem the default is used, and the log says so; `serve-app check` and `up` refuse it.
    """

    def __init__(self, /, **arguments: Any) -> None:
        wrong = self.problems(arguments)
        if wrong:
            logger.error(f"The scaling policy uses its defaults: {'; '.join(wrong.values())}")
        used = {**_DEFAULTS, **{name: value for name, value in arguments.items() if name not in wrong}}
        self.target_drain_s: float = used["target_drain_s"]
        self.max_utilization: float = used["max_utilization"]
        self.expected_tokens_per_s: float | None = used["expected_tokens_per_s"]
        self._complained_at = -math.inf

    @staticmethod
    def problems(arguments: Mapping[str, object]) -> dict[str, str]:
        """What is wrong with arguments, by their names: the name, its value, and what is allowed."""
        wrong = {}
        known = list(_DEFAULTS)
        for name, value in arguments.items():
            if name not in known:
                hint = closest(name, known) or f"known: {known}"
                wrong[name] = f"{name} is no setting of serve_app.autoscaling:DrainTime; {hint}"
            elif value is not None or _DEFAULTS[name] is not None:
                most = 1.0 if name == "max_utilization" else math.inf
                number = None if isinstance(value, bool) else _number(value)
                if not number or number > most:
                    allowed = "a number above 0" + (f", up to {most:g}" if math.isfinite(most) else "")
                    wrong[name] = f"{name} is {value!r}; allowed: {allowed}"
        return wrong

    def __call__(self, ctx: Any) -> tuple[Any, dict[str, Any]]:
        """Replicas wanted, and the state for the next look. What cannot be judged stays as it is."""
        if isinstance(ctx, Mapping):
            return self._of_application(ctx), {}
        kept = dict(ctx.policy_state or {})
        try:
            state = kept.setdefault(_STATE, _State())
            return self._wanted(ctx, state), kept
        except Exception:
            now = float(ctx.current_time or 0)
            if now - self._complained_at > _LOG_EVERY_S:
                self._complained_at = now
                logger.exception("The scaling policy failed; the number of replicas stays.")
            kept.pop(_STATE, None)
            return int(ctx.target_num_replicas), kept

    def _of_application(self, contexts: Mapping[Hashable, Any]) -> dict[Hashable, int]:
        """As a whole application's policy, Serve asks it for all deployments at once: all stay as they are."""
        if self._complained_at < math.inf:
            self._complained_at = math.inf
            logger.error(
                "autoscaling_policy is serve_app.autoscaling:DrainTime, which scales no whole application: all "
                "stays as it is. It belongs under deployments[].autoscaling_config.policy"
            )
        return {deployment: int(ctx.target_num_replicas) for deployment, ctx in contexts.items()}

    def _wanted(self, ctx: Any, state: _State) -> int:
        now, target = float(ctx.current_time), int(ctx.target_num_replicas)
        if not ctx.current_num_replicas:
            # Nothing runs, or the controller has just restarted. A first call wakes a sleeping variant without us.
            return target
        self._take_in(state, _latest(ctx.raw_metrics or {}, ctx.running_replicas), ctx.running_replicas, now)
        stale_s = max(_STALE_S, 3 * float(getattr(ctx.config, "metrics_interval_s", 0) or 0))
        fresh = [seen.load for seen in state.replicas.values() if now - seen.at <= stale_s]
        if not fresh:
            return target
        queued = _number(ctx.total_queued_requests) or 0.0
        self._sample(state, now, queued)
        backlog = sum(load.pending_tokens for load in fresh) + queued * state.tokens_per_call
        long, short, doubtless, spanned = self._arrivals(state, now)
        idle = not (backlog or queued or long or short or ctx.total_num_requests)
        rate = self._rate(state)
        if not rate and not idle:
            return target
        up = Demand(backlog, max(min(long, short), doubtless)).replicas(
            rate, self.target_drain_s, self.max_utilization
        )
        down = Demand(backlog, max(long, short)).replicas(
            rate, self.target_drain_s * _SHRINK_DRAIN, self.max_utilization * _SHRINK_UTILIZATION
        )
        # Zero is for when Serve too sees no call.
        down = max(down, 0 if idle else 1)
        most = _most(state.needs, now, down, float(getattr(ctx.config, "downscale_delay_s", 0) or 0))
        wanted = target
        # Serve would cut it off too; but what cannot be had isn't worth a line in the log at every look.
        up = min(up, getattr(ctx, "capacity_adjusted_max_replicas", up))
        if up > target:
            wanted = up
        elif down < target and len(fresh) == len(ctx.running_replicas) and spanned:
            # Serve takes the last of a row of such wishes; the most that was needed meanwhile is what stays.
            wanted = min(target - 1, most)
        self._say(ctx, state, wanted, backlog, max(long, short), rate)
        return wanted

    def _take_in(
        self,
        state: _State,
        reports: Mapping[Hashable, tuple[float, Load]],
        running: Sequence[Hashable],
        now: float,
    ) -> None:
        """Adds what has arrived since the last look."""
        for replica in state.replicas.keys() - set(running):
            del state.replicas[replica]
        for replica, (stamp, load) in reports.items():
            seen = state.replicas.get(replica)
            if seen is None:
                # Its counts may be days old: the controller has restarted, or the replica had a new user_config.
                state.replicas[replica] = _Seen(stamp, now, load)
                continue
            tokens = max(0.0, load.arrived_tokens - seen.load.arrived_tokens)
            calls = max(0.0, load.arrived_calls - seen.load.arrived_calls)
            state.tokens += tokens
            state.calls += calls
            if now - seen.at > _SHORT_S:
                # A late report: this has arrived over all that time, not just now.
                for sample in state.samples:
                    share = max(0.0, (sample.at - seen.at) / (now - seen.at))
                    sample.tokens += share * tokens
                    sample.calls += share * calls
            if stamp != seen.stamp:
                seen.at, seen.stamp = now, stamp
            seen.load = load

    def _sample(self, state: _State, now: float, queued: float) -> None:
        samples = state.samples
        if samples and now < samples[-1].at:
            # The clock was set back.
            samples.clear()
        if samples and now - samples[-1].at < _SAMPLE_EVERY_S:
            return
        samples.append(_Sample(now, state.tokens, state.calls, queued))
        while len(samples) > 2 and samples[1].at <= now - _LONG_S:
            samples.popleft()
        calls = samples[-1].calls - samples[0].calls
        if calls:
            state.tokens_per_call = (samples[-1].tokens - samples[0].tokens) / calls

    def _arrivals(self, state: _State, now: float) -> tuple[float, float, float, bool]:
        """Tokens a second over the long and the short window, what of the short one is beyond doubt, and whether
        the long window has been seen whole.

        What has arrived is what replicas got and what waits in handles. Of n calls, chance alone moves the count
        by about √n (Poisson), so a short window counts for its rate less two such deviations.
        """

        def rate(window_s: float) -> tuple[float, float]:
            samples = state.samples
            start = next(s for s in reversed(samples) if s.at <= now - window_s or s is samples[0])
            span = samples[-1].at - start.at
            if span <= 0:
                return 0.0, 0.0
            waiting = samples[-1].queued - start.queued
            tokens = samples[-1].tokens - start.tokens + waiting * state.tokens_per_call
            calls = samples[-1].calls - start.calls + waiting
            return max(0.0, tokens / span), max(0.0, calls)

        if len(state.samples) < 2:
            return 0.0, 0.0, 0.0, False
        long, _ = rate(_LONG_S)
        short, calls = rate(_SHORT_S)
        doubtless = short * max(0.0, 1 - 2 / math.sqrt(calls)) if calls else 0.0
        return long, short, doubtless, now - state.samples[0].at >= _LONG_S

    def _rate(self, state: _State) -> float:
        """Tokens a second of one busy replica: all replicas' measurements by their weight, and the stated rate."""
        weights = [(seen.load.tokens_per_s, seen.load.measured_s) for seen in state.replicas.values()]
        weights = [(rate, weight) for rate, weight in weights if rate > 0 and weight > 0]
        if self.expected_tokens_per_s is not None:
            weights.append((self.expected_tokens_per_s, _EXPECTED_WEIGHT_S))
        if weights:
            # Tokens add up, and so do the seconds they took.
            state.tokens_per_s = sum(rate * weight for rate, weight in weights) / sum(w for _, w in weights)
        return state.tokens_per_s

    def _say(self, ctx: Any, state: _State, wanted: int, backlog: float, arrivals: float, rate: float) -> None:
        if wanted > int(ctx.target_num_replicas) and wanted != state.said:
            capacity = rate * int(ctx.current_num_replicas)
            logger.info(
                f"{ctx.app_name} wants {wanted} replicas: {backlog:,.0f} tokens wait, which take "
                f"{backlog / capacity:.1f} s (target_drain_s {self.target_drain_s:g}); {arrivals:,.0f} a second "
                f"arrive, {arrivals / capacity:.0%} of what {ctx.current_num_replicas} can do "
                f"(max_utilization {self.max_utilization:g})."
            )
        state.said = wanted


def _latest(
    raw: Mapping[str, Mapping[Hashable, Sequence[Any]]], running: Sequence[Hashable]
) -> dict[Hashable, tuple[float, Load]]:
    """The last report of each replica and its time stamp; replicas whose report is not whole are left out."""
    reports = {}
    for replica in running:
        values: dict[str, float] = {}
        stamp = 0.0
        for name in _NAMES:
            series = raw.get(name, {}).get(replica)
            value = _number(series[-1].value) if series else None
            if series is None or value is None:
                break
            values[name], stamp = value, series[-1].timestamp
        else:
            reports[replica] = (stamp, Load(**values))
    return reports


def _most(needs: deque[tuple[float, int]], now: float, need: int, window_s: float) -> int:
    """The largest of the `need`s of the last `window_s`, this one included."""
    while needs and needs[-1][1] <= need:
        needs.pop()
    needs.append((now, need))
    while needs[0][0] < now - window_s:
        needs.popleft()
    return needs[0][1]


def _number(value: object) -> float | None:
    """A finite number from 0 on; None for what is none."""
    # Whole numbers may be larger than a float.
    if isinstance(value, int | float) and 0 <= value <= sys.float_info.max:
        return float(value)
    return None
