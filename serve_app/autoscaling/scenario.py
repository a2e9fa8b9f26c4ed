"""What is simulated: a variant of a config file, or a made-up one, and the policies to compare it under."""

import functools
import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.autoscaling.controller import Policy
from serve_app.autoscaling.nodes import NodeType
from serve_app.autoscaling.policy import DrainTime
from serve_app.autoscaling.simulator import Variant
from serve_app.autoscaling.traces import Trace
from serve_app.autoscaling.workload import Service
from serve_app.config import GatewaySettings, closest
from serve_app.configfile import DRAIN_TIME_PATH, ConfigError, load, same_path, scaling_of

# What docs/autoscaling.md recommends. One setting for all traces.
SCALING = {
    "min_replicas": 1,
    "max_replicas": 200,
    "metrics_interval_s": 1.0,
    "look_back_period_s": 5.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 120.0,
}
DRAIN_TIME = {"target_drain_s": 5.0, "max_utilization": 0.8}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy by name, made anew for each run, and Serve's settings around it. None: a fixed fleet."""

    name: str
    scaling: dict[str, Any]
    make: Callable[[], Policy] | None
    # Replicas' reports; Serve's own policy looks at none.
    reports: int = 4

    @property
    def config(self) -> AutoscalingConfig:
        with warnings.catch_warnings():
            # metrics_interval_s is called deprecated, but is what Serve 2.60 reads.
            warnings.simplefilter("ignore")
            return AutoscalingConfig(**self.scaling)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`scaling`: an `autoscaling_config` without its policy; `policy_kwargs`: DrainTime's; `own_policy`: another
    policy that the config names, and its arguments."""

    variant: Variant = field(default_factory=Variant)
    scaling: dict[str, Any] = field(default_factory=lambda: dict(SCALING))
    policy_kwargs: dict[str, Any] = field(default_factory=lambda: dict(DRAIN_TIME))
    own_policy: tuple[str, dict[str, Any]] | None = None

    @property
    def bounds(self) -> dict[str, Any]:
        return {name: self.scaling[name] for name in ("min_replicas", "max_replicas")}

    def scaled(self, factor: float) -> "Scenario":
        """For as many times the calls: `max_replicas` grows with them."""
        most = math.ceil(self.scaling["max_replicas"] * factor)
        return replace(self, scaling={**self.scaling, "max_replicas": max(most, self.scaling["min_replicas"], 1)})

    def drain_time(self) -> Candidate:
        return Candidate("drain-time", self.scaling, functools.partial(DrainTime, **self.policy_kwargs))

    def stock(self, name: str, settings: dict[str, Any]) -> Candidate:
        """Serve's own policy; what `settings` leaves out has Serve's default."""
        make = functools.partial(_as_it_is, replica_queue_length_autoscaling_policy)
        return Candidate(name, {**self.bounds, **settings}, make, reports=0)

    def fixed(self, replicas: int) -> Candidate:
        bounds = {"min_replicas": replicas, "max_replicas": replicas}
        return Candidate(f"fixed, {replicas} replicas", bounds, None)

    def instant(self, trace: Trace) -> Candidate:
        """Knows the trace's rate at every moment, without metrics or delays; replicas and nodes start as for all
        others. What it misses, no reaction with this much room avoids."""
        utilization = self.policy_kwargs.get("max_utilization", DRAIN_TIME["max_utilization"])
        rate = self.variant.service.tokens_per_s * utilization
        return Candidate(
            "instant reaction",
            {**self.scaling, "upscale_delay_s": 0.0},
            functools.partial(InstantReaction, trace, rate),
            reports=0,
        )

    def imported(self, path: str) -> Candidate:
        """A policy of one's own, `package.module:Class` or `package.module:function`; where it is the one that the
        config names, a class gets its arguments from there. Raises ConfigError."""
        module, _, name = path.partition(":")
        try:
            policy = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"--policy is {path!r}, which cannot be imported ({error}); allowed: drain-time, stock, fixed, "
                "all, or package.module:Class"
            ) from None
        if not callable(policy):
            raise ConfigError(f"--policy is {path!r}, which is {policy!r}; allowed: a class or a function")
        named, kwargs = self.own_policy or ("", {})
        make: Callable[[], Policy] = functools.partial(policy, **(kwargs if same_path(path, named) else {}))
        if not inspect.isclass(policy):
            make = functools.partial(_as_it_is, policy)
        return Candidate(path, self.scaling, make)


class InstantReaction:
    """See `Scenario.instant`. Takes its numbers from the trace, not from the context."""

    def __init__(self, trace: Trace, tokens_per_s: float) -> None:
        self._starts, self._needs = trace.starts_s, np.ceil(trace.tokens_per_s / tokens_per_s)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        step = max(0, int(np.searchsorted(self._starts, ctx.current_time, side="right")) - 1)
        return int(self._needs[step]), {}


def read(path: Path, variant: str | None) -> Scenario:
    """A variant of one of our config files: its limits, scaling settings, share of a GPU, and deadline. Raises
    ConfigError."""
    file = load(path)
    known = list(file.rerankers)
    if variant is None and known:
        variant = known[0]
    if variant not in known:
        raise ConfigError(
            f"--variant is {variant!r}, which {path} does not have; {closest(str(variant), known)} "
            f"known: {', '.join(known) or 'none'}"
        )
    application = next(a for a in file.applications if a.get("name") == variant)
    deployments = application.get("deployments") or []
    deployment: dict[str, Any] = next((d for d in deployments if d["name"] == "Reranker"), {})
    scaling = scaling_of(deployment)
    if scaling is None:
        raise ConfigError(
            f"{path}: the Reranker of {variant} has no autoscaling_config, so there is nothing to simulate"
        )
    policy = scaling.pop("policy", None) or {}
    function, kwargs = policy.get("policy_function"), policy.get("policy_kwargs") or {}
    is_ours = function is not None and same_path(function, DRAIN_TIME_PATH)
    own_policy = (function, kwargs) if function and not is_ours else None
    drain_time = kwargs if is_ours else dict(DRAIN_TIME)
    settings = next(iter(file.gateways.values()), None)
    gateway = settings.variants.get(variant) if settings else None
    service = Service(
        tokens_per_s=drain_time.get("expected_tokens_per_s") or Service().tokens_per_s,
        pairs_per_call=gateway.pairs_per_call if gateway else Service().pairs_per_call,
        max_ongoing_requests=deployment.get("max_ongoing_requests") or Service().max_ongoing_requests,
        timeout_s=_timeout_s(settings, variant) if settings else Service().timeout_s,
    )
    # A replica without a GPU counts as one.
    num_gpus = float((deployment.get("ray_actor_options") or {}).get("num_gpus") or 1)
    return Scenario(Variant(service, NodeType(), num_gpus), scaling, drain_time, own_policy)


def _timeout_s(settings: GatewaySettings, variant: str) -> float:
    """Of the first route that uses the variant, the default one first: the deadline's part of one stage."""
    names = sorted(settings.routes, key=lambda name: name != settings.default_route)
    for name in names:
        route = settings.routes[name]
        for pipeline in sorted(route.weights, key=lambda pipeline: -route.weights[pipeline]):
            stages = settings.pipelines[pipeline].stages
            if any(stage.variant == variant for stage in stages):
                return route.timeout_ms / 1000 / len(stages)
    return Service().timeout_s


def _as_it_is(policy: Policy) -> Policy:
    """A function keeps nothing from one run to the next."""
    return policy
