"""What the gateway tells Prometheus, by `ray.util.metrics`; docs/operations.md has the table.

Labels have few values: names of the config, paths of the API, words of ours. Nothing of a caller's becomes one.
"""

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.gateway.pipeline import StageReport
from serve_app.gateway.plan import Call
from serve_app.gateway.service import Service

# Seconds; two a factor of two apart would blur a p95, so they are closer.
_BOUNDS = [0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30]


class Metrics:
    """One per gateway replica. Costs 3 to 5 microseconds a number."""

    def __init__(self) -> None:
        call = ("path", "route", "pipeline", "why", "status")
        self._calls = Counter("serve_app_calls", "Calls answered.", tag_keys=call)
        self._call_s = Histogram(
            "serve_app_call_seconds",
            "From the call's first byte read to its answer.",
            boundaries=_BOUNDS,
            tag_keys=("path", "route"),
        )
        self._stage_s = Histogram(
            "serve_app_stage_seconds",
            "A stage of a call: recall, or a variant's scores.",
            boundaries=_BOUNDS,
            tag_keys=("stage",),
        )
        self._pairs = Counter("serve_app_pairs", "Pairs that a variant was asked for.", tag_keys=("variant",))
        self._hits = Counter("serve_app_cache_hits", "Pairs that the score cache had.", tag_keys=("variant",))
        self._recall_hits = Counter("serve_app_cache_recall_hits", "Searches whose candidates were known.")
        self._tokens = Counter("serve_app_tokens", "Prompt tokens of computed pairs.", tag_keys=("variant",))
        self._prefix_tokens = Counter(
            "serve_app_prefix_cache_tokens", "Tokens of these that the engine had cached.", tag_keys=("variant",)
        )
        self._degraded = Counter(
            "serve_app_degraded", "Stages that a call went without.", tag_keys=("stage", "reason")
        )

    def __call__(
        self, path: str, status: int, took_s: float, call: Call | None, reports: Sequence[StageReport]
    ) -> None:
        plan = call.plan if call else None
        route = (plan.route if plan else None) or ""
        labels = {
            "path": path,
            "route": route,
            "pipeline": (plan.pipeline if plan else None) or "",
            "why": plan.why if plan else "",
            "status": str(status),
        }
        self._calls.inc(1, labels)
        self._call_s.observe(took_s, {"path": path, "route": route})
        for report in reports:
            self._count(report)

    def _count(self, report: StageReport) -> None:
        if report.skipped is not None:
            return
        self._stage_s.observe(report.took_ms / 1e3, {"stage": report.name})
        if report.failure is not None:
            self._degraded.inc(1, {"stage": report.name, "reason": report.failure.reason})
        if report.cached:
            self._recall_hits.inc(1)
        variant = {"variant": report.name}
        for counter, value in (
            (self._pairs, report.pairs),
            (self._hits, report.cache_hits),
            (self._tokens, report.tokens),
            (self._prefix_tokens, report.cached_tokens),
        ):
            if value:
                counter.inc(value, variant)


class Gauges:
    """What a gateway replica is like now, to be told of every few seconds."""

    def __init__(self, replica: str) -> None:
        self._replica = {"replica": replica}
        self._entries, self._bytes, self._store_up, self._recall_bytes = (
            Gauge(f"serve_app_cache_{name}", description, tag_keys=("replica",))
            for name, description in (
                ("entries", "Scores in the gateway's memory, also those past their time."),
                ("bytes", "Room for scores, of memory that is taken as it fills."),
                ("store_up", "0 while the score cache's Redis is left out because it doesn't answer in time."),
                ("recall_bytes", "What the known candidates of searches take."),
            )
        )
        self._problem = Gauge(
            "serve_app_gateway_problem",
            "1 while keys or settings are refused, and the old ones stay in force.",
            tag_keys=("replica", "what"),
        )

    def set(self, service: Service) -> None:
        cache = service.scoring.stats()
        self._entries.set(cache.get("entries", 0), self._replica)
        self._bytes.set(cache.get("size_bytes", 0), self._replica)
        self._recall_bytes.set(service.recalling.size_bytes, self._replica)
        self._store_up.set(float(not cache.get("redis_out", False)), self._replica)
        for what, problem in (("keys", service.keys.problem), ("settings", service.settings_error)):
            self._problem.set(float(problem is not None), {**self._replica, "what": what})
