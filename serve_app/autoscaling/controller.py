"""Serve's controller, as far as it scales: what is sampled, pushed and averaged before a policy sees it.

Samples are taken every min(0.2 x look_back_period_s, metrics_interval_s) and pushed every metrics_interval_s. The
policy runs in Ray's own wrapper (scaling factors, delays), with Ray's own context and averaging (ray 2.60), on a
simulated clock.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from ray.serve import autoscaling_policy as ray_policy
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve._private.metrics_utils import aggregate_timeseries
from ray.serve.config import AutoscalingConfig, AutoscalingContext

Policy = Callable[[AutoscalingContext], tuple[int | float, dict[str, Any]]]
_DEPLOYMENT = DeploymentID("Reranker", "simulated")


class Source:
    """A replica or a handle: samples numbers and pushes those of the look-back period."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._look_back_s = config.look_back_period_s
        self._samples: dict[str, deque[TimeStampedValue]] = {}
        self.pushed: dict[str, list[TimeStampedValue]] = {}

    def sample(self, now: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._samples.setdefault(name, deque()).append(TimeStampedValue(now, value))

    def push(self, now: float) -> None:
        for series in self._samples.values():
            while series and series[0].timestamp <= now - self._look_back_s:
                series.popleft()
        self.pushed = {name: list(series) for name, series in self._samples.items() if series}


class Controller:
    """Decides for one deployment. `replicas` are those that report; many may be reported as a few, with their
    numbers added up."""

    def __init__(self, config: AutoscalingConfig, policy: Policy) -> None:
        self.config = config
        self._policy = ray_policy._apply_autoscaling_config(policy)
        self._state: dict[str, Any] = {}
        self.handle = Source(config)
        self.replicas: dict[int, Source] = {}
        # When the handle first counted calls of the newest replica: Serve's average begins no earlier.
        self.newest_at = float("-inf")

    @property
    def sample_every_s(self) -> float:
        return float(min(0.2 * self.config.look_back_period_s, self.config.metrics_interval_s))

    def decide(self, now: float, running: int, target: int) -> int:
        """The new target. Raises whatever the policy raises; in production that would stop all scaling."""
        context = AutoscalingContext(
            deployment_id=_DEPLOYMENT,
            deployment_name=_DEPLOYMENT.name,
            app_name=_DEPLOYMENT.app_name,
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=list(self.replicas),
            total_num_requests=lambda: self._aggregate(self.handle.pushed.get("ongoing"), now, self.newest_at),
            total_queued_requests=lambda: self._aggregate(self.handle.pushed.get("queued"), now),
            aggregated_metrics=lambda: self._by_name(lambda series: self._aggregate(series, now)),
            raw_metrics=lambda: self._by_name(lambda series: series),
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )
        with _clock(now):
            wanted, self._state = self._policy(context)
        # The wrapper's factors may make a float of it.
        return int(max(self.config.min_replicas, min(self.config.max_replicas, math.ceil(wanted))))

    def _aggregate(self, series: list[TimeStampedValue] | None, now: float, start: float = float("-inf")) -> float:
        """As the controller's `_merge_and_aggregate_timeseries`: the last sample holds until now."""
        if not series:
            return 0.0
        last = series[-1].timestamp
        window_start = start if series[0].timestamp < start <= last else None
        value = aggregate_timeseries(series, self.config.aggregation_function, max(now - last, 1e-3), window_start)
        return value if value is not None else 0.0

    def _by_name(self, read: Callable[[list[TimeStampedValue]], Any]) -> dict[str, dict[int, Any]]:
        names = dict.fromkeys(name for source in self.replicas.values() for name in source.pushed)
        return {
            name: {
                replica: read(source.pushed[name])
                for replica, source in self.replicas.items()
                if name in source.pushed
            }
            for name in names
        }


@contextlib.contextmanager
def _clock(now: float) -> Iterator[None]:
    """Ray's wrapper measures its delays with `time.time()`."""
    real = ray_policy.time
    ray_policy.time = SimpleNamespace(time=lambda: now)
    try:
        yield
    finally:
        ray_policy.time = real
